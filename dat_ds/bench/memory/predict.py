"""Predicted peak memory of a run's ranks, before anything is trained, beside what is measured."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dat_ds.assembly import build_data_of, build_model_of
from dat_ds.bench.memory.measure import measure_memory
from dat_ds.bench.memory.moments import Ledger, Setting, memory_of
from dat_ds.bench.memory.report import describe
from dat_ds.bench.memory.state import optimizer_bytes
from dat_ds.bench.memory.trace import Passes, Precisions, TracedModel
from dat_ds.bench.records import write_record
from dat_ds.config import RunConfig, adapt_to_device, attack_of, precision_of, resolve_batch
from dat_ds.config.deepspeed.precision import FLOAT16
from dat_ds.errors import ConfigError

OUTSIDE_GIB = 1.0
"""Of a GPU, left for what torch's allocator does not know of: CUDA's context, NCCL's buffers."""

_COPIES = 4  # of a batch of images: natural, adversarial, and two on the way
_MOST_IMAGES = 2**16


@dataclass(frozen=True)
class Prediction:
    """Memory of a rank.

    Attributes:
        ranks: Number of them.
        micro_batch: Images of a rank in a micro-step.
        ledger: Bytes by moment and term.
        largest: The largest micro-batch that fits; 0 for none; None where no limit was given.
    """

    ranks: int
    micro_batch: int
    ledger: Ledger
    largest: int | None = None


def bench_memory(
    run: RunConfig,
    *,
    ranks: Sequence[int] | None = None,
    gpu_gib: float | None = None,
    measure: bool = False,
    output: str | None = None,
) -> str:
    """Predict peak memory of each rank by moment of a step, and measure it if asked to.

    Args:
        run: Gives model, attack, optimizer, ZeRO stage and batch; its data the image size.
        ranks: Numbers of ranks to predict; default those of the launcher, or 1.
        gpu_gib: Memory of a GPU. Predicts for GPUs, and says whether the run fits.
        measure: Train two optimizer steps on the launcher's ranks, or on CPU processes.
        output: JSON file for the numbers.

    Returns:
        Markdown; empty on other ranks than 0.

    Raises:
        ConfigError: For what cannot be predicted or measured, all at once.
        ModelError: For a model that cannot be traced.
    """
    launched = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    counts = [launched or 1] if not ranks else list(ranks)
    _check(counts, gpu_gib, measure, launched, on_cuda)
    device_type = "cuda" if gpu_gib is not None or on_cuda else "cpu"
    memory = StepMemory(run, device_type)
    predicted = [memory.prediction(count, gpu_gib) for count in counts]
    measured = measure_memory(run, counts[0]) if measure else []
    if launched is not None and os.environ["RANK"] != "0":
        return ""
    values = {
        "bench": "memory",
        "device": device_type,
        "num_parameters": memory.num_parameters,
        "predicted": [dataclasses.asdict(each) for each in predicted],
        "measured": measured,
        "notes": memory.notes,
        "gpu_gib": gpu_gib,
        "outside_gib": OUTSIDE_GIB,
        "config": run.to_dict(),
    }
    write_record(output, values, torch.device(device_type if on_cuda else "cpu"))
    return describe(values)


def _check(
    counts: Sequence[int],
    gpu_gib: float | None,
    measure: bool,
    launched: int | None,
    on_cuda: bool,
) -> None:
    problems = [f"--ranks {n}: give at least 1." for n in counts if n < 1]
    if gpu_gib is not None and not (math.isfinite(gpu_gib) and gpu_gib > OUTSIDE_GIB):
        problems.append(f"--gpu_gib {gpu_gib:g}: give more than {OUTSIDE_GIB:g}.")
    if measure and len(counts) > 1:
        problems.append(f"--measure with --ranks {' '.join(map(str, counts))}: give one number.")
    if measure and launched is not None and counts != [launched]:
        problems.append(
            f"--measure --ranks {counts[0]} under a launcher of {launched} ranks: leave --ranks "
            "out."
        )
    if measure and launched is None and on_cuda:
        problems.append(
            "--measure on GPUs needs their launcher: deepspeed --no_python dat-ds bench memory; "
            "DS_ACCELERATOR=cpu measures CPU ranks."
        )
    if measure and gpu_gib is not None and not on_cuda:
        problems.append(
            "--measure with --gpu_gib, but there is no GPU here: leave one of them out."
        )
    if problems:
        raise ConfigError("\n".join(problems))


class StepMemory:
    """Memory of a run's steps on a kind of device, for any number of ranks and any batch.

    Args:
        run: The run.
        device_type: ``"cpu"`` or ``"cuda"``.

    Attributes:
        notes: What of the run the prediction does not know of, as sentences.
    """

    def __init__(self, run: RunConfig, device_type: str) -> None:
        self._run = adapt_to_device(run, device_type)
        self._on_cpu = device_type == "cpu"
        offload = _section(run, "offload_optimizer")
        self._optimizer = optimizer_bytes(self._run, "cpu" if offload else device_type)
        splits = build_data_of(run)
        self._shape = splits.image_shape
        precision = precision_of(run.deepspeed)
        name = (run.deepspeed.get("torch_autocast") or {}).get("dtype")
        cast = torch.float16 if name in FLOAT16 else torch.bfloat16
        self._model = TracedModel(
            build_model_of(run, splits, on_meta=True),
            self._shape,
            Precisions(
                dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32),
                autocast=cast if precision == "autocast" else None,
                attack=run.dat.attack.precision,
                attack_mode=run.dat.attack.model_mode,
                device_type=device_type,
            ),
        )
        self._width = 2 if precision in ("bf16", "fp16") else 4
        self.notes = _notes(run)

    @property
    def model(self) -> TracedModel:
        """The model, on tensors without elements."""
        return self._model

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(self._model.trainable) + sum(self._model.frozen)

    def prediction(self, ranks: int, gpu_gib: float | None = None) -> Prediction:
        """Memory with so many ranks; the largest micro-batch for a GPU's memory, if that is given.

        Raises:
            ConfigError: If the run's batch sizes do not go together with so many ranks.
        """
        micro_batch, accumulation = resolve_batch(self._run.deepspeed, ranks)
        setting = self.setting(ranks, accumulation)
        ledger = self.ledger(setting, micro_batch)
        largest = None
        if gpu_gib is not None:
            largest = self._largest(setting, micro_batch, (gpu_gib - OUTSIDE_GIB) * 2**30)
        return Prediction(ranks, micro_batch, ledger, largest)

    def setting(self, ranks: int, accumulation: int) -> Setting:
        """What memory depends on but for the batch."""
        run, zero = self._run, self._run.deepspeed["zero_optimization"]
        gradients = (run.deepspeed.get("data_types") or {}).get("grad_accum_dtype")
        return Setting(
            trainable=tuple(self._model.trainable),
            frozen=sum(self._model.frozen),
            buffer_bytes=self._model.buffer_bytes,
            stage=run.zero_stage,
            ranks=ranks,
            width=self._width,
            gradient_width=4 if gradients in ("fp32", "float32") else self._width,
            optimizer=self._optimizer,
            accumulation=accumulation,
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            overlaps=bool(zero.get("overlap_comm")),
            resident_bytes=run.dat.engine.resident_parameters_gib * 2**30,
            offloads_optimizer=bool(_section(run, "offload_optimizer")),
            offloads_parameters=bool(_section(run, "offload_param")),
            averages=run.dat.ema.decay > 0,
            perturbs=run.dat.weight_perturbation.name != "none",
            has_reference=run.dat.objective.needs_reference,
            on_cpu=self._on_cpu,
        )

    def ledger(self, setting: Setting, micro_batch: int) -> Ledger:
        """Bytes by moment and term."""
        attack, update = self.passes(micro_batch)
        return memory_of(setting, attack, update, self._image_bytes(micro_batch))

    def outer_images(self, micro_batch: int) -> int:
        """Images of the outer forward."""
        objective, attack = self._run.dat.objective, self._attack
        images = micro_batch * objective.num_views
        views = 1 if attack is None else attack.num_views
        kinds = [
            views,
            objective.needs_natural_logits,
            views * objective.needs_helper_logits,
            views * objective.needs_start_logits,
            objective.grad_align > 0,
        ]
        count = images * sum(map(int, kinds))
        return max(count, 2) if self._model.has_batch_norm else count

    # ---- internals

    def _attacked_images(self, micro_batch: int) -> int:
        """Images that are attacked as one batch; 0 in natural training."""
        if self._attack is None:
            return 0
        group = self._run.dat.engine.attack_micro_batches
        return micro_batch * self._run.dat.objective.num_views * group

    @property
    def _attack(self) -> Any:
        return attack_of(self._run.dat, self._run.dat.objective)

    def _image_bytes(self, micro_batch: int) -> int:
        images = max(self._attacked_images(micro_batch), self.outer_images(micro_batch))
        return _COPIES * images * 4 * math.prod(self._shape)

    def _largest(self, setting: Setting, micro_batch: int, limit: float) -> int:
        """The largest micro-batch whose peak on the device is within ``limit`` bytes.

        Activations are linear in the images: two batches tell those of any other.
        """
        once, double = self.passes(micro_batch), self.passes(2 * micro_batch)

        def fits(images: int) -> bool:
            share = images / micro_batch - 1
            attack = None
            if once[0] is not None and double[0] is not None:
                attack = once[0].between(double[0], share)
            update = once[1].between(double[1], share)
            ledger = memory_of(setting, attack, update, self._image_bytes(images))
            return ledger.peak() <= limit

        low, high = 0, 1
        while high <= _MOST_IMAGES and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def passes(self, micro_batch: int) -> tuple[Passes | None, Passes]:
        """Those of the attack (None in natural training) and of the update."""
        attacked = self._attacked_images(micro_batch)
        attack = self._model.attack(attacked) if attacked else None
        return attack, self._model.update(self.outer_images(micro_batch))


def _section(run: RunConfig, name: str) -> Mapping[str, Any]:
    """A section of offload; empty where it is off."""
    section = run.deepspeed["zero_optimization"].get(name) or {}
    return {} if section.get("device", "none") == "none" else section


def _notes(run: RunConfig) -> list[str]:
    """What of a run the prediction does not know of."""
    zero, dat = run.deepspeed["zero_optimization"], run.dat
    unknown = {
        f"dat.compression.name={dat.compression.name!r} (its pieces and errors)": (
            dat.compression.name != "none"
        ),
        f"dat.engine.compile={dat.engine.compile!r} (which fuses operations)": (
            dat.engine.compile != "none"
        ),
        "dat.engine.cuda_graphs=true (which reserves the attack's activations)": (
            dat.engine.cuda_graphs
        ),
        "dat.objective.helper_model": getattr(dat.objective, "helper_model", None) is not None,
        f"dat.attack.precision={dat.attack.precision!r} (counted as the model's, or bfloat16)": (
            dat.attack.precision in ("auto", "int8", "fp8")
        ),
        "zero_optimization.contiguous_gradients=false": not zero.get("contiguous_gradients", True),
        "communication_data_type": bool(run.deepspeed.get("communication_data_type")),
        "offload to NVMe (counted as to the host)": any(
            _section(run, name).get("device") == "nvme"
            for name in ("offload_optimizer", "offload_param")
        ),
    }
    unknown |= {
        f"zero_optimization.{key}": bool(zero.get(key)) and zero.get(key) != 1
        for key in (
            "zenflow",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_gradients",
        )
    }
    return [f"Not in the prediction: {name}." for name, is_there in unknown.items() if is_there]
