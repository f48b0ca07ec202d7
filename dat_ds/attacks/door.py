"""The way into an attack: what it is given is checked, and the model opened.

Shapes: ``B`` images; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

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
        ModelError: For outputs that are no logits, and an image that the model cannot take.
    """
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


def check_result(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """What an attack of the user's own returned, detached; waits for the device.

    Args:
        x_adv: Its adversarial images.
        x: The originals ``(B, C, H, W)``.
        threat: What it was allowed.

    Raises:
        ConfigError: If they are not images inside the threat model.
    """
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        found = tuple(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
        raise ConfigError(f"Your attack returned {found} for images of shape {tuple(x.shape)}.")
    x_adv = as_images(x_adv)
    if not len(x):
        return x_adv
    slack = _BALL_SLACK * (threat.upper - threat.lower)
    lengths = threat.distance(x_adv.double(), x.double())
    inside = lengths <= threat.eps * (1 + _BALL_SLACK) + slack  # false for NaN
    if not bool(inside.all()):
        row = int((~inside).int().argmax())
        raise ConfigError(
            f"Your attack left the ball: image {row} of the batch lies {float(lengths[row]):.6g} "
            f"from its original in {threat.norm}, with eps={threat.eps:.6g}. End it with "
            "threat.project(x_adv, x)."
        )
    check_images(x_adv, threat.lower, threat.upper, _BALL_SLACK)
    return x_adv
