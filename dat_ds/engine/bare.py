"""DeepSpeed's module by itself, called as its engine calls it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from dat_ds.attacks import AttackGraphs, attack_mode
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.modes import ModelMode
from dat_ds.casting import LayerCasts, refuse_mixed_dtypes
from dat_ds.config import RunConfig, precision_of
from dat_ds.contracts import Gate, named_forward_errors
from dat_ds.engine import hooks
from dat_ds.minmax import fill_up
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_ADVICE = {
    dtype: f'write "torch_autocast": {{"enabled": true, "dtype": "{name}"}} in the place of "{key}"'
    for dtype, name, key in (
        (torch.bfloat16, "bfloat16", "bf16"),
        (torch.float16, "float16", "fp16"),
    )
}
"""What runs a model as it is, whose operations mix float32 with 16-bit weights."""


class BareModel:
    """The module of a DeepSpeed engine, for passes that train nothing.

    They never enter DeepSpeed's forward, so they trigger no gradient hook, no reduction and no loss
    scale. In every precision the module gets float32 pixels; with 16-bit weights its layers cast
    (see :mod:`dat_ds.casting`), in DeepSpeed's forward as well, until :meth:`close`.

    Args:
        engine: DeepSpeed's engine.
        run: The run.
        device: Where the module runs.
        gate: Reads its outputs.

    Attributes:
        module: Pixels in [0, 1] to logits.
        compiled: Model that the training attack calls: the module, compiled if so configured.
        keeps_parameters: Whether ZeRO-3 parameters stay on the device once gathered.
        overflows: Whether it computes in float16.
    """

    def __init__(
        self, engine: DeepSpeedEngine, run: RunConfig, device: torch.device, gate: Gate
    ) -> None:
        self.module: nn.Module = engine.module
        self._engine, self._device = engine, device
        self._gate = gate
        precision = precision_of(run.deepspeed)
        self._autocasts = precision == "autocast"
        # Before anything is compiled, which the casts belong to.
        self._casts = LayerCasts(self.module)
        channels_last = run.dat.engine.channels_last
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        budget = run.dat.engine.resident_parameters_gib * 2**30
        self.keeps_parameters = run.zero_stage == 3 and hooks.gathered_bytes(engine) <= budget
        self.overflows = precision == "fp16" or (
            self._autocasts and engine.torch_autocast_dtype() == torch.float16
        )
        if run.dat.engine.compile == "all":
            engine.compile()
        attacks_compiled = run.dat.engine.compile == "attack"
        self.compiled: Model = torch.compile(self.module) if attacks_compiled else self.module

    def close(self) -> None:
        """Leave nothing on the module."""
        self._casts.remove()

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a forward leaves ZeRO-3 parameters gathered, where memory allows it."""
        if self.keeps_parameters:
            return hooks.resident_parameters(self._engine)
        return contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The autocast that DeepSpeed's forward applies."""
        if not self._autocasts:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._engine.torch_autocast_dtype())

    @contextlib.contextmanager
    def opened(
        self, model_mode: ModelMode = "eval", called: Model | None = None
    ) -> Iterator[Model]:
        """The module as an attack or an evaluation may use it; no trace is left.

        Args:
            model_mode: Mode of its modules; parameters are frozen.
            called: Stands in for the module's own call.
        """
        called = self.module if called is None else called
        try:
            with (
                self.resident(),
                attack_mode(self.module, model_mode),
                self.autocast(),
                hooks.untimed(self._engine),
            ):
                yield _FrozenModel(self.module, called, self.forward, model_mode == "train")
        except BaseException:
            # A forward that broke off leaves ZeRO-3 parameters gathered, and marked as in use.
            hooks.release_parameters(self._engine)
            raise

    def forward(self, model: Model, x: Tensor, *, training: bool) -> Tensor:
        """Outputs of ``model`` for ``x`` ``(B, C, H, W)``, which it gets in float32.

        Raises:
            ConfigError: If an operation of the model's own takes 16-bit weights with float32.
            ModelError: For images that the model cannot take, and outputs that are not what the
                objective compares.
        """
        x = x.to(torch.float32, memory_format=self._layout)
        filled = fill_up(x, self.module) if training else x
        with named_forward_errors(filled):
            try:
                outputs = model(filled)
            except RuntimeError as error:
                refuse_mixed_dtypes(self.module, error, _ADVICE)
                raise
        found = self._gate.outputs(outputs, len(filled))
        return found if filled is x else found[: len(x)]

    @torch.no_grad()
    def outputs_of(self, model: Model, x: Tensor) -> Tensor:
        """Outputs of another model in evaluation mode, called as the module is."""
        with self.autocast():
            return self.forward(model, x, training=False)


@dataclass(frozen=True)
class _FrozenModel:
    """The model that :meth:`BareModel.opened` yields, called as the engine calls the module."""

    module: nn.Module
    called: Model
    forward: Callable[..., Tensor]
    training: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(self.called, x, training=self.training)


def graphs_of(run: RunConfig, module: nn.Module, ranks: Ranks) -> AttackGraphs | None:
    """The cache of CUDA graphs of attacks; None where they are off or there is no CUDA device."""
    if not run.dat.engine.cuda_graphs:
        return None
    if ranks.device.type == "cuda":
        return AttackGraphs(module, warns=ranks.is_main)
    if ranks.is_main:
        logger.warning("dat.engine.cuda_graphs=true does nothing without a CUDA device.")
    return None
