"""A model's checks without an evaluation: what would make its robust accuracy untrustworthy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dat_ds.config.schema import ThreatModelConfig
from dat_ds.errors import ConfigError
from dat_ds.evaluation.checks import Finding, check_model
from dat_ds.files import write_json, writing
from dat_ds.judge.target import Case, open_case

DOCTOR = "doctor.json"
NUM_EXAMPLES = 128
_WIDTH = 100


@dataclass(frozen=True)
class Diagnosis:
    """Findings about a model.

    Args:
        target: As it was asked for.
        threat: Allowed perturbations.
        num_examples: Images that were looked at.
        findings: One for each check.
    """

    target: str
    threat: ThreatModelConfig
    num_examples: int
    findings: list[Finding]

    @property
    def alarms(self) -> list[Finding]:
        """Findings that are suspicious or failed."""
        return [finding for finding in self.findings if finding.is_alarm]

    def to_dict(self) -> dict[str, Any]:
        """Contents of ``doctor.json``."""
        return {
            "target": self.target,
            "threat_model": self.threat.to_dict(),
            "num_examples": self.num_examples,
            "checks": [finding.to_dict() for finding in self.findings],
        }

    def table(self) -> str:
        """Status, check and what was found; for alarms the meaning and what to do."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{self.target}, {self.threat}, {self.num_examples} images", ""]
        indent = " " * (10 + 2 + width + 2)
        for finding in self.findings:
            first = f"{finding.status:<10}  {finding.name:<{width}}  "
            lines += _wrapped(finding.found, first, indent)
            if finding.is_alarm:
                lines += _wrapped(finding.meaning, f"{indent}means: ", f"{indent}       ")
                lines += _wrapped(finding.remedy, f"{indent}to do: ", f"{indent}       ")
        count = len(self.alarms)
        names = ", ".join(finding.name for finding in self.alarms)
        lines += ["", f"{count} of {len(self.findings)} checks raise an alarm: {names}"]
        if not count:
            lines[-1] = f"None of {len(self.findings)} checks raises an alarm."
        return "\n".join(lines)


def _wrapped(text: str, first: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=indent)


def diagnose(
    target: str,
    *,
    data: str | None = None,
    threat: str | None = None,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    num_examples: int = NUM_EXAMPLES,
    seed: int = 0,
    output: Path | None = None,
) -> Diagnosis:
    """Run the checks of a model on images spread evenly over its data.

    Args:
        target: The model; see :func:`dat_ds.judge.target.open_case`, as for the next four.
        data: Images.
        threat: Allowed perturbations.
        overrides: Keys over the run's config.
        imports: Modules to import first.
        num_examples: Images to look at.
        seed: Seed of all random numbers.
        output: Folder for ``doctor.json``, made if need be; None for none.

    Raises:
        UserError: For every mistake in what was asked for.
    """
    if num_examples < 1:
        raise ConfigError(f"--num_examples {num_examples}: give at least 1.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = open_case(
        target, data=data, threat=threat, overrides=overrides, imports=imports, device=device
    )
    if output is not None:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
    findings = examine(case, num_examples, seed=seed, device=device)
    diagnosis = Diagnosis(target, case.threat, min(num_examples, len(case.images)), findings)
    if output is not None:
        write_json(output / DOCTOR, diagnosis.to_dict())
    return diagnosis


def examine(
    case: Case, num_examples: int, *, seed: int, device: torch.device, seconds: float = 100.0
) -> list[Finding]:
    """Findings about the model of a case, on images spread evenly over its data.

    Args:
        case: Model, images, threat model.
        num_examples: Images to look at.
        seed: Seed of all random numbers.
        device: Where the model is.
        seconds: Time to take, roughly.
    """
    x, y = _images(case, num_examples)
    return check_model(
        case.target.model,
        x.to(device),
        y.to(device),
        case.threat.build(),
        seed=seed,
        class_names=case.class_names,
        train_class_names=case.target.class_names,
        training=case.target.was_training,
        seconds=seconds,
    )


def _images(case: Case, num_examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images spread evenly: data are often sorted by class."""
    total = len(case.images)
    count = min(num_examples, total)
    samples = [case.images[i * total // count] for i in range(count)]
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
