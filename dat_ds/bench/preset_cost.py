"""What a preset takes on GPUs: memory of each, and hours, before anything is trained.

Memory is :mod:`dat_ds.bench.memory`'s prediction. Hours are counted operations over an assumed
speed: those of the preset's own model, run without elements, times the passes that its attack is
counted to make and that its objective asks for, times its images and epochs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dat_ds.attacks import Attack, SampleGenerator
from dat_ds.bench.memory.predict import StepMemory
from dat_ds.bench.memory.trace import Operations
from dat_ds.config import RunConfig, attack_of, load_config, precision_of, resolve_batch
from dat_ds.errors import ConfigError
from dat_ds.method import did_you_mean
from dat_ds.presets import PRESETS, read_preset, with_data

UTILISATION = 0.2
"""Share of a GPU's peak that training is assumed to reach. NVIDIA's DeepLearningExamples trains
ResNet-50 v1.5 on 2470 images/s of an A100 in mixed precision, which is 0.19 of it, and on 938 in
TF32, which is 0.15."""

TRAINING_IMAGES: Mapping[str, int] = {"cifar10": 50_000, "imagefolder": 1_281_167}
"""Images of the data that presets are written for, by ``dat.data.name``: ``imagefolder`` stands for
ImageNet-1k."""


@dataclass(frozen=True)
class Gpu:
    """Peak operations per second of a GPU, without sparsity, from NVIDIA's data sheets.

    Attributes:
        half: In bfloat16 and float16.
        tf32: In TF32, in which cuDNN takes float32 convolutions unless told otherwise.
        single: In float32, in which torch takes float32 matrix products unless told otherwise.
    """

    half: float
    tf32: float
    single: float

    def seconds(self, operations: Operations, *, in_half: bool) -> float:
        """Time at the peak."""
        if in_half:
            return operations.total / self.half
        return operations.convolutions / self.tf32 + operations.products / self.single


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(312e12, 156e12, 19.5e12),
    "h100": Gpu(989e12, 494e12, 67e12),
}
"""A100 and H100, both as SXM."""


@dataclass(frozen=True)
class Cost:
    """What a preset takes.

    Attributes:
        gpus: GPUs at which the global batch is one micro-batch each.
        micro_batch: Images of each in a step.
        memory_gib: Predicted peak of each.
        operations: Of the whole training, in floating-point operations.
        gpu_hours: At the assumed speed.
        notes: What the prediction of memory leaves out.
    """

    gpus: int
    micro_batch: int
    memory_gib: float
    operations: float
    gpu_hours: float
    notes: Sequence[str]


def cost_of(name: str, gpu: str = "a100", utilisation: float = UTILISATION) -> Cost:
    """Memory and hours of a preset.

    Args:
        name: Of the preset.
        gpu: One of :data:`GPUS`.
        utilisation: Share of its peak that training reaches, in (0, 1].

    Raises:
        ConfigError: For another preset, GPU or share.
    """
    if gpu not in GPUS:
        raise ConfigError(
            f"--gpu {gpu}: its speed is not known{did_you_mean(gpu, GPUS)}. Valid: "
            f"{', '.join(GPUS)}."
        )
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation:g}: write a number in (0, 1], such as 0.2.")
    values = read_preset(name)
    run = load_config(_with_its_shapes(values))
    memory = StepMemory(run, "cuda")
    batch = values["train_batch_size"]
    micro_batch = values.get("train_micro_batch_size_per_gpu", batch)
    gpus = batch // micro_batch
    assert resolve_batch(run.deepspeed, gpus) == (micro_batch, 1)
    attack, update = operations_of_an_image(run, memory)
    images = images_of_training(values)
    in_half = precision_of(run.deepspeed) != "float32"
    attack_in_half = in_half or run.dat.attack.precision is not None
    seconds = GPUS[gpu].seconds(attack, in_half=attack_in_half)
    seconds += GPUS[gpu].seconds(update, in_half=in_half)
    return Cost(
        gpus=gpus,
        micro_batch=micro_batch,
        memory_gib=memory.prediction(gpus).ledger.peak() / 2**30,
        operations=images * (attack + update).total,
        gpu_hours=images * seconds / utilisation / 3600,
        notes=memory.notes,
    )


def cost_table(
    names: Sequence[str] | None = None, gpu: str = "a100", utilisation: float = UTILISATION
) -> str:
    """Costs as a table of plain text, and what they assume.

    Args:
        names: Presets; None for all.
        gpu: As for :func:`cost_of`.
        utilisation: As for :func:`cost_of`.

    Raises:
        ConfigError: As :func:`cost_of`.
    """
    costs = {name: cost_of(name, gpu, utilisation) for name in names or PRESETS}
    rows = [("preset", "GPUs x images", "GiB per GPU", "EFLOP", "GPU-hours", "hours")]
    for name, cost in costs.items():
        rows.append(
            (
                name,
                f"{cost.gpus} x {cost.micro_batch}",
                f"{cost.memory_gib:.1f}",
                f"{cost.operations / 1e18:.3g}",
                _short(cost.gpu_hours),
                _short(cost.gpu_hours / cost.gpus),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    left_out: dict[str, list[str]] = {}
    for name, cost in costs.items():
        for note in cost.notes:
            left_out.setdefault(note, []).append(name)
    peaks = GPUS[gpu]
    lines += [
        "",
        "Computed, not measured: no GPU run has confirmed these numbers.",
        f"Hours: counted operations at {utilisation:g} of the peak of one {gpu.upper()} "
        f"({peaks.half / 1e12:g} TFLOP/s in 16 bits; in float32 {peaks.tf32 / 1e12:g} for "
        f"convolutions, by TF32, and {peaks.single / 1e12:g} for matrix products); 'hours' without "
        "communication, loading and validation.",
        "GiB: peak of what torch allocates, at these GPUs and images; docs/memory.md.",
        *(f"{note} Of: {', '.join(users)}." for note, users in left_out.items()),
    ]
    return "\n".join(lines)


def operations_of_an_image(run: RunConfig, memory: StepMemory) -> tuple[Operations, Operations]:
    """Operations for each training image: of the attack, and of the update with all else.

    Args:
        run: The run.
        memory: Its model, traced.
    """
    objective, model = run.dat.objective, memory.model
    forward, update = model.forward_operations(), model.update_operations()
    attack = attack_of(run.dat, objective)
    attacked = Operations(0, 0)
    if attack is not None:
        forwards, gradients = passes_of(attack)
        backward = model.attack_operations() + forward * -1
        attacked = (forward * forwards + backward * gradients) * objective.num_views
    images = memory.outer_images(micro_batch=64) / 64
    perturbation = run.dat.weight_perturbation
    perturbed = 1 - perturbation.start if perturbation.name != "none" else 0.0
    outer = update * (images * (1 + perturbed))
    reference = forward * (objective.num_views * objective.needs_reference)
    return attacked, outer + reference


def passes_of(attack: Attack) -> tuple[float, float]:
    """Forwards and input gradients that an attack takes for each image, counted as it runs.

    Args:
        attack: With its threat model.
    """
    images, classes = 4, 10
    model = _Counting(classes)
    x = torch.full((images, 3, 8, 8), 0.5)
    y = torch.arange(images)
    target: Tensor = y if attack.inner_loss is None else torch.zeros(images, dtype=torch.int64)
    if getattr(attack, "loss", None) == "feature_distance":
        target = torch.zeros(images, classes)
    attack(model, x, target, SampleGenerator(0, 0))
    return model.forwards / images, model.gradients / images


def images_of_training(values: Mapping[str, Any]) -> float:
    """Images that a preset trains on, each as often as it is seen.

    Args:
        values: Of the preset.
    """
    dat = values["dat"]
    kept = 1 - dat["data"].get("validation_fraction", 0.1)
    images = dat["schedule"]["epochs"] * kept * TRAINING_IMAGES[dat["data"]["name"]]
    steps = dat["schedule"].get("max_steps") or math.inf
    return float(min(images, steps * values["train_batch_size"]))


def _with_its_shapes(values: Mapping[str, Any]) -> dict[str, Any]:
    """A preset with a few images made up, of the size and the classes that it is written for."""
    changed = copy.deepcopy(with_data(values, "synthetic"))
    dat = changed["dat"]
    side, classes = dat["model"]["img_size"], dat["model"].get("num_classes") or 10
    dat["data"] |= {"image_shape": [3, side, side], "num_classes": classes}
    dat["data"] |= {"num_train": 2, "num_test": 2, "validation_fraction": 0}
    if dat["objective"]["name"] == "fare":  # asks for weights; their values do not matter here
        dat["model"]["pretrained"] = "weights"
    return changed


def _short(hours: float) -> str:
    return f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"


class _Counting(nn.Module):
    """A linear classifier that counts the images that pass it, forward and backward."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, classes)
        self.forwards = self.gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, K)`` of images ``(B, 3, 8, 8)``."""
        outputs: Tensor = _Tally.apply(self.linear(x.flatten(1)), self)
        return outputs


class _Tally(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, model: _Counting) -> Tensor:
        ctx.model = model
        model.forwards += len(outputs)
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.model.gradients += len(gradient)
        return gradient, None
