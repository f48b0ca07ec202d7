"""The attacks by name, and building one from plain settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dat_ds.attacks.apgd import Apgd
from dat_ds.attacks.attack import Attack, NoAttack
from dat_ds.attacks.fat import Fat
from dat_ds.attacks.fgsm import Fgsm, FgsmRs
from dat_ds.attacks.fgsm_pgi import FgsmPgi
from dat_ds.attacks.free import FreeAttack
from dat_ds.attacks.guided import Guided
from dat_ds.attacks.mim import Mim
from dat_ds.attacks.multi_norm import MultiNorm
from dat_ds.attacks.n_fgsm import NFgsm
from dat_ds.attacks.pgd import Pgd
from dat_ds.attacks.threat import ThreatModel
from dat_ds.attacks.zero_grad import ZeroGrad
from dat_ds.errors import ConfigError
from dat_ds.length import Length, parse_length
from dat_ds.method import parse_method, table_of

ATTACKS = table_of(
    "attack",
    Attack,
    [
        Pgd,
        Fgsm,
        FgsmRs,
        NFgsm,
        ZeroGrad,
        Guided,
        FgsmPgi,
        Mim,
        Apgd,
        Fat,
        MultiNorm,
        FreeAttack,
        NoAttack,
    ],
)
"""The choices of ``dat.attack``: a new attack is a file and a place in this list."""


def build_attack(config: Mapping[str, Any]) -> Attack:
    """Build an attack from plain settings.

    Args:
        config: The keys of ``dat.attack``, with ``threat_model``: a :class:`ThreatModel`, or the
            keys of ``dat.threat_model``; and ``targeted``, for attacks that can reach for a class.
            Lengths are numbers in pixel units, or fractions such as ``"8/255"``. An option that
            is left out or None has the attack's default.

    Returns:
        A callable ``(model, x, y, generator) -> x_adv``.

    Raises:
        ConfigError: A ``ValueError`` with all problems: an unknown name, option or threat model.
    """
    options = dict(config)
    threat = options.pop("threat_model", None)
    if threat is None:
        raise ConfigError("threat_model is missing: give {'norm': 'linf', 'eps': '8/255'}.")
    if not isinstance(threat, ThreatModel):
        threat = _build_threat_model(threat)
    problems: list[str] = []
    targeted = options.pop("targeted", False)
    attack = parse_method(ATTACKS, options, "attack", problems)
    problems += [f"attack.{problem}" for problem in attack.norm_problems(threat.norm)]
    if targeted and not hasattr(attack, "targeted"):
        problems.append(f"attack.targeted=true: {attack.name!r} reaches for no class. Remove it.")
    if problems:
        raise ConfigError("\n".join(problems))
    aimed: dict[str, Any] = {"targeted": True} if targeted else {}
    return dataclasses.replace(attack.resolved(Length(threat.eps), "ce"), threat=threat, **aimed)


def _build_threat_model(config: Mapping[str, Any]) -> ThreatModel:
    names = [f.name for f in dataclasses.fields(ThreatModel)]
    unknown = sorted(set(config) - set(names))
    missing = sorted({"norm", "eps"} - set(config))
    if unknown or missing:
        raise ConfigError(
            f"threat_model has unknown keys {unknown} and lacks {missing}: it takes {names}."
        )
    lengths: dict[str, Any] = {k: v if k == "norm" else parse_length(v) for k, v in config.items()}
    return ThreatModel(**lengths)
