"""What the checks of a model share: its clean outputs, input gradients and adversarial images.

Shapes: ``B`` images, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dat_ds.attacks import SampleGenerator, ThreatModel, apgd, cw_margin, pgd
from dat_ds.attacks.gradient import Model
from dat_ds.contracts.outputs import logits_of
from dat_ds.errors import ModelError

_CHUNK = 128  # images of a forward
_PASSES = 700  # forwards that the checks make for each attacked image, roughly
_FEWEST, _MOST = 16, 32  # attacked images
WHITE_BOX_STEPS = 50
NOISE = 100
"""Multiples of the weights' rounding by which the order of sums may change logits."""


@dataclass(frozen=True)
class Names:
    """Names of the classes, in order of their indices.

    Args:
        data: In the data; None where unknown.
        training: In the data that the model was trained on; None where unknown.
    """

    data: Sequence[str] | None = None
    training: Sequence[str] | None = None


class Probe:
    """A model under test with a batch of labelled images.

    Everything is computed once and on demand. Used inside
    :func:`dat_ds.attacks.attack_mode` and :func:`dat_ds.attacks.already_checked`.

    Args:
        model: Pixels to outputs of which the logits can be told.
        x: Images, float32.
        y: Classes ``(B,)`` int64.
        threat: Allowed perturbations.
        seed: Seed of all random numbers.
        names: Names of the classes.
        layers_in_training: Layers that were handed over in training mode and behave differently
            there.
        seconds: Time that the checks may take, roughly; it decides how many images are attacked.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        seed: int = 0,
        names: Names | None = None,
        layers_in_training: Sequence[str] = (),
        seconds: float = 100.0,
    ) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.names = Names() if names is None else names
        self.layers_in_training = layers_in_training
        self._seed = seed
        self._start, self._seconds = time.monotonic(), seconds

    def call(self, x: Tensor) -> Tensor:
        """Logits ``(B, K)`` in one forward, with whatever graph the model makes."""
        return logits_of(self.model(x), len(x))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits ``(B, K)`` in float64, in chunks."""
        return torch.cat([self.call(part).double() for part in torch.split(x, _CHUNK)])

    def generator(self, purpose: str) -> SampleGenerator:
        """Random numbers for one purpose."""
        return SampleGenerator(self._seed, 0, stream=f"check {purpose}")

    @property
    def seconds_left(self) -> float:
        """Time left; negative when it is over."""
        return self._seconds - (time.monotonic() - self._start)

    # ---- clean images

    @cached_property
    def clean(self) -> Tensor:
        """Logits of all images ``(B, K)``, float64."""
        return self.logits(self.x)

    @property
    def num_classes(self) -> int:
        """Classes ``K``."""
        return self.clean.shape[1]

    @cached_property
    def correct(self) -> Tensor:
        """Which images are classified correctly ``(B,)``."""
        return self.clean.argmax(dim=1) == self.y

    @cached_property
    def spread(self) -> Tensor:
        """Largest minus smallest logit of each image ``(B,)``, at least the smallest number."""
        tiny = torch.finfo(self.clean.dtype).tiny
        return (self.clean.amax(dim=1) - self.clean.amin(dim=1)).clamp_min(tiny)

    @cached_property
    def rounding(self) -> float:
        """Relative rounding of the model's coarsest weights; float32's for other callables."""
        dtypes = {torch.float32}
        if isinstance(self.model, nn.Module):
            dtypes |= {p.dtype for p in self.model.parameters() if p.dtype.is_floating_point}
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def change(self, logits: Tensor) -> Tensor:
        """Largest change of logits from those of :attr:`images`, as a share of their size ``(B,)``.

        Args:
            logits: Of all of :attr:`images`, or of the first of them, shown some other way.
        """
        before = self.shown[: len(logits)]
        size = before.abs().amax(dim=1).maximum(self.spread[self.rows[: len(logits)]])
        return (logits - before).abs().amax(dim=1) / size

    # ---- the images that are attacked

    @cached_property
    def _forward_seconds(self) -> float:
        """Processor time of the forward of one image, per thread."""
        part = self.x[:_FEWEST]
        self.logits(part)
        # Of the process: what else the machine does must not decide how much is checked.
        start = time.process_time()
        self.logits(part)
        return (time.process_time() - start) / torch.get_num_threads() / len(part)

    @cached_property
    def rows(self) -> Tensor:
        """Indices of the correctly classified images that checks attack, at most 32."""
        affordable = int(self._seconds / (_PASSES * max(self._forward_seconds, 1e-9)))
        found: Tensor = self.correct.nonzero().flatten()[: min(max(affordable, _FEWEST), _MOST)]
        return found

    @cached_property
    def images(self) -> Tensor:
        """Images of :attr:`rows`."""
        return self.x[self.rows]

    @cached_property
    def labels(self) -> Tensor:
        """Classes of :attr:`rows`."""
        return self.y[self.rows]

    @cached_property
    def shown(self) -> Tensor:
        """Logits of :attr:`images`, shown as one batch."""
        return self.logits(self.images)

    @cached_property
    def redrawn(self) -> float:
        """Largest change of the logits between forwards of the same batch; 0 without images."""
        if not len(self.rows):
            return 0.0
        return max(float(self.change(self.logits(self.images)).amax()) for _ in range(2))

    @property
    def is_random(self) -> bool:
        """Whether forwards of the same batch differ by more than the order of sums can explain."""
        return self.redrawn > NOISE * self.rounding

    def fooled(self, x: Tensor, y: Tensor) -> Tensor:
        """Which images are classified as another class than ``y`` ``(B,)``."""
        return self.logits(x).argmax(dim=1) != y

    def gradient_at(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Gradient of the margin ``max_{k != y} z_k - z_y`` at ``x``, unscaled, in float64.

        Returns:
            Like ``x``; None where the graph does not reach the pixels.
        """
        leaf = x.detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                margin = cw_margin(self.call(leaf), y)
                (gradient,) = torch.autograd.grad(margin.sum(), leaf)
        except RuntimeError:  # autograd's word for it
            return None
        found: Tensor = gradient.double()
        return found

    @cached_property
    def gradient(self) -> Tensor | None:
        """:meth:`gradient_at` of :attr:`images`."""
        return self.gradient_at(self.images, self.labels)

    def attack(
        self,
        x: Tensor,
        y: Tensor,
        purpose: str,
        *,
        steps: int,
        threat: ThreatModel | None = None,
        model: Callable[[Tensor], Tensor] | None = None,
        loss: str = "ce",
        adapts_steps: bool = False,
    ) -> Tensor:
        """Images by PGD, with steps of ``2.5 eps / steps``, or by APGD.

        Returns:
            Like ``x``; ``x`` itself where the graph does not reach the pixels.
        """
        threat = self.threat if threat is None else threat
        if len(x) == 0:
            return x
        called = self.call if model is None else model
        source = self.generator(purpose)
        try:
            if adapts_steps:
                return apgd(called, x, y, threat=threat, steps=steps, loss=loss, generator=source)
            return pgd(
                called,
                x,
                y,
                threat=threat,
                steps=steps,
                step_size=2.5 * threat.eps / steps,
                loss=loss,
                generator=source,
            )
        except (ModelError, RuntimeError):
            return x

    @cached_property
    def short_attack(self) -> tuple[Tensor, Tensor]:
        """Images by PGD of 10 steps from :attr:`images`, and which are misclassified."""
        x_adv = self.attack(self.images, self.labels, "short", steps=10)
        return x_adv, self.fooled(x_adv, self.labels)

    @cached_property
    def white_box(self) -> tuple[Tensor, Tensor]:
        """Images by the short attack and, where that fails, by PGD of 50 steps; which fool."""
        x_adv, fooled = (t.clone() for t in self.short_attack)
        left = (~fooled).nonzero().flatten()
        longer = self.attack(self.images[left], self.labels[left], "long", steps=WHITE_BOX_STEPS)
        x_adv[left] = longer
        fooled[left] = self.fooled(longer, self.labels[left])
        return x_adv, fooled

    @cached_property
    def standing(self) -> Tensor:
        """Positions within :attr:`rows` that the white-box attack does not break."""
        return (~self.white_box[1]).nonzero().flatten()
