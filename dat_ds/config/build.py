"""Threat model and attack of a run, from its resolved config."""

from __future__ import annotations

import dataclasses

from dat_ds.attacks import Attack, NoAttack, ThreatModel
from dat_ds.config.schema import DatConfig
from dat_ds.objectives import Objective


def threat_of(dat: DatConfig) -> ThreatModel:
    """The threat model of a run."""
    return dat.threat_model.build()


def attack_of(dat: DatConfig, objective: Objective) -> Attack | None:
    """The training attack of a run against its objective; None for natural training."""
    attack = dat.attack
    if isinstance(attack, NoAttack):
        return None
    # The engine chooses a precision once it can time the model.
    precision = None if attack.precision == "auto" else attack.precision
    return dataclasses.replace(
        attack.with_precision(precision), threat=threat_of(dat), inner_loss=objective.inner_loss
    )
