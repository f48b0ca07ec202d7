"""PGD within several norm balls (Tramer and Boneh, NeurIPS 2019, arXiv 1904.13000).

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dat_ds.attacks.ascent import inner_target, worst_of
from dat_ds.attacks.attack import IteratedAttack
from dat_ds.attacks.door import admitted
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import InnerLoss, ascent_loss
from dat_ds.attacks.modes import ModelMode
from dat_ds.attacks.noise import Generator, fresh_generator
from dat_ds.attacks.pgd import pgd
from dat_ds.attacks.threat import NORMS, ThreatModel
from dat_ds.length import Length, OfEps, parse_length
from dat_ds.method import Trait, option, step_length

Combine = Literal["worst", "average"]


def multi_norm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    steps: int = 10,
    step_size: float | str | None = None,
    other_norms: Mapping[str, float],
    combine: Combine = "worst",
    loss: str | InnerLoss = "ce",
    random_start: bool = True,
    generator: Generator | None = None,
    model_mode: ModelMode = "eval",
    gradient: InputGradient | None = None,
) -> Tensor:
    """:func:`pgd` within several norm balls (Tramer and Boneh, NeurIPS 2019, sec. 2).

    Cost: that of one :func:`pgd` per norm, plus one forward per norm for ``"worst"``.

    Args:
        model: Pixels ``(B, C, H, W)`` to logits ``(B, K)``, as in :func:`pgd`.
        x: Original images ``(B, C, H, W)``, as in :func:`pgd`.
        y: Labels ``(B,)`` or probabilities ``(B, K)``, as in :func:`pgd`.
        threat: First ball.
        steps: Gradient steps in each ball.
        step_size: Length of a step in the first ball; other balls take the same share of their eps.
        other_norms: Radius in pixel units of each further ball, by norm.
        combine: ``"worst"`` keeps each sample's worst image over the balls (max strategy),
            ``"average"`` returns all of them, ball after ball (average strategy).
        loss: Name or callable, as in :func:`pgd`.
        random_start: As in :func:`pgd`.
        generator: As in :func:`pgd`.
        model_mode: As in :func:`pgd`.
        gradient: As in :func:`pgd`.

    Returns:
        ``x_adv`` as in :func:`pgd`; of shape ``((1 + len(other_norms)) * B, C, H, W)`` for
        ``"average"``.

    Raises:
        ValueError: For an unknown norm or way to combine.
    """
    if combine not in ("worst", "average"):
        raise ValueError(f"combine={combine!r} is not one of worst, average.")
    inner = ascent_loss(loss)
    take_gradient = InputGradient() if gradient is None else gradient
    step = float(threat.step(step_size, MultiNorm.step_share))
    share = step / threat.eps if threat.eps else 0.0
    threats = [threat, *(threat_like(threat, norm, eps) for norm, eps in other_norms.items())]
    source = fresh_generator(x.device) if generator is None and random_start else generator
    with admitted(model, x, y, threat=threat, loss=loss, model_mode=model_mode) as (model, x, y):
        y = inner_target(model, x, y, loss)

        def run_in(ball: ThreatModel) -> Callable[[], Tensor]:
            return lambda: pgd(
                model,
                x,
                y,
                threat=ball,
                steps=steps,
                step_size=share * ball.eps,
                loss=inner,
                random_start=random_start,
                generator=source,
                gradient=take_gradient,
                model_mode=model_mode,
            )

        runs = [run_in(ball) for ball in threats]
        if combine == "average" or len(x) == 0:
            return torch.cat([run() for run in runs])
        return worst_of(model, runs, y, loss)


def threat_like(threat: ThreatModel, norm: str, eps: float) -> ThreatModel:
    """A ball of another norm and radius within the same pixel range."""
    return replace(threat, norm=norm, eps=eps)  # type: ignore[arg-type]  # checked by ThreatModel


@dataclass(frozen=True, kw_only=True)
class MultiNorm(IteratedAttack):
    """PGD in several norm balls; trains on each image's worst, or on all of them."""

    name: ClassVar[str] = "multi_norm"
    function = staticmethod(multi_norm)
    cost: ClassVar[str] = "`2KN F` for N balls, `+ N F` for `worst`"
    paper: ClassVar[str] = "Tramer and Boneh, NeurIPS 2019, arXiv 1904.13000, sec. 2"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.HAS_NO_STRONGER})
    card: ClassVar[str] = """\
```json
"threat_model": {"norm": "linf", "eps": "8/255"},
"attack": {"name": "multi_norm", "other_norms": {"l2": 0.5, "l1": 12}, "combine": "worst"}
```

Trains on each image's worst ball (`worst`) or on all of them (`average`, an update of N images per
image). Steps in the other balls take the same share of their `eps`. Evaluate each norm apart; each
is weaker than training for it alone.
"""

    step_size: Length | OfEps | None = step_length()
    """Length of a step. Default: ``eps/4``."""
    random_start: bool = True
    """Start at a random point of the ball."""
    loss: str | None = None
    """Inner loss to maximise. Default: the objective's, where it fits; else ``ce``."""
    other_norms: dict[str, Any] = option({}, "an object such as {'l2': 0.5, 'l1': 12}")
    """Radius of each further ball by norm, such as ``{"l2": 0.5, "l1": 12}``."""
    combine: Combine = option(
        "worst",
        traits={
            Trait.LOOKS_AT_CLASSES: lambda v: v == "worst",
            Trait.COPIES_IMAGES: lambda v: v == "average",
        },
    )
    """Train on each image's worst ball, or on all of them."""

    def facts(self, path: str) -> Iterator[tuple[Trait, str]]:
        """Its name stands beside the default way to combine."""
        for trait, words in super().facts(path):
            is_default = words == f"{path}.combine='worst'"
            yield trait, self.chosen_at(path) if is_default else words

    def problems(self) -> Iterator[str]:
        """No further norm, or a radius that is none."""
        yield from super().problems()
        if not self.other_norms:
            yield f"other_norms={self.other_norms!r} names no further norm: {_EXAMPLE}."
        for norm, eps in self.other_norms.items():
            if norm not in NORMS:
                continue  # said with the run's own norm
            try:
                ThreatModel(norm, parse_length(eps))  # type: ignore[arg-type]
            except ValueError as error:
                yield f"other_norms.{norm}={eps!r}: {error}"

    def norm_problems(self, norm: str) -> Iterator[str]:
        """A further norm that is none, or the run's own."""
        others = ", ".join(n for n in NORMS if n != norm)
        for other, eps in self.other_norms.items():
            if other not in NORMS or other == norm:
                yield f"other_norms.{other}={eps!r}: the further norms are {others}; {_EXAMPLE}."

    @property
    def num_views(self) -> int:
        """Adversarial images per original: one for each ball that is averaged over."""
        return 1 + len(self.other_norms) if self.combine == "average" else 1

    def own_options(self) -> dict[str, Any]:
        """With radii as numbers."""
        radii = {norm: parse_length(eps) for norm, eps in self.other_norms.items()}
        return super().own_options() | {"other_norms": radii}

    def _scheduled(self, progress: float, eps_scale: float) -> dict[str, Any]:
        radii = {norm: parse_length(eps) * eps_scale for norm, eps in self.other_norms.items()}
        return super()._scheduled(progress, eps_scale) | {"other_norms": radii}


_EXAMPLE = "write such as {'l2': 0.5, 'l1': 12}"
