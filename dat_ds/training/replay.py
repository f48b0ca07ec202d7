"""Repeating a step that a run has kept, to see where the first number is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dat_ds.assembly import build_data_of, build_model_of
from dat_ds.checkpoints import CHECKPOINTS, name_of_step
from dat_ds.config import RunConfig, load_config
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.build import initialize
from dat_ds.engine.random_state import restore_random_state
from dat_ds.engine.reproducer import Reproducer, holds_weights, read_reproducer
from dat_ds.engine.safe_loading import read_file
from dat_ds.engine.unaveraged import unaveraged_weights
from dat_ds.errors import CheckpointError, ConfigError
from dat_ds.models import load
from dat_ds.training.guard import stronger_attack

_PRECISION_KEYS = ("bf16", "bfloat16", "fp16", "torch_autocast", "data_types")
_NAMED = 8
_OF_THE_STEP, _OF_THE_RUN = "at the start of the step", "at the start of the run"


@dataclass(frozen=True)
class Replay:
    """A step done again.

    Attributes:
        fault: What the run has kept.
        weights: Which weights were used, in words.
        differs: What is known to differ from the run's step, in sentences.
        loss: Mean loss of the micro-batches.
        metrics: The engine's, such as ``attack_zero_share`` and ``robust_acc``.
        first: Where the first number was not finite, in words; None where all were finite.
        samples: Dataset indices of the images whose outputs were not finite.
    """

    fault: Reproducer
    weights: str
    differs: Sequence[str]
    loss: float
    metrics: Mapping[str, Any]
    first: str | None
    samples: Sequence[int]

    def in_words(self) -> str:
        """What a reader wants to know, in lines."""
        fault, metrics = self.fault, self.metrics
        what = f"the loss was {fault.value}" if fault.value else f"a {fault.kind} was not finite"
        attack = [
            f"{name} {metrics[key]:.4g}"
            for name, key in (
                ("robust accuracy", "robust_acc"),
                ("share of zero input-gradient entries", "attack_zero_share"),
                ("share of samples with a non-finite input gradient", "attack_nonfinite_share"),
            )
            if metrics.get(key) is not None
        ]
        lines = [
            f"Step {fault.step}, rank {fault.rank} of {fault.ranks}: {what}.",
            f"Weights: {self.weights}.",
            *(f"Differs from the run: {sentence}" for sentence in self.differs),
            f"Loss: {self.loss:.9g}",
            f"Attack: {', '.join(attack) or 'none'}",
        ]
        if self.first is None:
            return "\n".join([*lines, "Every number was finite: the fault was not repeated."])
        named = ", ".join(map(str, self.samples[:_NAMED]))
        more = ", ..." if len(self.samples) > _NAMED else ""
        of_samples = f"{named}{more}" if self.samples else "none by itself"
        return "\n".join([*lines, f"First not finite: {self.first}", f"Samples: {of_samples}"])


def replay(path: Path, imports: Sequence[str] = ()) -> Replay:
    """Repeat a step on this process alone: the same batch, seeds and attack, without an update.

    With the weights at the start of the step, and a model without operations whose result depends
    on the machine, the images and losses are those of the run, to rounding.

    Args:
        path: A file that a run has kept in ``faults/step-...``, or its folder where it holds one.
        imports: Modules whose methods the run's config may name.

    Raises:
        UserError: If the file cannot be repeated.
    """
    file = _file_of(path.resolve())
    fault = read_reproducer(file)
    if not fault.batches:
        raise CheckpointError(
            f"{file} holds no batch, which was larger than dat.numerics.reproducer_gib, or could "
            f"not be read again. Its samples: {list(fault.samples)[:_NAMED]}."
        )
    run = _alone(fault, imports)
    model, weights = _model(file, fault, run)
    engine, *_ = initialize(model=model, config=run)
    try:
        return _repeat(engine, fault, weights)
    finally:
        engine.close()


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("rank-*.pt"))
    if len(files) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{path}: name one of the files of ranks in it: {listed}.")
    return files[0]


def _alone(fault: Reproducer, imports: Sequence[str]) -> RunConfig:
    """The run's config for one process that changes no weight."""
    values: dict[str, Any] = {k: v for k, v in fault.config.items() if k in _PRECISION_KEYS}
    if "fp16" in values:
        power = round(math.log2(max(1.0, fault.loss_scale)))
        values["fp16"] = {**values["fp16"], "initial_scale_power": power}
    dat = dict(fault.config["dat"])
    for section in ("optimizer", "compression", "ema", "guard", "output_dir"):
        dat.pop(section, None)
    dat["schedule"] = {"name": "constant", "max_steps": fault.total_steps}
    dat["engine"] = {**dat["engine"], "compile": "none", "cuda_graphs": False}
    dat["logging"] = {"trackers": []}
    values |= {
        "train_micro_batch_size_per_gpu": fault.micro_batch,
        "gradient_accumulation_steps": len(fault.batches),
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-30}},
        "zero_optimization": {"stage": 0},
        "dat": dat,
    }
    run = load_config(values, imports=imports)
    if run.dat.objective.needs_reference:
        raise ConfigError(
            f"dat.objective.name={run.dat.objective.name!r} compares with the model as it was at "
            "the start of the run, which a kept step does not hold: it cannot be replayed."
        )
    return run


def _model(file: Path, fault: Reproducer, run: RunConfig) -> tuple[nn.Module, str]:
    """The model with the weights that come closest to those of the step, and which these are."""
    if holds_weights(file.parent):
        model = load(file.parent)
        _load(model, fault.buffers or {}, file)
        return model.train(), _OF_THE_STEP
    if fault.checkpoint is not None:
        checkpoint = file.parents[2] / CHECKPOINTS / fault.checkpoint
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{file} was kept without weights, and the newest checkpoint before the step, "
                f"{checkpoint}, is gone."
            )
        model = load(checkpoint)
        _load(model, unaveraged_weights(checkpoint), checkpoint)
        _load(model, read_file(checkpoint / f"rank-{fault.rank}.pt")["buffers"], checkpoint)
        return model.train(), f"of checkpoint {checkpoint.name}"
    return build_model_of(run, build_data_of(run)), _OF_THE_RUN


def _load(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Put tensors into a model.

    Raises:
        CheckpointError: If they are of another one.
    """
    try:
        missing = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{source} is of another model: {error}") from None
    if missing.unexpected_keys:
        raise CheckpointError(
            f"{source} is of another model, which has {', '.join(missing.unexpected_keys)}."
        )


def _repeat(engine: AdversarialEngine, fault: Reproducer, weights: str) -> Replay:
    if fault.stronger_steps:
        engine.use_attack(stronger_attack(engine))
    engine.inner.precision = fault.attack_precision  # type: ignore[assignment]
    engine.deepspeed.global_steps = fault.step - 1
    engine.deepspeed.micro_steps = (fault.step - 1) * len(fault.batches)
    if fault.random_state is not None:
        restore_random_state(fault.random_state, engine.ranks.device)
    probe = _Probe(engine.module)
    probe.check_weights()
    with probe.watching():
        loss = engine.train_step(fault.batches)
    found = engine.finite.first()
    first = probe.first
    if first is None and found is not None:
        first = "the loss" if found.kind == "loss" else "the gradient, scaled"
    return Replay(
        fault,
        weights,
        list(_differences(fault, weights)),
        float(loss),
        engine.metrics,
        first,
        () if found is None or probe.is_weight else found.samples,
    )


def _differences(fault: Reproducer, weights: str) -> Iterator[str]:
    before = name_of_step(fault.step - 1)
    exact = (_OF_THE_STEP, _OF_THE_RUN if fault.step == 1 else f"of checkpoint {before}")
    if weights not in exact:
        yield f"weights had changed since, up to step {fault.step}, and were not kept."
    if fault.random_state is None:
        yield "the random state of dropout was not kept."
    if fault.carries:
        yield "its attack went on with perturbations of earlier steps, which were not kept."
    if fault.ranks > 1:
        yield "BatchNorm, contrastive losses and perturbed weights see this rank's images alone."


class _Probe:
    """Finds the first number of a step that is not finite.

    Attributes:
        first: Where, in words; None where all were finite so far.
        is_weight: Whether it was a weight.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.first: str | None = None
        self.is_weight = False

    def check_weights(self) -> None:
        """Look at parameters and buffers."""
        for name, tensor in self._module.state_dict().items():
            if not bool(tensor.isfinite().all()):
                self._found(f"the weights, {name}, before the step")
                self.is_weight = True
                return

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, look at what every module is given and puts out, and at gradients."""
        with ExitStack() as stack:
            handle = self._module.register_forward_pre_hook(self._see_images, prepend=True)
            stack.callback(handle.remove)
            for name, module in self._module.named_modules():
                handle = module.register_forward_hook(self._see_output(name or "the model"))
                stack.callback(handle.remove)
            for name, parameter in self._module.named_parameters():
                if parameter.requires_grad:
                    handle = parameter.register_hook(self._see_gradient(name))  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            yield

    def _see_images(self, _module: nn.Module, given: tuple[Any, ...]) -> None:
        if self.first is None and not _is_finite(given):
            self._found(f"the images, in {self._phase()}")

    def _see_output(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, _given: Any, output: Any) -> None:
            if self.first is None and not _is_finite(output):
                kind = type(module).__name__
                self._found(f"the output of {name} ({kind}), in {self._phase()}")

        return see

    def _see_gradient(self, name: str) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            if self.first is None and not _is_finite(gradient):
                self._found(f"the gradient of {name}")

        return see

    def _phase(self) -> str:
        """The attack freezes parameters."""
        trains = any(p.requires_grad for p in self._module.parameters())
        return "the update's forward" if trains else "a forward of the attack"

    def _found(self, words: str) -> None:
        if self.first is None:
            self.first = words


def _is_finite(value: Any) -> bool:
    """Whether all tensors in it are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, (tuple, list)) else True
