"""The blocks of the tutorials run as they stand, on less data and fewer steps."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.docs.pages import DOCS, blocks

TINY_CNN = '"name": "resnet18", "options": {"channels": [8, 8, 8, 8]}'
# What is replaced on a page so that it takes seconds. Each of these has to be on it.
SMALLER: dict[str, dict[str, str]] = {
    "tutorials/attack_notebook": {"[::5]": "[::30]", "seconds=5": "seconds=0.1"},
    "tutorials/image_folder": {
        "digits = load_digits()": "digits = load_digits(n_class=2)",
        "zip(digits.images, digits.target)": "zip(digits.images[:100], digits.target[:100])",
        '"epochs": 6, "warmup_epochs": 1': '"max_steps": 2',
        '"name": "resnet18"': TINY_CNN,
        "standard --num_examples 32": "apgd-ce-2 square-9 --num_examples 2 --no_checks",
        " --report": "",
    },
    "tutorials/finetune_timm": {
        "pretrained=True)\ntorch.save": "pretrained=False, depth=2)\ntorch.save",
        '"pretrained": "vit_tiny.pth",': '"pretrained": "vit_tiny.pth", "depth": 2,',
        '"path": "photos",': '"path": "photos", "validation_fraction": 0.05,',
        '"epochs": 10, "warmup_epochs": 1': '"max_steps": 1',
        '"train_micro_batch_size_per_gpu": 32': '"train_micro_batch_size_per_gpu": 2',
        '"ema": {"decay": 0.999}': '"ema": {"decay": 0.9}, "evaluation": {"num_examples": 2}',
        "standard --num_examples 16": "apgd-ce-2 --num_examples 1 --no_checks",
    },
    "howto/own_methods": {
        '"count": 64': '"count": 16',
        '"epochs": 2': '"max_steps": 2',
        '"pgd-20"': '"pgd-2"',
        "apgd-ce-20 --num_examples 32": "apgd-ce-2 --num_examples 4",
    },
    "tutorials/hf_trainer": {
        "digits = load_digits()": "digits = load_digits(n_class=2)",
        "num_train_epochs=20": "max_steps=2",
        "num_labels=10": "num_labels=2",
        '"num_examples": 100': '"num_examples": 4',
        "standard --num_examples 32": "apgd-ce-2 --num_examples 4 --no_checks",
    },
}
# Pages of one process, in order. Transformers' Trainer has one for itself: it looks at the
# process group that a run before it has left.
PROCESSES = [
    [name for name in SMALLER if name != "tutorials/hf_trainer"],
    ["tutorials/hf_trainer"],
]
_SHELL = re.compile(r"cat > (\S+) <<'EOT'\n(.*?)^EOT\n|^([^\n]+)\n", re.DOTALL | re.MULTILINE)


def run_shell(text: str) -> None:
    """Carry out a block: files that it writes, and ``dat-ds`` in this process."""
    from dat_ds.cli.main import main

    for file, content, line in _SHELL.findall(text):
        words = shlex.split(line, comments=True)
        if file:
            Path(file).write_text(content, encoding="utf-8")
        elif words[:1] == ["dat-ds"]:
            with contextlib.redirect_stderr(io.StringIO()) as told:
                code = main(words[1:])
            assert code == 0, f"{line}: exit code {code}. {told.getvalue()}"
        else:
            assert words[:2] == ["pip", "install"], f"{line}: not a command that this test runs"


def run_page(name: str) -> str:
    """Run a page's blocks; the traceback of the one that fails, or nothing."""
    page = DOCS / f"{name}.md"
    names: dict[str, Any] = {"__name__": "page"}
    todo = dict(SMALLER[name])
    try:
        for language, block in blocks(page, "python", "bash"):
            text = block
            for old, new in SMALLER[name].items():
                if old in text:
                    todo.pop(old, None)
                    text = text.replace(old, new)
            if language == "bash":
                run_shell(text)
            else:
                exec(compile(text, str(page), "exec"), names)
    except BaseException:
        return traceback.format_exc()
    return f"not on the page: {list(todo)}" if todo else ""


def run_pages(names: list[str]) -> dict[str, str]:
    os.chdir(tempfile.mkdtemp())
    return {name: run_page(name) for name in names}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    found: dict[str, str] = {}
    for names in PROCESSES:
        found |= run_ranks(run_pages, 1, names)[0]
    return found


@pytest.mark.parametrize("name", SMALLER)
def test_the_blocks_of_a_page_run(outcomes, name):
    assert not outcomes[name], outcomes[name]


def test_every_tutorial_is_run():
    pages = {f"tutorials/{path.stem}" for path in (DOCS / "tutorials").glob("*.md")}
    assert pages <= set(SMALLER)
