"""The natural twin of a run: the same without its attack."""

from __future__ import annotations

import dataclasses

from dat_ds.attacks import NoAttack
from dat_ds.config import RunConfig
from dat_ds.config.schema import WeightPerturbationConfig
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
    )
    return dataclasses.replace(run, dat=dat, notes=())


def _labelled_only(data: DatasetMethod) -> DatasetMethod:
    """The same data without the images that natural training could not use."""
    if not data.has_unlabelled or data.pseudo_labels is not None:
        return data
    hides = data.labelled_fraction < 1
    return dataclasses.replace(
        data, drop_unlabelled=hides, unlabelled_path=None, labelled_repeats=1
    )
