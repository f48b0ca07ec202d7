"""The guided single-step attack of GAT and NuAT: away from the clean image's outputs as a whole.

Sriramanan et al., NeurIPS 2020, arXiv 2011.14969 (GAT); Sriramanan et al., "Towards Efficient and
Effective Adversarial Training", NeurIPS 2021 (NuAT).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dat_ds.attacks.ascent import step_
from dat_ds.attacks.attack import Attack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, resolve_inner_loss
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator, fresh_generator, rand_like
from dat_ds.attacks.threat import StepSize, ThreatModel
from dat_ds.length import Length, OfEps
from dat_ds.method import at_least, step_length

Guide = Literal["l2", "nuclear"]


def guided(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    step_size: StepSize | None = None,
    noise_scale: float = 0.5,
    guide: Guide = "l2",
    guide_weight: float = 10.0,
    loss: str | InnerLoss = "ce",
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """One step up ``loss + guide_weight * guide`` from Bernoulli noise.

    The guide is the distance of the outputs from those of the clean image: ``"l2"``, of each
    sample ``||p(x') - p(x)||_2^2`` with ``p`` the softmax (GAT), or ``"nuclear"``, of the batch
    ``||f(x') - f(x)||_*``, the nuclear norm of the ``(B, K)`` matrix of logits (NuAT). Releases of
    both leave it out in every other batch; here it is there in every one.

    Cost: two forwards and one input-gradient backward.

    Args:
        model: As in :func:`dat_ds.attacks.pgd`, and so are ``x``, ``y``, ``generator``,
            ``model_mode`` and ``gradient``.
        x: Images, float32.
        y: Labels as the loss takes them.
        threat: l-infinity only.
        step_size: Length of the step. None: eps.
        noise_scale: Magnitude of the noise, which is it or its negative, in units of eps.
        guide: Which distance.
        guide_weight: Its weight.
        loss: What is maximised beside it.
        generator: Source of the noise.
        model_mode: Mode of the model's modules.
        gradient: How input gradients are taken and counted.

    Returns:
        ``x_adv``, detached float32, inside the threat model.

    Raises:
        ValueError: For another norm than l-infinity, or an unknown guide.
    """
    if threat.norm != "linf":
        raise ValueError(f"guided is defined for norm 'linf', not {threat.norm!r}: use 'pgd'.")
    if guide not in ("l2", "nuclear"):
        raise ValueError(f"guide={guide!r} is not one of l2, nuclear.")
    inner = resolve_inner_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    source = fresh_generator(x.device) if generator is None else generator
    with admitted(model, x, y, threat=threat, loss=loss, model_mode=model_mode) as (model, x, y):
        if len(x) == 0:
            return x.clone()
        sign = rand_like(x, source).sub_(0.5).sign_()
        noisy = (x + noise_scale * threat.eps * sign).clamp_(threat.lower, threat.upper)
        with torch.no_grad():
            clean = model(x).double()

        def guided_loss(logits: Tensor, labels: Tensor) -> Tensor:
            return inner(logits, labels) + guide_weight * distance(logits, clean, guide)

        direction = threat.steepest(take_gradient(model, noisy, y, guided_loss))
    size = threat.step(step_size, Guided.step_share)
    return threat.projector(x)(step_(noisy, direction, size))


def distance(logits: Tensor, clean: Tensor, guide: Guide) -> Tensor:
    """The guide, per sample ``(B,)``; of ``"nuclear"`` each sample's share of the batch's norm."""
    if guide == "l2":
        return (logits.softmax(1) - clean.softmax(1)).square().sum(1)
    norm: Tensor = torch.linalg.svdvals(logits - clean).sum()
    return (norm / len(logits)).expand(len(logits))


@dataclass(frozen=True, kw_only=True)
class Guided(Attack):
    """One step away from the clean image's outputs and from its class, from Bernoulli noise."""

    name: ClassVar[str] = "guided"
    function = staticmethod(guided)
    cost: ClassVar[str] = "`3 F`"
    paper: ClassVar[str] = "Sriramanan et al., NeurIPS 2020, arXiv 2011.14969; NuAT: NeurIPS 2021"
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    always_random: ClassVar[bool] = True
    step_share: ClassVar[float] = 1.0
    card: ClassVar[str] = """\
    x_adv = project(x_0 + eps * sign(grad [CE(f(x_0), y) + guide_weight * guide(f(x_0), f(x))]))
    x_0 = x +- eps / 2;  l2: ||p(x_0) - p(x)||^2;  nuclear: ||f(x_0) - f(x)||_* of the batch

The attack of the objectives `gat` (guide `l2`) and `nuat` (guide `nuclear`). The authors' releases
leave the guide out in every other batch and raise its weight along the run; here it is constant.
`nuclear` depends on the batch: its weight is for the micro-batch of a rank.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of the step. Default: eps."""
    noise_scale: float = at_least(0, 0.5)
    """Magnitude of the noise in units of eps."""
    guide: Guide = "l2"
    """Distance from the clean outputs that is maximised beside the loss."""
    guide_weight: float = at_least(0, 10.0)
    """Weight of that distance."""
    loss: str | None = None
    """Loss that is maximised together with that distance. Default: ``ce``."""
    losses: ClassVar[tuple[str, ...]] = ("ce", "cw", "dlr")
