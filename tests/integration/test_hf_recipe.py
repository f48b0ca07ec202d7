"""The example of a whole script for Hugging Face's Trainer, on digits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.settings import without_launcher

ROOT = Path(__file__).parents[2]


def test_the_recipe_saves_the_best_model_and_a_card(tmp_path: Path) -> None:
    output = tmp_path / "run"
    recipe = ROOT / "recipes" / "hf_image_classification.py"
    done = subprocess.run(
        [sys.executable, recipe, "--epochs", "0.1", "--output", output],
        env={**without_launcher(), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "its transform is random" not in done.stderr
    best = Path(done.stdout.split("Best: ")[1].splitlines()[0])
    saved, expected = load_file(output / "model.safetensors"), load_file(best / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "attack `pgd` (steps 3, step_size 1/16)" in card
    assert "robust accuracy, pgd-10 (l-infinity, eps 2/16)" in card
