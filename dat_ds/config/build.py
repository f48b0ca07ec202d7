"""Threat model, attack and objective of a run, from its resolved config."""

from __future__ import annotations

import dataclasses

from dat_ds.attacks import Attack, ThreatModel, attack_options, build_attack
from dat_ds.config.schema import DatConfig
from dat_ds.objectives import Objective, build_objective


def threat_of(dat: DatConfig) -> ThreatModel:
    """The threat model of a run."""
    threat = dat.threat_model
    return ThreatModel(threat.norm, float(threat.eps), threat.lower, threat.upper)


def attack_of(dat: DatConfig, objective: Objective) -> Attack | None:
    """The training attack of a run against its objective; None for natural training."""
    if dat.attack.name == "none":
        return None
    options = dataclasses.asdict(dat.attack)
    for key in {"steps", "model_mode"} - set(attack_options(dat.attack.name)):
        del options[key]  # written out though it takes none
    if options["precision"] == "auto":
        del options["precision"]  # the engine chooses, once it can time the model
    if objective.inner_loss is not None and "loss" in attack_options(dat.attack.name):
        options["loss"] = objective.inner_loss
    return build_attack({**options, "threat_model": threat_of(dat)})


def objective_of(dat: DatConfig) -> Objective:
    """The objective of a run."""
    options = dataclasses.asdict(dat.objective)
    for key in ("helper_model", "unlabelled_weight", "grad_align", "batch_norm"):
        # What the batch is made of, not how its logits are weighed.
        del options[key]
    return build_objective(options)
