"""What a training run's metrics and pictures are sent to: ``dat.logging.trackers``."""

from __future__ import annotations

import importlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dat_ds.config import RunConfig

logger = logging.getLogger("dat_ds")

STATE = "trackers.json"
"""In the folder of a run: its id for the trackers, and the newest step that each has."""


class Tracker(Protocol):
    """Something that takes numbers and pictures; its methods raise whatever a service raises."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by name."""

    def picture(self, step: int, name: str, file: Path) -> None:
        """Take a PNG file."""

    def close(self) -> None:
        """End what was started, so that a service has everything before the process ends."""


class TensorBoardFiles:
    """TensorBoard's files in a folder, each value on disk when it is written.

    Args:
        folder: Made if need be.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds, where nobody asks for it

        self._folder = folder
        self._writer: Any = SummaryWriter(log_dir=str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As the protocol says.

        Raises:
            FileNotFoundError: The folder has vanished: the writer would wait for a dead thread.
        """
        self._check()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, file: Path) -> None:
        """As the protocol says."""
        import numpy as np
        from PIL import Image

        self._check()
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """As the protocol says."""
        self._writer.close()

    def _check(self) -> None:
        if not self._folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(self._folder)!r}")


class _Service:
    """Weights & Biases or trackio, which takes its functions' names from it.

    A run that the caller has begun is joined, and left to the caller to end.
    """

    def __init__(self, module: Any, is_joined: bool, options: Mapping[str, Any]) -> None:
        self._module, self._is_joined = module, is_joined
        if not is_joined:
            module.init(**options)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As the protocol says."""
        self._module.log(dict(values), step=step)

    def picture(self, step: int, name: str, file: Path) -> None:
        """As the protocol says."""
        self._module.log({name: self._module.Image(str(file))}, step=step)

    def close(self) -> None:
        """As the protocol says."""
        if not self._is_joined:
            self._module.finish()


def start_tracker(name: str, run: RunConfig, output: Path | None, run_id: str) -> Tracker:
    """Start a tracker, or go on in the run that it has under this id.

    Args:
        name: One of ``dat.logging.trackers``.
        run: Config; its ``dat.logging`` applies, and services keep all of it.
        output: Folder of the run; None in a loop of one's own, which has no TensorBoard files.
        run_id: Of the run.
    """
    if name == "tensorboard":
        assert output is not None
        return TensorBoardFiles(output / "tensorboard")
    module: Any = importlib.import_module(name)
    label = "run" if output is None else output.resolve().name
    options = {
        "project": run.dat.logging.project,
        "resume": "allow",
        "config": run.to_dict(),
    }
    if name == "wandb":
        if output is not None:
            options["dir"] = str(output)
        options |= {"name": label, "id": run_id}
        return _Service(module, module.run is not None, options)
    # trackio knows a run by its name alone.
    return _Service(module, False, {**options, "name": f"{label}-{run_id[:8]}", "embed": False})


class WrittenSteps:
    """The newest step that each tracker has of each kind of metric, beside a run's files.

    A run that goes on from a checkpoint repeats the steps since; they are not written twice.

    Args:
        folder: Folder of the run; None keeps no file, and knows of no earlier process.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / STATE
        self.run_id = uuid.uuid4().hex
        self._steps: dict[str, dict[str, int]] = {}
        if self._file is not None and self._file.exists():
            try:
                state = json.loads(self._file.read_text(encoding="utf-8"))
                self.run_id, self._steps = str(state["id"]), dict(state["steps"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning(
                    "%s cannot be read (%s): trackers begin a new run, which lacks the steps "
                    "before.",
                    self._file,
                    error,
                )

    def missing(self, tracker: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those among ``values``, by name ``"kind/metric"``, that a tracker does not have yet."""
        known = self._steps.get(tracker, {})
        return {k: v for k, v in values.items() if step > known.get(_kind(k), -1)}

    def mark(self, tracker: str, step: int, values: Mapping[str, Any]) -> None:
        """Remember that a tracker has ``values``, also where this process ends right after."""
        kinds = dict.fromkeys(map(_kind, values), step)
        self._steps[tracker] = {**self._steps.get(tracker, {}), **kinds}

        if self._file is not None:
            # Not synchronised to the disk: what a power cut loses is written once more.
            partial = self._file.with_name(f"{STATE}.partial")
            state = {"id": self.run_id, "steps": self._steps}
            partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self._file)


def _kind(name: str) -> str:
    return name.partition("/")[0]
