"""What the page on troubleshooting prints for typical mistakes is what they really print."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import shlex
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from dat_ds.errors import NumericsError, UserError
from tests.distributed.harness import allow_fp16, run_ranks
from tests.docs.pages import DOCS

PAGE = DOCS / "howto" / "troubleshooting.md"
HEADING = "## Typical mistakes, error by error"
_MISTAKE = re.compile(
    r"^### (.+?)\n.*?^```(json|python|bash)\n(.*?)^```\n+```text\n(.*?)^```", re.M | re.S
)
_PROGRAM = "dat-ds: error: "
ZOO = """
from torch import nn

softmax = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)).eval()
dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
"""


def section() -> str:
    return PAGE.read_text(encoding="utf-8").split(f"{HEADING}\n")[1].split("\n## ")[0]


def base() -> dict[str, Any]:
    """``run.json`` as it stands on the page."""
    found = re.search(r"^```json\n(.*?)^```", section(), re.M | re.S)
    assert found
    values: dict[str, Any] = json.loads(found[1])
    return values


def mistakes() -> dict[str, tuple[str, str, str]]:
    """Language, block and printed text by title."""
    return {title: tuple(rest) for title, *rest in _MISTAKE.findall(section())}  # type: ignore[misc]


def merged(below: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(below)
    for key, value in top.items():
        under = result.get(key)
        is_object = isinstance(value, dict) and isinstance(under, dict)
        result[key] = merged(under, value) if is_object and key != "data" else value
    return result


def image(path: str, *, count: int = 12) -> None:
    for number in range(count):
        file = Path(path) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 20, 30)).save(file)


def prepare() -> None:
    """The files of the mistakes, in the current folder."""
    for part in ("train", "val"):
        image(f"flat/{part}")
        image(f"one/{part}/cat")
        for name in ("cat", "dog"):
            image(f"order/{part}/" + (name if part == "train" else f"{name}s"))
    torch.save(nn.Linear(3, 3).state_dict(), "weights.pt")
    Path("notes.txt").write_text("no folder", encoding="utf-8")
    Path("zoo.py").write_text(ZOO, encoding="utf-8")
    Path("run.json").write_text(json.dumps(base()), encoding="utf-8")


def by_config(text: str) -> str:
    from dat_ds.config import load_config

    return "\n".join(load_config(merged(base(), json.loads(text))).notes)


def by_python(text: str) -> str:
    from dat_ds.attacks import ThreatModel, pgd

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    x = torch.linspace(0, 1, 4 * 192).view(4, 3, 8, 8)
    y = torch.tensor([0, 1, 2, 3])
    threat = ThreatModel("linf", "8/255")
    names = {"model": model, "x": x, "y": y, "threat": threat, "pgd": pgd, "torch": torch}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(compile(text, str(PAGE), "exec"), names)
    return told.getvalue()


def by_shell(text: str) -> str:
    """The commands' error or, where there is none, the doubts about the last one's result."""
    from dat_ds.cli.main import main

    out, error = io.StringIO(), io.StringIO()
    for line in text.splitlines():
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = main(shlex.split(line)[1:])
            except SystemExit as end:
                code = int(str(end.code))
    if code:
        return error.getvalue().split(_PROGRAM)[-1]
    topic = text.split("zoo:")[1].split()[0]
    wanted = {"softmax": "probabilities", "dropout": "training_mode"}[topic]
    doubts = [line for line in out.getvalue().splitlines() if line.startswith("Doubtful, ")]
    return "\n".join(line for line in doubts if line.startswith(f"Doubtful, {wanted}"))


@contextlib.contextmanager
def lacking(name: str) -> Iterator[None]:
    """A device that lacks what some have; ``name`` is the function that asks for it."""
    from dat_ds.engine import hooks

    supports = getattr(hooks, name)
    setattr(hooks, name, lambda: False)
    try:
        yield
    finally:
        setattr(hooks, name, supports)


def without_fp16(text: str) -> str:
    with lacking("supports_fp16"):
        return by_shell(text)


def without_bf16(text: str) -> str:
    from dat_ds.config import load_config
    from dat_ds.engine.validate import check_precision

    with lacking("supports_bf16"):
        check_precision(nn.Linear(2, 2), load_config(merged(base(), json.loads(text))))
    return ""


def overflow(text: str) -> str:
    """float16 on a CPU that is told to accept it, with gradients that overflow."""
    from tests.distributed.test_numerics import overflowing

    allow_fp16()
    with tempfile.TemporaryDirectory() as folder:
        fp16 = json.loads(text)["fp16"]
        message = str(overflowing(Path(folder), 0, fp16)["message"])
    return message.replace(folder, "runs/a")


def too_few(text: str) -> str:
    """As rank 0 of 8."""
    from dat_ds.data import DistributedLoader

    names: dict[str, Any] = {"DistributedLoader": DistributedLoader, "images": [(0, 0)] * 6}
    exec(compile(text, str(PAGE), "exec"), names)
    return ""


RUNNERS = {"json": by_config, "python": by_python, "bash": by_shell}
SPECIAL: dict[str, Callable[[str], str]] = {
    "bf16 on a GPU that has none": without_bf16,
    "float16 on a CPU": without_fp16,
    "float16 overflows": overflow,
    "Fewer samples than ranks": too_few,
}


def print_all() -> dict[str, str]:
    """What each mistake prints, in one process: the training ones leave a process group behind."""
    os.chdir(tempfile.mkdtemp())
    prepare()
    found = {}
    for title, (language, text, _) in mistakes().items():
        try:
            found[title] = SPECIAL.get(title, RUNNERS[language])(text)
        except (UserError, NumericsError, ValueError) as error:
            found[title] = str(error)
        except BaseException:
            found[title] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return run_ranks(print_all, 1)[0]


@pytest.mark.parametrize("title", mistakes())
def test_a_mistake_prints_what_the_page_says(printed, title):
    assert printed[title].strip() == mistakes()[title][2].strip()
    assert "Traceback" not in printed[title]


def test_there_are_twenty_mistakes_and_all_of_the_section_is_checked():
    assert len(mistakes()) >= 20
    assert len(mistakes()) == section().count("\n### ") == section().count("\n```text\n")
    assert set(SPECIAL) <= set(mistakes())
