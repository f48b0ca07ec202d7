"""The model to export: where it is, which of its weights, and what is known about it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dat_ds.checkpoints import CHECKPOINTS, STATE, CheckpointFolder, run_of
from dat_ds.data import DATASETS
from dat_ds.data.method import StoredDataset
from dat_ds.engine.unaveraged import unaveraged_weights
from dat_ds.errors import ExportError, ModelError, UserError
from dat_ds.evaluation.samples import EVALUATION
from dat_ds.export.measured import RECORD_NAMES, Measured, evaluated_model, read_measured
from dat_ds.method import parse_method
from dat_ds.models import PixelModel, load
from dat_ds.models.saved import SPEC_NAME, find_saved, read_spec

logger = logging.getLogger("dat_ds")

Weights = Literal["ema", "raw"]
"""Weights to export: averaged over training, or those that training goes on with."""

_IMAGENET_SIDE = 224


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export.

    Attributes:
        model: In eval mode, float32, on the CPU.
        spec: ``PixelModel.spec`` without paths of this machine.
        name: Of the run or folder that it is from.
        weights: Which weights it has, in words.
        config: Of the run, resolved, as JSON has it; None where it is not known.
        measured: Accuracies of these very weights; None where none are known.
    """

    model: PixelModel
    spec: Mapping[str, Any]
    name: str
    weights: str
    config: Mapping[str, Any] | None = None
    measured: Measured | None = None

    @property
    def is_hugging_face(self) -> bool:
        """Whether the network is one of transformers, not of timm."""
        return "hf_config" in self.spec

    @property
    def head(self) -> str:
        """Kind of its outputs, see :data:`dat_ds.kinds.Head`."""
        return str(self.spec.get("head", "classes"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of its images."""
        size = self.spec.get("img_size")
        if size is None and self.is_hugging_face:
            size = self.spec["hf_config"].get("image_size")
        elif size is None:
            size = getattr(self.model.body, "pretrained_cfg", {}).get("input_size", ())[1:]
        size = size or _IMAGENET_SIDE
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.spec["in_chans"]), int(height), int(width)

    @property
    def crop_share(self) -> float | None:
        """Part of the shorter edge that images of its data kept; None where they were squashed."""
        data = {} if self.config is None else self.config["dat"]["data"]
        dataset = parse_method(DATASETS, data, "dat.data", [])
        if isinstance(dataset, StoredDataset) and dataset.keeps_ratio:
            return dataset.crop_share
        return None

    def example(self, batch: int, seed: int = 0) -> torch.Tensor:
        """Random pixels of 256 levels, float32, ``(batch, C, H, W)``."""
        generator = torch.Generator().manual_seed(seed)
        levels = torch.randint(256, (batch, *self.image_shape), generator=generator)
        return levels / 255


def read_source(target: Path, weights: Weights | None = None, record: Path | None = None) -> Source:
    """Read the model to export.

    Args:
        target: A run, one of its checkpoints, or a saved model; see
            :func:`dat_ds.models.saved.find_saved`.
        weights: Which weights; None takes those that were saved, averaged where the run averages.
        record: The record whose accuracies are told; None looks beside the model and in its run.

    Raises:
        UserError: There is no such model, record or kind of weights.
    """
    saved = find_saved(target)
    run = run_of(saved)
    if not read_spec(saved / SPEC_NAME):
        raise ModelError(
            f"The model in '{saved}' is a module of your own, which dat_ds cannot rebuild: only "
            "models of dat_ds.models.build_model can be exported. Its weights are in "
            "model.safetensors."
        )
    config = _config_of(saved, run)
    decay = _ema_decay(config)
    model = load(saved)
    assert isinstance(model, PixelModel)
    if weights == "ema" and not decay:
        raise ExportError(
            f"--weights ema: '{target}' has no average of its weights (dat.ema.decay is 0 or not "
            "known). Leave out --weights."
        )
    words = f"averaged over training (EMA, decay {decay})" if decay else "as trained"
    was_saved = weights != "raw" or decay == 0
    if not was_saved:
        checkpoint = _checkpoint_of(saved, run, target)
        model.load_state_dict(unaveraged_weights(checkpoint))
        model.normalize.restore()
        words = f"un-averaged, of {checkpoint.name}"
        logger.info("Un-averaged weights of %s.", checkpoint)
    measured = None
    if record is not None:
        measured = read_measured(record)
    elif was_saved and (found := _record_of(saved, run)) is not None:
        measured = read_measured(found)
    return Source(
        model=model.eval(),
        spec=_without_paths(model.spec),
        name=(run or saved).resolve().name,
        weights=words,
        config=config,
        measured=measured,
    )


def _config_of(saved: Path, run: Path | None) -> Mapping[str, Any] | None:
    """The config of the run, from wherever one was left."""
    places: list[tuple[Path, str | None]] = [(saved / STATE, "config")]
    if run is not None:
        places += [(run / "config.json", None), (run / "record.json", "config")]
        latest = CheckpointFolder(run / CHECKPOINTS).latest()
        if latest is not None:
            places.append((latest / STATE, "config"))
    for file, key in places:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            config: dict[str, Any] = values[key] if key else values
            if "dat" in config:
                return config
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _ema_decay(config: Mapping[str, Any] | None) -> float | None:
    """Decay of the average that a run exports; 0 without one, None where the config is unknown."""
    if config is None:
        return None
    return float(config["dat"].get("ema", {}).get("decay", 0))


def _checkpoint_of(saved: Path, run: Path | None, target: Path) -> Path:
    """The checkpoint with DeepSpeed's files that un-averaged weights are read from."""
    if (saved / STATE).exists():
        return saved
    latest = None if run is None else CheckpointFolder(run / CHECKPOINTS).latest()
    if latest is None:
        raise ExportError(
            f"--weights raw: '{target}' holds a model alone, without DeepSpeed's files. Name its "
            "run, or one of the run's checkpoints, RUN/checkpoints/step-..."
        )
    return latest


def _record_of(saved: Path, run: Path | None) -> Path | None:
    """The record of an evaluation of this very model, if there is one."""
    found = next((saved / name for name in RECORD_NAMES if (saved / name).exists()), None)
    if found is not None or run is None or find_saved(run) != saved:
        return found
    # That of an ensemble says more than that of the training's end.
    for file in (run / "evaluation" / EVALUATION, *(run / name for name in RECORD_NAMES)):
        if file.exists() and not _is_of_another(file, saved):
            return file
    return None


def _is_of_another(file: Path, saved: Path) -> bool:
    try:
        target = evaluated_model(file)
        return target is not None and find_saved(target).resolve() != saved.resolve()
    except (UserError, OSError, ValueError):  # a run that was moved since
        return False


def _without_paths(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec that tells nothing about the folders of this machine."""
    clean = dict(spec)
    if clean.get("pretrained") is not None:
        clean["pretrained"] = Path(clean["pretrained"]).name
    if "hf_config" in clean:
        clean["name"] = f"hf:{Path(clean['name'].removeprefix('hf:')).name}"
        clean["hf_config"] = {**clean["hf_config"], "_name_or_path": ""}
    return clean
