"""Attacks by name, from the ``dat.attack`` and ``dat.threat_model`` sections of a run config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from dat_ds.attacks.gradient import InputGradient, Model
from dat_ds.attacks.noise import Generator
from dat_ds.attacks.pgd import fgsm, pgd
from dat_ds.attacks.threat import ThreatModel

ATTACKS: dict[str, Callable[..., Tensor]] = {"pgd": pgd, "fgsm": fgsm}


@dataclass(frozen=True)
class Attack:
    """One of :data:`ATTACKS` with its threat model and options fixed."""

    name: str
    threat: ThreatModel
    options: Mapping[str, Any]

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
        run = ATTACKS[self.name]
        return run(
            model, x, y, threat=self.threat, generator=generator, gradient=gradient, **self.options
        )


def build_attack(config: Mapping[str, Any]) -> Attack:
    """Build an attack from plain settings.

    Args:
        config: The keys of ``dat.attack`` (``name`` and that attack's keyword arguments), with
            ``threat_model``: a :class:`ThreatModel`, or the keys of ``dat.threat_model``. Lengths
            are numbers in pixel units, or fractions such as ``"8/255"``.

    Returns:
        A callable ``(model, x, y, generator) -> x_adv``.

    Raises:
        ValueError: For an unknown name, option or threat model, or a missing one.
    """
    options = dict(config)
    name = options.pop("name", "pgd")
    if name not in ATTACKS:
        raise ValueError(f"attack.name={name!r} is not one of {', '.join(ATTACKS)}.")
    threat = options.pop("threat_model", None)
    if threat is None:
        raise ValueError("threat_model is missing: give {'norm': 'linf', 'eps': '8/255'}.")
    if not isinstance(threat, ThreatModel):
        threat = _build_threat_model(threat)
    if options.get("step_size") is not None:
        options["step_size"] = parse_length(options["step_size"])
    allowed = set(ATTACKS[name].__kwdefaults__ or ()) | {"steps", "step_size"}
    allowed -= {"generator", "gradient"}  # given with each call
    if name == "fgsm":
        allowed -= {"steps"}
    unknown = sorted(set(options) - allowed)
    if unknown:
        raise ValueError(f"attack {name!r} has no option {', '.join(unknown)}: {sorted(allowed)}.")
    if name == "pgd":
        missing = [key for key in ("steps", "step_size") if options.get(key) is None]
        if missing:
            raise ValueError(f"attack 'pgd' needs {' and '.join(missing)}.")
    return Attack(name, threat, options)


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


def parse_length(value: float | str) -> float:
    """A length in pixel units from a number or a fraction: ``"8/255"`` is 8 / 255.

    Raises:
        ValueError: If the text is neither.
    """
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            return float(numerator) / float(denominator) if slash else float(numerator)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{value!r} is not a length: write 0.03 or '8/255'.") from None
    try:
        return float(value)
    except TypeError:
        raise ValueError(f"{value!r} is not a length: write 0.03 or '8/255'.") from None
