"""Base class of the training attacks: a section of the run config that can be called.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import Self

from dat_ds.attacks.door import admitted, check_result
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.losses import FEATURE_LOSSES, INNER_LOSSES, LOSS_TRAITS, InnerLoss
from dat_ds.attacks.modes import attack_mode
from dat_ds.attacks.noise import Generator, fresh_generator
from dat_ds.attacks.passes.folding import folded_batch_norm
from dat_ds.attacks.passes.precision import Precision, fast_attention, shorter_floats
from dat_ds.attacks.passes.quantized import FORMATS
from dat_ds.attacks.passes.resolution import at_resolution
from dat_ds.attacks.passes.tokens import dropped_tokens
from dat_ds.attacks.strategy import Strategy
from dat_ds.attacks.threat import NORMS, ThreatModel
from dat_ds.length import Length, OfEps, parse_step
from dat_ds.method import (
    Method,
    Trait,
    above,
    at_least,
    did_you_mean,
    fraction,
    is_from_outside,
    name_of,
    option,
    positive_share,
)


@dataclass(frozen=True, kw_only=True)
class Attack(Method):
    """An attack of a run: its options and, where it can be called, its threat model.

    A subclass names its pure function, or overrides :meth:`perturb`; what the function takes beyond
    the options below are fields of the subclass.

    Attributes:
        function: ``(model, x, y, *, threat, generator, gradient, model_mode, **own) -> x_adv``.
        norms: Norms that it is defined for.
        norm_reason: Why it is not for the others.
        losses: Inner losses that it can maximise.
        step_share: Default of its step size as a share of eps; 0 where it has none.
        always_random: Whether it starts at random without being told to.
        tells_start: Whether its strategy says where it started from.
        threat: Allowed perturbations; None in a config, which has a section for them.
        inner_loss: Takes the place of the named loss: an objective's own.
    """

    kind: ClassVar[str] = "attack"
    function: ClassVar[Callable[..., Tensor] | None] = None
    norms: ClassVar[tuple[str, ...]] = NORMS
    norm_reason: ClassVar[str] = ""
    losses: ClassVar[tuple[str, ...]] = tuple(INNER_LOSSES)
    step_share: ClassVar[float] = 0.25
    always_random: ClassVar[bool] = False
    tells_start: ClassVar[bool] = False

    threat: ThreatModel | None = option(None, is_key=False)
    inner_loss: InnerLoss | None = option(None, is_key=False)
    precision: Literal["bf16", "fp16", "int8", "fp8", "auto"] | None = option(
        None,
        traits={
            Trait.OWN_PRECISION: lambda v: True,
            Trait.ASKS_THE_HOST: lambda v: v == "fp16",
            Trait.CHANGES_THE_MODEL: lambda v: v in FORMATS,
        },
    )
    """Precision of the model's passes in the attack alone; pixels and the update keep theirs.
    ``int8`` and ``fp8``: of the products of linear layers, the rest in ``bf16``; ``fp8`` is
    experimental: no GPU has run it yet. ``auto``: ``bf16`` where, timed at the start, it makes the
    attack faster. Default: the engine's."""
    fold_batch_norm: bool = option(
        False,
        traits={Trait.FOLDS_WEIGHTS: bool, Trait.CHANGES_THE_MODEL: bool},
    )
    """Compute convolutions and the BatchNorm behind them as one during the attack, which saves two
    passes over every activation. Needs ``model_mode`` ``eval``, and ZeRO 0-2."""
    resolution: int | None = above(0, None)
    """Size in pixels at which the model sees images during the attack; the update is at full size.
    The model must accept it (a ViT: ``dat.model.options.dynamic_img_size``)."""
    keep_tokens: float | None = positive_share(
        None, traits={Trait.CHANGES_THE_MODEL: lambda v: True}
    )
    """Fraction of patch tokens that a vision transformer keeps during the attack, drawn anew in
    every forward; the update sees all."""
    eps_warmup: float = fraction(0.0)
    """Share of the run over which eps and the step size rise linearly from 0."""
    model_mode: Literal["eval", "train"] = option(
        "eval", traits={Trait.GOES_BY_THE_BATCH: lambda v: v == "train"}
    )
    """Mode of the model's modules during the attack: ``eval`` (running BatchNorm statistics, no
    dropout) or ``train``."""

    def __post_init__(self) -> None:
        """Read a step size that is text, as in JSON."""
        if isinstance(size := getattr(self, "step_size", None), str):
            object.__setattr__(self, "step_size", parse_step(size))

    # ---- what the rules read

    @property
    def ball(self) -> ThreatModel:
        """Its threat model.

        Raises:
            ValueError: Where it has none, as in a config.
        """
        if self.threat is None:
            raise ValueError(f"attack {self.name!r} has no threat model: use build_attack.")
        return self.threat

    @property
    def starts_at_random(self) -> bool:
        """Whether it starts from a draw from the ball, and not from the image."""
        return self.always_random or bool(getattr(self, "random_start", False))

    @property
    def is_own(self) -> bool:
        """Whether code outside this package makes its images, which are then checked."""
        makers = (type(self).perturb, type(self).function)
        return any(is_from_outside(maker) for maker in makers if maker is not None)

    @property
    def is_single_step(self) -> bool:
        """Whether it takes one gradient."""
        return getattr(self, "steps", 1) == 1

    def facts(self, path: str) -> Iterator[tuple[Trait, str]]:
        """Its traits, and those of its start and its loss."""
        yield from super().facts(path)
        if not self.starts_at_random:
            start = " without a random start" if "random_start" in self.known_keys() else ""
            yield Trait.STARTS_AT_THE_IMAGE, f"{self.chosen_at(path)}{start}"
        if self.is_own and Trait.ASKS_THE_HOST not in self.traits:
            yield Trait.ASKS_THE_HOST, self.chosen_at(path)  # its result is checked
        if not self.tells_start:
            yield Trait.TELLS_NO_START, self.chosen_at(path)
        loss = getattr(self, "loss", None)
        for trait in LOSS_TRAITS.get(loss or "", ()):
            yield trait, f"{path}.loss={loss!r}"

    def problems(self) -> Iterator[str]:
        """A loss that it does not take; folded BatchNorm in training mode."""
        loss = getattr(self, "loss", None)
        if loss is not None and loss not in self.losses:
            valid = ", ".join(repr(name) for name in self.losses)
            hint = did_you_mean(loss, self.losses)
            yield (
                f"loss={loss!r} is not valid with the attack {self.name!r}{hint}. Write one of "
                f"{valid}."
            )
        if self.fold_batch_norm and self.model_mode == "train":
            yield (
                "fold_batch_norm=true with dat.attack.model_mode='train': batch statistics are "
                "known only in the forward. Write dat.attack.model_mode='eval'."
            )

    def norm_problems(self, norm: str) -> Iterator[str]:
        """Problems of the attack in a ball of this norm; each message starts with a key."""
        if norm not in self.norms:
            yield (
                f"name={self.name!r} is defined for the norms {', '.join(self.norms)}, not "
                f"{norm!r}{self.norm_reason}. Write name='pgd'."
            )

    def resolved(self, eps: Length, objective_loss: str) -> Self:
        """With the defaults written out that depend on other sections.

        Args:
            eps: Radius of the ball.
            objective_loss: Inner loss of the objective.
        """
        chosen: dict[str, Any] = {}
        if "step_size" in self.known_keys() and (share := self._share) is not None:
            chosen["step_size"] = eps.scaled(share)
        if "loss" in self.known_keys() and getattr(self, "loss", None) is None:
            # The divergence is flat at the image itself.
            fits = objective_loss in self.losses and self.starts_at_random
            takes = fits or objective_loss in FEATURE_LOSSES
            chosen["loss"] = objective_loss if takes else "ce"
        return dataclasses.replace(self, **chosen)

    @property
    def _share(self) -> float | None:
        """Its step size as a share of eps; None where it is a length."""
        size = getattr(self, "step_size", None)
        if size is None:
            return self.default_step_share
        return size.share if isinstance(size, OfEps) else None

    @property
    def default_step_share(self) -> float:
        """Default step size as a share of eps."""
        return self.step_share

    # ---- what trains

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None = None,
        *,
        gradient: InputGradient | None = None,
        **carried: Tensor,
    ) -> Tensor:
        """Adversarial images for ``x``, by cheaper passes where it is told so.

        Args:
            model: Pixels to outputs ``(B, K)``.
            x: Images, float32; not modified.
            y: Targets of the inner loss.
            generator: Source of random numbers. None: a fresh, unpredictable one.
            gradient: How input gradients are taken and counted.
            carried: State that its strategy carries from step to step, by name.

        Raises:
            ValueError: Without a threat model.
        """
        seen = model
        with contextlib.ExitStack() as stack:
            if self.keep_tokens is not None:
                source = fresh_generator(x.device) if generator is None else generator
                stack.enter_context(dropped_tokens(model, self.keep_tokens, source))
            if self.fold_batch_norm or self.resolution or self.precision:
                # The attack itself sees a function around the model, or a folded one.
                stack.enter_context(attack_mode(model, self.model_mode))
            if self.fold_batch_norm:
                stack.enter_context(folded_batch_norm(model, x))
            if self.precision is not None:
                if self.precision == "auto":
                    raise ValueError("precision='auto' is chosen by who trains: name a precision.")
                seen = stack.enter_context(shorter_floats(model, self.precision))
                stack.enter_context(fast_attention(x.device))
                if gradient is None:
                    gradient = InputGradient(retry_non_finite=self.precision == "fp16")
            if self.resolution is not None:
                seen = at_resolution(seen, self.resolution)
            if self.is_own:
                return self._perturb_by_own_code(seen, x, y, generator, gradient, **carried)
            return self.perturb(seen, x, y, generator, gradient, **carried)

    def _perturb_by_own_code(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None,
        gradient: InputGradient | None,
        **carried: Tensor,
    ) -> Tensor:
        """:meth:`perturb` of a class outside this package: nothing is None, the result is checked.

        Raises:
            ConfigError: For a result that is not an image in the ball.
        """
        source = fresh_generator(x.device) if generator is None else generator
        counting = InputGradient() if gradient is None else gradient
        loss = self.inner_loss or getattr(self, "loss", None) or "ce"
        with admitted(model, x, y, threat=self.ball, loss=loss, model_mode=self.model_mode) as (
            model,
            x,
            y,
        ):
            # A copy: its images may be written into.
            x_adv = self.perturb(model, x.clone(), y, source, counting, **carried)
        return check_result(
            x_adv, x, self.ball, by=f"The attack {name_of(type(self))!r}", views=self.num_views
        )

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None,
        gradient: InputGradient | None,
        **carried: Tensor,
    ) -> Tensor:
        """Adversarial images by :attr:`function` with this attack's own options."""
        function = type(self).function
        assert function is not None
        return function(
            model,
            x,
            y,
            threat=self.ball,
            generator=generator,
            gradient=gradient,
            model_mode=self.model_mode,
            **self.own_options(),
            **carried,
        )

    def own_options(self) -> dict[str, Any]:
        """Keyword arguments of :attr:`function` beyond those of every attack; none that is None."""
        general = {f.name for f in dataclasses.fields(Attack)} | {"steps_from"}
        own = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in general
        }
        if "loss" in own and self.inner_loss is not None:
            own["loss"] = self.inner_loss
        if isinstance(own.get("step_size"), OfEps):
            own["step_size"] = self.step
        return {key: value for key, value in own.items() if value is not None}

    def with_precision(self, precision: Precision | None) -> Attack:
        """The same attack with its passes in another precision."""
        return dataclasses.replace(self, precision=precision)

    # ---- along the run

    def strategy(self) -> Strategy:
        """State carried from one training step to the next: none."""
        return Strategy()

    @property
    def step(self) -> float:
        """Length of a step in pixel units."""
        size: Any = getattr(self, "step_size", None)
        share = self._share
        return float(size) if share is None else self.ball.eps * share

    @property
    def num_views(self) -> int:
        """Adversarial images per original."""
        return 1

    @property
    def is_scheduled(self) -> bool:
        """Whether the attack changes along the run."""
        return self.eps_warmup > 0

    def at(self, progress: float) -> Attack:
        """The attack at a point of the run, ``progress`` in [0, 1]; itself where not scheduled."""
        if not self.is_scheduled:
            return self
        eps_scale = min(1.0, progress / self.eps_warmup) if self.eps_warmup else 1.0
        return dataclasses.replace(self, **self._scheduled(progress, eps_scale), eps_warmup=0.0)

    def _scheduled(self, progress: float, eps_scale: float) -> dict[str, Any]:
        """Fields that change along the run."""
        threat = dataclasses.replace(self.ball, eps=self.ball.eps * eps_scale)
        changed: dict[str, Any] = {"threat": threat}
        if getattr(self, "step_size", None) is not None:
            changed["step_size"] = self.step * eps_scale
        return changed


@dataclass(frozen=True, kw_only=True)
class IteratedAttack(Attack):
    """An attack of several gradient steps."""

    steps: int = at_least(1, 10)
    """Gradient steps. (Madry et al. 2018 use 7, DAT's release 10.)"""
    steps_from: int | None = at_least(1, None)
    """Steps at the start of the run, rising to ``steps``; ``steps * step_size`` is kept."""

    @property
    def is_scheduled(self) -> bool:
        """Whether the attack changes along the run."""
        return super().is_scheduled or self.steps_from is not None

    def _scheduled(self, progress: float, eps_scale: float) -> dict[str, Any]:
        if self.steps_from is None:
            return super()._scheduled(progress, eps_scale)
        span = self.steps - self.steps_from
        # Equal shares of the run for each number of steps.
        steps = self.steps_from + min(math.floor(progress * (abs(span) + 1)), abs(span)) * (
            1 if span > 0 else -1
        )
        changed = super()._scheduled(progress, 1.0)
        if "step_size" in changed:
            changed["step_size"] = changed["step_size"] * (self.steps / steps) * eps_scale
        threat = super()._scheduled(progress, eps_scale)["threat"]
        return changed | {"threat": threat, "steps": steps, "steps_from": None}


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """Natural training."""

    name: ClassVar[str] = "none"
    cost: ClassVar[str] = "0"
    passes_over_others: ClassVar[bool] = True  # --set dat.attack.name=none switches an attack off
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.MAKES_NO_IMAGES, Trait.HAS_NO_STRONGER})
    always_random: ClassVar[bool] = True  # it has no start that could be wrong

    @property
    def is_single_step(self) -> bool:
        """False: it takes no gradient."""
        return False

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None,
        gradient: InputGradient | None,
        **carried: Tensor,
    ) -> Tensor:
        """The images themselves."""
        return x.detach().clone()


UserAttack = Callable[[Model, Tensor, Tensor, Generator | None], Tensor]
"""``(model, x, y, generator) -> x_adv``: pixels in, images inside the threat model out."""


@dataclass(frozen=True, kw_only=True)
class CallableAttack(Attack):
    """A user's function in the place of a named attack.

    Args:
        user_function: Called with a frozen model; must do the same number of forwards on every
            rank.
    """

    name: ClassVar[str] = "an attack of your own"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.ASKS_THE_HOST})
    always_random: ClassVar[bool] = True  # how it starts is its own affair
    user_function: UserAttack | None = option(None, is_key=False)

    def chosen_at(self, path: str) -> str:
        """Words: no key chose it."""
        return self.name

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None,
        gradient: InputGradient | None,
        **carried: Tensor,
    ) -> Tensor:
        """Adversarial images by the user's function, checked; ``gradient`` counts nothing."""
        assert self.user_function is not None
        with admitted(model, x, y, threat=self.ball, loss="ce", model_mode="eval") as (_, x, y):
            # The model itself: libraries ask it for its parameters. A copy: some write into it.
            x_adv = self.user_function(model, x.clone(), y, generator)
        return check_result(x_adv, x, self.ball)
