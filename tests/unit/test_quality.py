"""The source stays linted, typed and documented; the shipped configs load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.config.reference import methods, reference

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_source_is_clean(command: list[str]) -> None:
    target = [] if command == ["mypy"] else ["."]
    done = subprocess.run(
        [sys.executable, "-m", *command, *target], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_configs() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}
    assert names >= {"zero2_bf16", "zero2_fp16", "zero2_autocast", "lamb", "lars"}
    assert names >= {"onebit_adam", "onebit_lamb", "zero_one_adam"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_resolves(path: Path) -> None:
    run = load_config(path)
    if stage := re.match(r"zero(\d)", path.stem):
        assert run.zero_stage == int(stage[1])
    assert load_config(run.to_dict()) == run


def test_the_generated_pages_are_up_to_date() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: dat-ds config --reference > docs/config.md"
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == methods(), "run: dat-ds config --methods > docs/methods.md"


def test_every_key_has_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", reference(), re.MULTILINE)
    assert len(rows) > 150
    empty = [key for key, meaning in rows if not meaning or meaning.startswith("Default")]
    assert not empty, f"say what these keys mean, not only their default: {empty}"


def test_the_command_line_has_the_documented_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for command in (
        "init",
        "train",
        "eval",
        "export",
        "label",
        "predict",
        "presets",
        "config",
        "report",
        "bench",
    ):
        assert f"\n    {command} " in text
