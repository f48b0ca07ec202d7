"""Every recipe answers ``--help`` at once and says what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))
DEFINES_MODULES = {"networks", "hf_clip_fare"}  # these are, or use, torch's own classes
USES_TRANSFORMERS = {"hf_image_classification"}  # as scripts of its users do, from the top
ASK = """
import contextlib, io, json, runpy, sys
found = {}
for recipe in sys.argv[1:]:
    sys.argv = [recipe, "--help"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        try:
            runpy.run_path(recipe, run_name="__main__")
            code = None
        except SystemExit as end:
            code = end.code or 0
    heavy = {"torch", "timm", "deepspeed", "transformers"} & set(sys.modules)
    found[recipe] = [code, told.getvalue(), sorted(heavy)]
print(json.dumps(found))
"""
MAKE_MISTAKES = """
import contextlib, io, json, os, runpy, sys
def leave(code):
    raise SystemExit(code)
os._exit = leave
found = []
for words in json.loads(sys.argv[1]):
    sys.argv = words
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            found.append([end.code, told.getvalue()])
print(json.dumps(found))
"""

MISTAKES = {
    "attack_independently": (["nowhere"], "Cannot read the run config 'nowhere/config.json'"),
    "bench_speedup": (["--ranks", "0", "--output", "out"], "--ranks 0: give at least 1"),
    "check_convergence": (["--output", "no/x.json"], "--output no/x.json: there is no folder"),
    "compare_fast_training": (["typo"], "'typo' is not valid. Write one of 'pgd', 'n_fgsm'"),
    "compare_methods": (["typo"], "'typo' is not valid. Write one of 'pgd', 'fgsm'"),
    "compare_speedups": (["--output", "no/x.json"], "--output no/x.json: there is no folder"),
    "compare_attacks": (["nowhere"], "Cannot read the run config 'nowhere/config.json'"),
    "hf_clip_fare": (["--images", "nowhere"], "--images nowhere: no image in a"),
    "hf_digits": (["--epochs", "-1"], "--epochs -1: give a number above 0"),
    "hf_image_classification": (["--data", "photos"], "--model and --data go together"),
    "pretrain_finetune": (["rotation", "--labelled", "2"], "--labelled 2.0: give a fraction"),
    "reproduce": (["mnist_cnn", "--data", "digits", "--seeds", "0"], "--seeds 0: give at least 1"),
    "time_to_robustness": (["--leaderboard", "no.json"], "No entry at 'no.json'"),
}


def answers(recipes: list[Path]) -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, text and heavy packages loaded, of ``--help`` for each; one process for all."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, recipes)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str, list[str]]] = json.loads(done.stdout)
    return found


def says_what_it_does(recipe: str, code: int, told: str) -> bool:
    """Whether the answer to ``--help`` holds the first line of the recipe's own text."""
    summary = Path(recipe).read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    return code == 0 and summary in told


def test_every_recipe_answers_help_at_once_and_says_what_it_does() -> None:
    light = [r for r in RECIPES if r.stem not in DEFINES_MODULES | USES_TRANSFORMERS]
    for recipe, (code, told, heavy) in answers(light).items():
        assert says_what_it_does(recipe, code, told), recipe
        assert "usage:" in told, recipe
        assert not heavy, f"{recipe} imports {heavy} before it has read its arguments"


def test_the_others_load_torch_but_no_training_framework() -> None:
    others = [recipe for recipe in RECIPES if recipe.stem in DEFINES_MODULES]
    assert len(others) == len(DEFINES_MODULES)
    for recipe, (code, told, heavy) in answers(others).items():
        assert says_what_it_does(recipe, code, told), recipe
        assert not {"deepspeed", "transformers"} & set(heavy), recipe


def test_a_mistake_is_a_message_before_anything_is_trained(tmp_path: Path) -> None:
    folder = RECIPES[0].parent
    asked = [[str(folder / f"{name}.py"), *words] for name, (words, _) in MISTAKES.items()]
    done = subprocess.run(
        [sys.executable, "-c", MAKE_MISTAKES, json.dumps(asked)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (code, told), (name, (_, message)) in zip(
        json.loads(done.stdout), MISTAKES.items(), strict=True
    ):
        assert code == 2, name
        assert f"error: {message}" in told, name
    assert not list(tmp_path.iterdir())
    of_commands = {"train_cnn", "train_vit"}  # dat-ds train by another name
    assert set(MISTAKES) | of_commands | {"networks"} == {recipe.stem for recipe in RECIPES}


def test_a_whole_script_for_transformers_says_what_it_does() -> None:
    scripts = [recipe for recipe in RECIPES if recipe.stem in USES_TRANSFORMERS]
    assert len(scripts) == len(USES_TRANSFORMERS)
    for recipe, (code, told, _) in answers(scripts).items():
        assert says_what_it_does(recipe, code, told), recipe
