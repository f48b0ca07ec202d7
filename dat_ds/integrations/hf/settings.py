"""Settings of the callback, read and checked by the rules of a run config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dat_ds.attacks import Attack, CallableAttack, ThreatModel
from dat_ds.attacks.modes import ModelMode
from dat_ds.config import DatConfig, attack_of, threat_of
from dat_ds.config.load import parse_dat
from dat_ds.config.rules import resolve_dat
from dat_ds.errors import ConfigError
from dat_ds.method import Trait
from dat_ds.minmax import WeightPerturbation, weight_perturbation
from dat_ds.objectives import OBJECTIVES, Objective

_HONOURED = (
    "model",
    "threat_model",
    "attack",
    "objective",
    "weight_perturbation",
    "evaluation",
    "engine",
    "seed",
)
_HONOURED_OF_MODEL = ("mean", "std")
_HONOURED_OF_ENGINE = ("resident_parameters_gib",)
_HONOURED_OF_EVALUATION = ("attacks", "num_examples", "batch_size")

Section = str | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Resolved settings of one adversarial training.

    Attributes:
        dat: The section of a run config that says the same.
        attack: Training attack; None trains naturally.
        objective: The outer loss.
        threat: Allowed perturbations.
        model_mode: Mode of the model's modules during the attack.
        weight_perturbation: AWP or SAM; None for neither.
        unlabelled_weight: Weight of an image whose label is not a true one.
        evaluation_batch: Images per forward and rank in evaluation; None leaves it to the Trainer.
    """

    dat: DatConfig
    attack: Attack | None
    objective: Objective
    threat: ThreatModel
    model_mode: ModelMode
    weight_perturbation: WeightPerturbation | None
    unlabelled_weight: float
    evaluation_batch: int | None


@dataclass(frozen=True, kw_only=True)
class CallbackArguments:
    """Arguments of the callback, before the DeepSpeed file's ``"dat"`` section is known.

    Attributes are those of :class:`dat_ds.integrations.hf.AdversarialTrainingCallback`, and
    ``label_smoothing``, the Trainer's own, for the objective.
    """

    threat_model: Mapping[str, Any] | ThreatModel | None = None
    attack: Section | Attack | Callable[..., Any] | None = None
    objective: Section | Objective | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    seed: int | None = None
    evaluation: Mapping[str, Any] | None = None
    weight_perturbation: Section | None = None
    resident_parameters_gib: float | None = None
    label_smoothing: float | None = None

    def resolve(self, section: Mapping[str, Any] | None) -> Settings:
        """Merge with a ``"dat"`` section, fill in defaults, check everything.

        Args:
            section: Of the DeepSpeed file, where it has one; the arguments take precedence.

        Raises:
            ConfigError: With all problems, one per line.
        """
        problems: list[str] = []
        values = _honoured(section, problems)
        threat = self.threat_model
        if threat is None and isinstance(self.attack, Attack):
            threat = self.attack.threat
        if isinstance(threat, ThreatModel):
            threat = dataclasses.asdict(threat)
        own = {
            "threat_model": threat,
            "attack": _as_section(self.attack),
            "objective": _as_section(self.objective),
            "weight_perturbation": _as_section(self.weight_perturbation),
            "evaluation": self.evaluation,
            "seed": self.seed,
        }
        if self.resident_parameters_gib is not None:
            own["engine"] = {"resident_parameters_gib": self.resident_parameters_gib}
        values |= {key: value for key, value in own.items() if value is not None}
        if self.label_smoothing is not None:
            values["objective"] = self._smoothed(values.get("objective", {}), problems)
        model = {"mean": self.mean, "std": self.std}
        given = {key: list(value) for key, value in model.items() if value is not None}
        if given:
            values["model"] = given
        for key in ("threat_model", "attack"):
            if key not in values:
                problems.append(
                    f"{key} is missing: pass it to AdversarialTrainingCallback, or write "
                    f"dat.{key} into the file of TrainingArguments(deepspeed=...)."
                )
        _check_evaluation(values.get("evaluation"), problems)
        dat = parse_dat(values, problems)
        unlabelled_weight = dat.objective.unlabelled_weight
        # Whether there are unlabelled images is for the data to say, of which no section tells.
        objective_section = dataclasses.replace(dat.objective, unlabelled_weight=1.0)
        dat = resolve_dat(dataclasses.replace(dat, objective=objective_section), problems)
        problems += _problems(dat, self.attack, unlabelled_weight)
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))
        objective = self.objective if isinstance(self.objective, Objective) else dat.objective
        attack = self._attack(dat, objective)
        return Settings(
            dat=dat,
            attack=attack,
            objective=objective,
            threat=threat_of(dat),
            model_mode=dat.attack.model_mode if attack is None else attack.model_mode,
            weight_perturbation=weight_perturbation(
                dat.weight_perturbation.name,
                dat.weight_perturbation.radius,
                dat.weight_perturbation.scope,
            ),
            unlabelled_weight=unlabelled_weight,
            evaluation_batch=values.get("evaluation", {}).get("batch_size"),
        )

    def _smoothed(self, objective: Any, problems: list[str]) -> Any:
        """The objective's section with the Trainer's label smoothing."""
        given = objective.get("label_smoothing") if isinstance(objective, Mapping) else None
        if isinstance(self.objective, Objective) or given not in (None, self.label_smoothing):
            problems.append(
                f"label_smoothing_factor={self.label_smoothing:g} and the objective's own "
                f"label_smoothing={given}: give one of them."
            )
        if not isinstance(objective, Mapping):
            return objective
        return {**objective, "label_smoothing": self.label_smoothing}

    def _attack(self, dat: DatConfig, objective: Objective) -> Attack | None:
        attack = self.attack
        if isinstance(attack, Attack):
            if attack.threat != threat_of(dat):
                raise ConfigError(
                    f"attack was built for {attack.threat}, but threat_model is {threat_of(dat)}: "
                    "leave threat_model out, or make them equal."
                )
            return attack
        if callable(attack):
            return CallableAttack(threat=threat_of(dat), user_function=attack)
        return attack_of(dat, objective)


def _honoured(section: Mapping[str, Any] | None, problems: list[str]) -> dict[str, Any]:
    """A DeepSpeed file's section, after refusing what the Trainer does in its own way."""
    values = dict(section or {})
    for key in values:
        if key in _HONOURED or key not in {field.name for field in dataclasses.fields(DatConfig)}:
            continue  # an unknown key is reported where the section is parsed
        why = _WHY_NOT.get(key, "whose arguments say this")
        problems.append(
            f"dat.{key} is not read under Hugging Face's Trainer, {why}: remove it. Read are "
            f"{', '.join('dat.' + k for k in _HONOURED)}."
        )
    engine = values.get("engine")
    for key in engine if isinstance(engine, Mapping) else ():
        if key not in _HONOURED_OF_ENGINE:
            problems.append(
                f"dat.engine.{key} is not read under Hugging Face's Trainer, "
                + _WHY_NOT.get(key, "which sets the model up itself")
                + f": remove it. Read is {_HONOURED_OF_ENGINE[0]}."
            )
    model = values.get("model")
    if isinstance(model, Mapping):
        unread = [key for key in model if key not in _HONOURED_OF_MODEL]
        problems += [
            f"dat.model.{key} is not read under Hugging Face's Trainer, which is given a model: "
            "remove it."
            for key in unread
        ]
    return values


def _as_section(value: Any) -> Any:
    """``value`` as a section of the config, by name; None where it is an object of the user's."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Objective):
        return value.to_dict() if type(value) is OBJECTIVES.get(value.name) else {}
    if isinstance(value, Attack) or (callable(value) and not isinstance(value, Mapping)):
        return {}
    return value


def _check_evaluation(evaluation: Any, problems: list[str]) -> None:
    for key in evaluation if isinstance(evaluation, Mapping) else ():
        if key not in _HONOURED_OF_EVALUATION:
            problems.append(
                f"dat.evaluation.{key} is not read under Hugging Face's Trainer: remove it. Read "
                f"are {', '.join(_HONOURED_OF_EVALUATION)}."
            )


_WHY_NOT = {
    "finetuning": "which is given a model and builds its optimizer by itself (freeze parameters, "
    "or add adapters with peft, before you pass the model)",
    "attack_micro_batches": "which hands over one micro-batch after another",
    "compile": "whose torch_compile says it",
}
_FREE = (
    "dat.attack.name='free' replays batches, which Hugging Face's Trainer does not: write "
    "dat.attack.name='fgsm_rs', or train with dat_ds.initialize."
)


def _problems(dat: DatConfig, attack: Any, unlabelled_weight: float) -> list[str]:
    """Problems of settings that the Trainer cannot serve.

    Args:
        dat: The resolved section.
        attack: The user's, where it is an object.
        unlabelled_weight: Of the objective.
    """
    problems = []
    given = attack if isinstance(attack, Attack) else dat.attack
    if given.strategy().replays > 1:
        problems.append(_FREE)
    elif Trait.CARRIES_PERTURBATIONS in given.traits:
        problems.append(
            f"dat.attack.name={given.name!r} goes on with the perturbation of earlier steps, which "
            "a Trainer's checkpoint does not hold: choose another attack, or train with "
            "dat_ds.initialize."
        )
    name = dat.objective.name
    if name in ("rotation", "contrastive"):
        problems.append(
            f"dat.objective.name={name!r} trains a head of its own: pre-train with "
            "dat-ds train and dat.model.name='hf:PATH', and fine-tune the result here."
        )
    if unlabelled_weight != 1.0 and not dat.objective.uses_unlabelled:
        problems.append(
            f"dat.objective.unlabelled_weight={unlabelled_weight:g} concerns images without a "
            f"label, of which dat.objective.name={name!r} has no use: remove it."
        )
    return problems
