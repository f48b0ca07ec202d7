"""The way into an attack: what it is given is checked, and the model opened.

Shapes: ``B`` images; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from dat_ds.attacks.ascent import REFERENCE_LOSSES
from dat_ds.attacks.gradient import Model
from dat_ds.attacks.losses import FEATURE_LOSSES, InnerLoss
from dat_ds.attacks.modes import ModelMode, attack_mode
from dat_ds.attacks.threat import ThreatModel
from dat_ds.contracts import Gate, GatedModel, as_images, check_images
from dat_ds.errors import ConfigError

_checked: ContextVar[bool] = ContextVar("checked", default=False)
_BALL_SLACK = 1e-5  # of eps and of the pixel range: float32's rounding


@contextlib.contextmanager
def already_checked() -> Iterator[None]:
    """Inside, attacks take images, labels and the model as they are: whoever calls checks them.

    Without it an attack waits for the device once, to look at its images.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


@contextlib.contextmanager
def admitted(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    loss: str | InnerLoss,
    model_mode: ModelMode,
    reads_labels: bool = False,
) -> Iterator[tuple[Model, Tensor, Tensor]]:
    """The model, images and labels of an attack, in :func:`dat_ds.attacks.attack_mode`.

    Args:
        model: Pixels to outputs.
        x: Images ``(B, C, H, W)``.
        y: Labels, or what the loss compares.
        threat: Its pixel range.
        loss: Inner loss.
        model_mode: Mode of the model's modules.
        reads_labels: Whether the attack reads labels though its loss does not.

    Yields:
        The model with its outputs read; ``x`` in float32 (float64 where it is), detached; ``y`` as
        class indices or probabilities, or as it is for a loss that compares something else.

    Raises:
        DataError: For images out of the pixel range, and labels that are none.
        ModelError: For outputs that are not logits, and an image that the model cannot take.
        ConfigError: For a threat model that is none.
    """
    if not isinstance(threat, ThreatModel):
        raise ConfigError(
            f"threat={threat!r} is not a threat model: write ThreatModel('linf', '8/255')."
        )
    if _checked.get():
        with attack_mode(model, model_mode):
            yield model, x.detach(), y
        return
    is_own = callable(loss) or loss in FEATURE_LOSSES
    gate = Gate("own" if is_own else "classes")
    with already_checked(), attack_mode(model, model_mode):
        x = as_images(x, model)
        check_images(x, threat.lower, threat.upper)
        if reads_labels or loss not in REFERENCE_LOSSES:
            y = gate.settled(y, len(x))
        yield GatedModel(model, gate), x, y


def check_result(
    x_adv: Tensor, x: Tensor, threat: ThreatModel, *, by: str = "Your attack", views: int = 1
) -> Tensor:
    """What an attack of the user's own returned, detached; waits for the device.

    Args:
        x_adv: Its adversarial images.
        x: The originals ``(B, C, H, W)``.
        threat: What it was allowed.
        by: Who returned them, for messages.
        views: Adversarial images per original, those of one view after the other.

    Raises:
        ConfigError: If they are not images inside the threat model, with the first that is not,
            its distance, and what to do.
    """
    wanted = (views * len(x), *x.shape[1:])
    if not isinstance(x_adv, Tensor) or x_adv.shape != wanted or not x_adv.is_floating_point():
        found = type(x_adv).__name__
        if isinstance(x_adv, Tensor):
            found = f"{x_adv.dtype} of shape {tuple(x_adv.shape)}"
        raise ConfigError(
            f"{by} returned {found} for images of shape {tuple(x.shape)}: return adversarial "
            f"images, floating point, of shape {wanted}."
        )
    x_adv = as_images(x_adv)
    if not len(x):
        return x_adv
    span = threat.upper - threat.lower
    low, high = (bound.double() for bound in x_adv.flatten(1).aminmax(dim=1))  # NaN for NaN
    excess = torch.maximum(threat.lower - low, high - threat.upper)
    distance = threat.distance(x_adv.double(), x.double().repeat(views, *[1] * (x.ndim - 1)))
    reach = threat.eps * (1 + _BALL_SLACK) + _BALL_SLACK * span
    right = (excess <= _BALL_SLACK * span) & (distance <= reach)  # false for NaN
    if bool(right.all()):
        return x_adv
    row = int((~right).int().argmax())
    image = f"image {row} of the batch"
    remedy = "End it with threat.project(x_adv, x) (in a class: self.ball.project)."
    if not math.isfinite(float(distance[row])):
        raise ConfigError(
            f"{by} returned NaN or infinite pixels in {image}: look for a division by zero or a "
            "logarithm of zero, such as the norm of a gradient that is zero."
        )
    if not float(distance[row]) <= reach:
        raise ConfigError(
            f"{by} left the ball: {image} lies {float(distance[row]):.6g} from its original in "
            f"{threat.norm}, with eps={threat.eps:.6g}. {remedy}"
        )
    raise ConfigError(
        f"{by} left the pixel range [{threat.lower:g}, {threat.upper:g}]: {image} spans "
        f"[{float(low[row]):.6g}, {float(high[row]):.6g}], {float(excess[row]):.6g} outside. "
        f"{remedy}"
    )
