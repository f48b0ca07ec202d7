"""A picture of test images, their perturbation, and what the model says of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.attacks.named import run_attack, stream_of
from dat_ds.config import parse_evaluation_attack
from dat_ds.evaluation.curves import name_of

_RIGHT, _WRONG = "#0072B2", "#D55E00"  # told apart by colour-blind readers; a cross says it in grey


@torch.no_grad()
def draw_examples(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    attack: str,
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Attack each model on the same images and draw what happens, one block of rows per model.

    Args:
        models: Name to model, pixels to logits; a single one needs no name.
        x: Images ``(B, C, H, W)`` with 1 or 3 channels, pixels in [0, 1].
        y: Labels ``(B,)``.
        threat: Allowed perturbations.
        attack: Evaluation attack, such as ``"pgd-20"``.
        path: PNG file to write.
        class_names: Names of the classes, from 0 on; numbers for those without.
        seed: Seed of the random starts.

    Returns:
        For each model, the classes predicted ``before`` and ``after`` the attack, and ``labels``.
    """
    chosen = parse_evaluation_attack(attack)
    rows, columns = 3 * len(models), len(x)
    figure = Figure(figsize=(1.25 * columns + 1.2, 1.45 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)

    labels = y.tolist()
    predicted: dict[str, dict[str, Any]] = {}
    for block, (model_name, model) in enumerate(models.items()):
        x_adv = run_attack(model, x, y, threat, chosen, stream_of(chosen, seed))
        before, after = model(x).argmax(1).tolist(), model(x_adv).argmax(1).tolist()
        predicted[model_name] = {"labels": labels, "before": before, "after": after}
        delta = x_adv - x
        scale = float(delta.abs().max().clamp_min(1e-12))
        pictures = (x, 0.5 + delta / (2 * scale), x_adv)
        kinds = ("image", f"perturbation\nx {0.5 / scale:.1f}", f"under {attack}")
        for offset, (images, word) in enumerate(zip(pictures, kinds, strict=True)):
            row = axes[3 * block + offset]
            for column in range(columns):
                _show(row[column], images[column])
                if offset != 1:
                    found = (before if offset == 0 else after)[column]
                    right = found == labels[column]
                    name, true = (name_of(k, class_names) for k in (found, labels[column]))
                    words = name if right else f"\u2717 {name}\nis {true}"
                    row[column].set_title(
                        words.replace("$", r"\$"),  # or a formula begins
                        color=_RIGHT if right else _WRONG,
                        fontsize=9,
                    )
            label = f"{model_name}\n{word}".strip().replace("$", r"\$")
            row[0].set_ylabel(label, fontsize=8)
    figure.suptitle(
        "Above each image: the predicted class; where it is wrong, a cross and the true class.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    return predicted


def of_several_classes(labels: Tensor, count: int) -> list[int]:
    """Indices of images of as many classes as there are: the first of each, then the second ones.

    Args:
        labels: Classes ``(N,)``.
        count: How many, at most.

    Returns:
        Ascending indices.
    """
    seen: Counter[int] = Counter()
    rounds = []
    for index, label in enumerate(labels.tolist()):
        rounds.append((seen[label], index))
        seen[label] += 1
    return sorted(index for _, index in sorted(rounds)[:count])


def _show(axis: Axes, image: Tensor) -> None:
    pixels = image.cpu().clamp(0, 1).permute(1, 2, 0)
    shown = pixels[..., 0] if pixels.shape[-1] != 3 else pixels
    axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
