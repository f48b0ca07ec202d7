"""The step-time table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dat_ds.cli.main import main
from tests.integration import tiny_run


def test_the_table_compares_the_step_with_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.bench.step_time._MAX_DRIFT", 100.0)  # a busy machine may drift
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    output = tmp_path / "numbers.json"
    command = ["bench", "attack", "--deepspeed_config", str(config), "--repetitions", "5"]
    assert main([*command, "--output", str(output)]) == 0
    table = capsys.readouterr().out
    for part in ("engine step", "input gradients", "training step", "(2K+3) forwards"):
        assert part in table
    numbers = json.loads(output.read_text())
    assert all(len(values) == 5 for values in numbers["seconds"].values())
    assert numbers["over_parts"] > 0.5


def test_few_repetitions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    command = ["bench", "attack", "--deepspeed_config", str(config), "--repetitions", "4"]
    assert main(command) == 2
    assert "at least 5" in capsys.readouterr().err


def test_the_trust_ratio_table_has_a_row_for_every_way_to_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_run.config(tmp_path / "run")
    values["dat"]["optimizer"] = {"name": "lars", "preset": "paper"}
    del values["optimizer"]
    config = tiny_run.write(tmp_path / "c.json", values)
    output = tmp_path / "numbers.json"
    command = ["bench", "trust-ratios", "--deepspeed_config", str(config)]
    assert main([*command, "--output", str(output)]) == 0
    assert "| 3, sub-groups, offload |" in capsys.readouterr().out
    rows = json.loads(output.read_text())["shardings"]
    assert len(rows) == 12
    for row in rows.values():
        assert row["ratios"] <= 1e-6
        assert row["weights"] <= 1e-4


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "adamw"}, "write dat.optimizer.name, one of lamb, lars"),
        ({"name": "lamb"}, "remove bf16, fp16 or torch_autocast"),
    ],
)
def test_trust_ratios_need_a_layer_wise_optimizer_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: dict[str, str], message: str
) -> None:
    values = tiny_run.config(tmp_path / "run")
    values["dat"]["optimizer"] = section
    values["bf16"] = {"enabled": section["name"] == "lamb"}
    del values["optimizer"]
    config = tiny_run.write(tmp_path / "c.json", values)
    assert main(["bench", "trust-ratios", "--deepspeed_config", str(config)]) == 2
    assert message in capsys.readouterr().err
