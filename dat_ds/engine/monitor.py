"""TensorBoard and other monitors, through DeepSpeed's."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from dat_ds.config import RunConfig, enabled_monitors
from dat_ds.errors import ConfigError
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_KINDS = {
    "tensorboard": TensorBoardMonitor,
    "wandb": WandbMonitor,
    "csv_monitor": csvMonitor,
    "comet": CometMonitor,
}


class Monitor:
    """Writes named scalars to every monitor that a run config enables, on the main rank.

    The monitors are kept out of DeepSpeed's engine, which would wait for the device in every step
    to write its loss. The engine owns this one. It writes every ``dat.logging.every_steps`` steps,
    until a training loop takes over.

    Args:
        run: Its DeepSpeed sections ``tensorboard``, ``wandb``, ``csv_monitor`` and ``comet`` apply.
        ranks: The processes of the run; all of them make one.
        global_batch: Images of an optimizer step.

    Raises:
        ConfigError: On all ranks, where a monitor cannot be started.
    """

    def __init__(self, run: RunConfig, ranks: Ranks, *, global_batch: int) -> None:
        self._run, self._ranks, self._global_batch = run, ranks, global_batch
        self._monitors: dict[str, Any] = {}
        self._failed: set[str] = set()
        self._joined_wandb = False  # a run that the caller began, and will end
        sections = enabled_monitors(run.deepspeed)
        self._writes_steps = bool(sections)
        self._start(sections)

    def is_due(self, step: int, total_steps: int | None) -> bool:
        """Whether the engine is to write the metrics of ``step``, alike on every rank.

        Args:
            step: Optimizer steps done.
            total_steps: Those of the whole run; None where nobody knows.
        """
        every = self._run.dat.logging.every_steps
        return self._writes_steps and (step % every == 0 or step == total_steps)

    def take_over(self, output: Path) -> None:
        """Let a training loop write the metrics of its steps from now on; a collective.

        Args:
            output: Folder of the run. TensorBoard's files go into ``tensorboard`` there where
                ``dat.logging.tensorboard`` asks for them and the run names no other place.
        """
        self._writes_steps = False
        if self._run.dat.logging.tensorboard and "tensorboard" not in self._run.deepspeed:
            section = {"enabled": True, "output_path": str(output), "job_name": "tensorboard"}
            self._start({"tensorboard": section})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among ``values`` at ``step``.

        A monitor that cannot be written to ends no run: the log says so once.
        """
        events = [
            (name, value, step) for name, value in values.items() if isinstance(value, (int, float))
        ]
        for key, monitor in self._monitors.items():
            with self._told_once(key, step):
                _check_folder(monitor)
                monitor.write_events(events)

    def close(self, step: int) -> None:
        """End what was started, so that a service has everything before the process ends.

        Args:
            step: Optimizer steps done.
        """
        for key, monitor in self._monitors.items():
            with self._told_once(key, step):
                if key == "tensorboard":
                    monitor.summary_writer.close()
                elif key == "comet":
                    monitor.experiment.end()
                elif key == "wandb" and not self._joined_wandb:
                    importlib.import_module("wandb").finish()
        self._monitors.clear()

    @contextlib.contextmanager
    def _told_once(self, key: str, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service raises
            if key not in self._failed:
                self._failed.add(key)
                logger.warning(
                    "%s could not be written to after step %d, and perhaps not later either "
                    "(%s). The run goes on.",
                    key,
                    step,
                    _shown(error),
                )

    def _start(self, sections: Mapping[str, Mapping[str, Any]]) -> None:
        if not sections:
            return
        with self._ranks.together():
            if self._ranks.is_main:
                for key, section in sections.items():
                    self._monitors[key] = self._started(key, section)

    def _started(self, key: str, section: Mapping[str, Any]) -> Any:
        config = getattr(get_monitor_config({key: dict(section)}), key)
        if key == "comet":  # which is told steps where it counts samples
            config.samples_log_interval = -(-config.samples_log_interval // self._global_batch)
        try:
            if key == "wandb":
                self._joined_wandb = importlib.import_module("wandb").run is not None
            return _KINDS[key](config)
        except Exception as error:  # whatever a service raises
            raise ConfigError(
                f"{key}.enabled=true, but it cannot be started: {_shown(error)}. "
                f"Correct that, or write {key}.enabled=false."
            ) from None


def _check_folder(monitor: Any) -> None:
    """Raise where a folder has vanished: TensorBoard's writer would wait for a thread that died."""
    if isinstance(monitor, (csvMonitor, TensorBoardMonitor)):
        folder = Path(monitor.output_path) / monitor.job_name
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}")


def _shown(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
