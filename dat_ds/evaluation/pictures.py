"""A picture of test images, their perturbation, and what the model says of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dat_ds.attacks import ThreatModel
from dat_ds.attacks.named import run_attack, stream_of
from dat_ds.config import parse_evaluation_attack


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
) -> None:
    """Attack each model on the same images and draw what happens, one block of rows per model.

    Args:
        models: Name to model, pixels to logits.
        x: Images ``(B, C, H, W)`` with 1 or 3 channels, pixels in [0, 1].
        y: Labels ``(B,)``.
        threat: Allowed perturbations.
        attack: Evaluation attack, such as ``"pgd-20"``.
        path: PNG file to write.
        class_names: Names of the classes, from 0 on; numbers for those without.
        seed: Seed of the random starts.
    """
    chosen = parse_evaluation_attack(attack)
    rows, columns = 3 * len(models), len(x)
    figure = Figure(figsize=(1.25 * columns + 1.2, 1.45 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)

    names = class_names or ()

    def name_of(index: int) -> str:
        return names[index] if index < len(names) else str(index)

    for block, (model_name, model) in enumerate(models.items()):
        x_adv = run_attack(model, x, y, threat, chosen, stream_of(chosen, seed))
        before, after = model(x).argmax(1).tolist(), model(x_adv).argmax(1).tolist()
        delta = x_adv - x
        scale = float(delta.abs().max().clamp_min(1e-12))
        pictures = (x, 0.5 + delta / (2 * scale), x_adv)
        labels = ("image", f"perturbation\nx {0.5 / scale:.1f}", f"under {attack}")
        for offset, (images, label) in enumerate(zip(pictures, labels, strict=True)):
            row = axes[3 * block + offset]
            for column in range(columns):
                _show(row[column], images[column])
                if offset != 1:
                    predicted = (before if offset == 0 else after)[column]
                    right = predicted == int(y[column])
                    row[column].set_title(
                        name_of(predicted), color="tab:green" if right else "tab:red", fontsize=9
                    )
            row[0].set_ylabel(f"{model_name}\n{label}", fontsize=8)
    figure.suptitle("Green: classified correctly. Red: not.", fontsize=9)
    figure.savefig(path, dpi=110)


def _show(axis: Axes, image: Tensor) -> None:
    pixels = image.cpu().clamp(0, 1).permute(1, 2, 0)
    shown = pixels[..., 0] if pixels.shape[-1] != 3 else pixels
    axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
