"""The natural twin of a run: the same without its attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dat_ds.attacks import NoAttack
from dat_ds.config import MONITORS, RunConfig, enabled_monitors, without_monitors
from dat_ds.config.schema import LoggingConfig, WeightPerturbationConfig
from dat_ds.data import DatasetMethod
from dat_ds.objectives import AdversarialTraining

TWIN_FOLDER = "natural_twin"


def natural_twin_of(run: RunConfig) -> RunConfig:
    """The same run without its attack."""
    dat = dataclasses.replace(
        run.dat,
        attack=NoAttack(),
        objective=AdversarialTraining(
            label_smoothing=getattr(run.dat.objective, "label_smoothing", 0.0)
        ),
        data=_labelled_only(run.dat.data),
        weight_perturbation=WeightPerturbationConfig(),
        evaluation=dataclasses.replace(run.dat.evaluation, natural_twin=False),
        logging=_files_only(run.dat.logging),
    )
    return dataclasses.replace(run, dat=dat, deepspeed=_with_own_files(run.deepspeed), notes=())


def _with_own_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with monitors in a folder of their own; services are told of the run alone."""
    own = without_monitors(config)
    for key, section in enabled_monitors(config).items():
        if "job_name" in MONITORS[key].known_keys():
            job = section.get("job_name", MONITORS[key]().to_dict()["job_name"])
            own[key] = {**section, "job_name": f"{job}/{TWIN_FOLDER}"}
    if "tensorboard" in config:
        own.setdefault("tensorboard", config["tensorboard"])  # off is off for both
    return own


def _files_only(logs: LoggingConfig) -> LoggingConfig:
    """The same with trackers that write into the run's folder alone."""
    files = [name for name in logs.trackers if name == "tensorboard"]
    return dataclasses.replace(logs, trackers=files)


def _labelled_only(data: DatasetMethod) -> DatasetMethod:
    """The same data without the images that natural training could not use."""
    if not data.has_unlabelled or data.pseudo_labels is not None:
        return data
    hides = data.labelled_fraction < 1
    return dataclasses.replace(
        data,
        drop_unlabelled=hides,
        unlabelled_path=None,
        labelled_repeats=1,
        unlabelled_batch_fraction=None,
    )
