"""Attacks by name, from the ``dat.attack`` and ``dat.threat_model`` sections of a run config."""

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dat_ds.attacks.apgd import apgd
from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.modes import attack_mode
from dat_ds.attacks.noise import Generator, fresh_generator
from dat_ds.attacks.passes.folding import folded_batch_norm
from dat_ds.attacks.passes.precision import PRECISIONS, Precision, shorter_floats
from dat_ds.attacks.passes.quantized import FORMATS, quantizable_linears
from dat_ds.attacks.passes.tokens import dropped_tokens, patch_tokens
from dat_ds.attacks.pgd import fat, fgsm, fgsm_rs, mim, multi_norm, n_fgsm, pgd
from dat_ds.attacks.threat import ThreatModel
from dat_ds.length import parse_length

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "pgd": pgd,
    "fgsm": fgsm,
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "mim": mim,
    "apgd": apgd,
    "fat": fat,
    "multi_norm": multi_norm,
}
FREE_OPTIONS = {"step_size": None, "replays": 4}
"""Options of ``free``, which is part of the training step; see :class:`FreeAttack`."""

_GIVEN_WITH_EACH_CALL = ("model", "x", "y", "threat", "generator", "gradient")
ATTACK_SETTINGS = (
    "precision",
    "fold_batch_norm",
    "resolution",
    "keep_tokens",
    "eps_warmup",
    "steps_from",
)
"""What every attack takes besides its own options; see :class:`Attack`."""

REQUIRED = inspect.Parameter.empty
"""Default of an option that has none."""


def attack_options(name: str) -> dict[str, Any]:
    """Options of an attack by name and their defaults; :data:`REQUIRED` where there is none."""
    if name == "free":
        return dict(FREE_OPTIONS)
    return {
        key: parameter.default
        for key, parameter in inspect.signature(ATTACKS[name]).parameters.items()
        if key not in _GIVEN_WITH_EACH_CALL
    }


@dataclass(frozen=True)
class Attack:
    """One of :data:`ATTACKS` with its threat model and options fixed.

    Args:
        name: Name of the attack.
        threat: Allowed perturbations.
        options: Further keyword arguments of the attack.
        precision: Float of the model's forwards and backwards during the attack, by autocast;
            pixels, steps and projections stay float32. None: the model's own.
        fold_batch_norm: Compute convolutions and the BatchNorm behind them as one during the
            attack, which must run in evaluation mode; see
            :func:`dat_ds.attacks.folded_batch_norm`.
        resolution: Height and width in pixels at which the model sees images during the attack
            (area interpolation; the model must accept them). The perturbation keeps the full size.
            None: the images' own.
        keep_tokens: Part of the patch tokens that a vision transformer sees during the attack,
            drawn anew in every forward, in (0, 1]; see :func:`dat_ds.attacks.patch_tokens`. None:
            all of them.
        eps_warmup: Share of the run, in [0, 1), over which eps and the step size rise linearly from
            0 to their values.
        steps_from: Number of steps at the start of the run; it rises linearly to ``steps`` at the
            end while ``steps * step_size`` stays the same. None: ``steps`` throughout.
    """

    name: str
    threat: ThreatModel
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision | None = None
    fold_batch_norm: bool = False
    resolution: int | None = None
    keep_tokens: float | None = None
    eps_warmup: float = 0.0
    steps_from: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: For folded BatchNorm in training mode, whose statistics come too late.
        """
        if self.fold_batch_norm and self.options.get("model_mode") == "train":
            raise ValueError("attack.fold_batch_norm=true needs attack.model_mode='eval'.")

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None = None,
        *,
        gradient: InputGradient | None = None,
    ) -> Tensor:
        """Adversarial images for ``x``; see :func:`dat_ds.attacks.pgd`."""
        seen = model
        with contextlib.ExitStack() as stack:
            if self.keep_tokens is not None:
                source = fresh_generator(x.device) if generator is None else generator
                stack.enter_context(dropped_tokens(model, self.keep_tokens, source))
            if self.fold_batch_norm or self.resolution or self.precision:
                # The attack itself sees a function around the model, or a folded one.
                mode = self.options.get("model_mode", "eval")
                stack.enter_context(attack_mode(model, mode))
            if self.fold_batch_norm:
                stack.enter_context(folded_batch_norm(model, x))
            if self.precision is not None:
                seen = stack.enter_context(shorter_floats(model, self.precision))
                if gradient is None:
                    gradient = InputGradient(retry_non_finite=self.precision == "fp16")
            if self.resolution is not None:
                seen = _at_resolution(seen, self.resolution)
            return ATTACKS[self.name](
                seen,
                x,
                y,
                threat=self.threat,
                generator=generator,
                gradient=gradient,
                **self.options,
            )

    @property
    def num_views(self) -> int:
        """Adversarial images per original: 1 but for ``multi_norm`` that averages over balls."""
        if self.options.get("combine") != "average":
            return 1
        return 1 + len(self.options["other_norms"])

    @property
    def is_scheduled(self) -> bool:
        """Whether the attack changes along the run."""
        return self.eps_warmup > 0 or self.steps_from is not None

    def at(self, progress: float) -> "Attack":
        """The attack at a point of the run, ``progress`` in [0, 1]; itself where not scheduled."""
        if not self.is_scheduled:
            return self
        options = dict(self.options)
        step_scale = 1.0
        if self.steps_from is not None:
            span = options["steps"] - self.steps_from
            # Equal shares of the run for each number of steps.
            steps = self.steps_from + min(math.floor(progress * (abs(span) + 1)), abs(span)) * (
                1 if span > 0 else -1
            )
            step_scale = options["steps"] / steps
            options["steps"] = steps
        eps_scale = min(1.0, progress / self.eps_warmup) if self.eps_warmup else 1.0
        if options.get("step_size") is not None:
            options["step_size"] = options["step_size"] * step_scale * eps_scale
        if "other_norms" in options:
            options["other_norms"] = {
                norm: eps * eps_scale for norm, eps in options["other_norms"].items()
            }
        threat = replace(self.threat, eps=self.threat.eps * eps_scale)
        return replace(self, threat=threat, options=options, eps_warmup=0.0, steps_from=None)


def _at_resolution(model: Model, resolution: int) -> Model:
    size = (resolution, resolution)
    return lambda images: model(F.interpolate(images, size, mode="area"))


@dataclass(frozen=True)
class FreeAttack(Attack):
    """Free adversarial training: the training step itself moves the perturbation.

    See :class:`dat_ds.attacks.FreePerturbation`. Its options are ``step_size``, None for eps as in
    the paper, and ``replays``, how often each batch is trained on.
    """

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None = None,
        *,
        gradient: InputGradient | None = None,
    ) -> Tensor:
        """Raise: apart from a training step there is no such attack.

        Raises:
            ValueError: Always.
        """
        raise ValueError("attack 'free' is part of a training step: attack a model with 'pgd'.")

    @property
    def step_size(self) -> float:
        """Length of a step in pixel units."""
        size = self.options.get("step_size")
        return self.threat.eps if size is None else float(size)

    @property
    def replays(self) -> int:
        """How often each batch is trained on in a row."""
        return int(self.options.get("replays", FREE_OPTIONS["replays"]))


def misfits(attack: Attack, model: nn.Module) -> list[str]:
    """What an attack asks of a model that it has not, in words for whoever wrote the config."""
    spec = getattr(model, "spec", None)
    kind = spec.get("name") if isinstance(spec, Mapping) else type(model).__name__
    problems = []
    if attack.keep_tokens is not None and patch_tokens(model) is None:
        problems.append(
            f"dat.attack.keep_tokens={attack.keep_tokens:g} needs a vision transformer: timm's "
            f"VisionTransformer, or Hugging Face's ViT, DeiT or DINOv2, not this model ({kind}). "
            "Remove it, or write dat.attack.resolution."
        )
    if attack.fold_batch_norm and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        problems.append(
            f"dat.attack.fold_batch_norm=true, but this model ({kind}) has no BatchNorm: remove it."
        )
    if attack.precision in FORMATS and not quantizable_linears(model):
        problems.append(
            f"dat.attack.precision={attack.precision!r}: this model ({kind}) has no linear layer "
            "whose sizes are multiples of 16. Write 'bf16'."
        )
    return problems


UserAttack = Callable[[Model, Tensor, Tensor, Generator | None], Tensor]
"""``(model, x, y, generator) -> x_adv``: pixels in, images inside the threat model out."""


@dataclass(frozen=True)
class CallableAttack(Attack):
    """A user's own attack in the place of a named one.

    Args:
        function: Called with a frozen model; must do the same number of forwards on every rank.
    """

    function: UserAttack | None = None

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: Generator | None = None,
        *,
        gradient: InputGradient | None = None,
    ) -> Tensor:
        """Adversarial images by the user's function, detached; ``gradient`` counts nothing."""
        assert self.function is not None
        with attack_mode(model):
            return self.function(model, x, y, generator).detach()


def build_attack(config: Mapping[str, Any]) -> Attack:
    """Build an attack from plain settings.

    Args:
        config: The keys of ``dat.attack`` (``name``, that attack's keyword arguments, and
            the settings of :class:`Attack`, such as ``resolution``), with
            ``threat_model``: a :class:`ThreatModel`, or the keys of ``dat.threat_model``. Lengths
            are numbers in pixel units, or fractions such as ``"8/255"``. An option that is None
            has the attack's default.

    Returns:
        A callable ``(model, x, y, generator) -> x_adv``.

    Raises:
        ValueError: For an unknown name, option or threat model, or a missing one.
    """
    options = {key: value for key, value in config.items() if value is not None}
    name = options.pop("name", "pgd")
    if name not in (*ATTACKS, "free"):
        raise ValueError(f"attack.name={name!r} is not one of {', '.join(ATTACKS)}, free.")
    threat = options.pop("threat_model", None)
    if threat is None:
        raise ValueError("threat_model is missing: give {'norm': 'linf', 'eps': '8/255'}.")
    if not isinstance(threat, ThreatModel):
        threat = _build_threat_model(threat)
    settings = {key: options.pop(key) for key in ATTACK_SETTINGS if key in options}
    if settings.get("precision") not in (None, *PRECISIONS):
        names = ", ".join(PRECISIONS)
        raise ValueError(f"attack.precision={settings['precision']!r} is not one of {names}.")
    if "step_size" in options:
        options["step_size"] = parse_length(options["step_size"])
    if "other_norms" in options:
        options["other_norms"] = {
            norm: parse_length(eps) for norm, eps in options["other_norms"].items()
        }
    known = attack_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"attack {name!r} has no option {', '.join(unknown)}: {sorted(known)}.")
    missing = [key for key, value in known.items() if value is REQUIRED and key not in options]
    if missing:
        raise ValueError(f"attack {name!r} needs {' and '.join(missing)}.")
    kind = FreeAttack if name == "free" else Attack
    return kind(name, threat, options, **settings)


def _build_threat_model(config: Mapping[str, Any]) -> ThreatModel:
    names = [f.name for f in fields(ThreatModel)]
    unknown = sorted(set(config) - set(names))
    missing = sorted({"norm", "eps"} - set(config))
    if unknown or missing:
        raise ValueError(
            f"threat_model has unknown keys {unknown} and lacks {missing}: it takes {names}."
        )
    lengths: dict[str, Any] = {k: v if k == "norm" else parse_length(v) for k, v in config.items()}
    return ThreatModel(**lengths)
