"""Metrics and pictures of a run, sent to ``dat.logging.trackers`` and DeepSpeed's monitors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from dat_ds.config import RunConfig, enabled_monitors
from dat_ds.engine.trackers import Tracker, WrittenSteps, start_tracker
from dat_ds.errors import ConfigError
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_KINDS = {
    "tensorboard": TensorBoardMonitor,
    "wandb": WandbMonitor,
    "csv_monitor": csvMonitor,
    "comet": CometMonitor,
}


class _DeepSpeedMonitor:
    """A monitor of DeepSpeed's as a tracker; it takes no pictures."""

    def __init__(self, key: str, section: Mapping[str, Any], global_batch: int) -> None:
        config = getattr(get_monitor_config({key: dict(section)}), key)
        if key == "comet":  # which is told steps where it counts samples
            config.samples_log_interval = -(-config.samples_log_interval // global_batch)
        self._key = key
        # A run that the caller began, and will end.
        self._is_joined = key == "wandb" and importlib.import_module("wandb").run is not None
        self._monitor = _KINDS[key](config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As the protocol says."""
        _check_folder(self._monitor)
        self._monitor.write_events([(name, value, step) for name, value in values.items()])

    def picture(self, step: int, name: str, file: Path) -> None:
        """Nothing."""

    def close(self) -> None:
        """As the protocol says."""
        if self._key == "tensorboard":
            self._monitor.summary_writer.close()
        elif self._key == "comet":
            self._monitor.experiment.end()
        elif self._key == "wandb" and not self._is_joined:
            importlib.import_module("wandb").finish()


class Monitor:
    """Writes named scalars to every tracker and monitor of a run config, on the main rank.

    DeepSpeed's monitors are kept out of its engine, which would wait for the device in every step
    to write its loss. The engine owns this one. It writes every ``dat.logging.every_steps`` steps,
    until a training loop takes over.

    Args:
        run: ``dat.logging.trackers`` and its DeepSpeed sections ``tensorboard``, ``wandb``,
            ``csv_monitor`` and ``comet`` apply. TensorBoard's files as a tracker need the folder of
            a training run.
        ranks: The processes of the run; all of them make one.
        global_batch: Images of an optimizer step.

    Raises:
        ConfigError: On all ranks, where a monitor cannot be started.
    """

    def __init__(self, run: RunConfig, ranks: Ranks, *, global_batch: int) -> None:
        self._run, self._ranks = run, ranks
        self._trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()
        self._written = WrittenSteps(None)
        sections = enabled_monitors(run.deepspeed)
        self._services = [n for n in run.dat.logging.trackers if n != "tensorboard"]
        self._writes_steps = bool(sections or self._services)
        self._start(
            {
                key: functools.partial(_DeepSpeedMonitor, key, section, global_batch)
                for key, section in sections.items()
            },
            "{}.enabled=true",
            "write {}.enabled=false",
        )

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
                ``dat.logging.trackers`` asks for them and the run names no other place.

        Raises:
            ConfigError: On all ranks, where a tracker cannot be started.
        """
        self._writes_steps = False
        if self._ranks.is_main:
            self._written = WrittenSteps(output)
        self._start_trackers(output)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among ``values`` at ``step``; a collective the first time.

        What a tracker has from before a resume is not written again. One that cannot be written
        to ends no run: the log says so once.

        Raises:
            ConfigError: On all ranks, where a tracker cannot be started, the first time.
        """
        if self._writes_steps and self._services:  # a loop of the caller's own
            self._start_trackers(None)
        numbers = {name: v for name, v in values.items() if isinstance(v, (int, float))}
        self._send(step, numbers, lambda tracker, new: tracker.write(step, new))

    def picture(self, step: int, name: str, file: Path) -> None:
        """Show a PNG file at ``step``, once, in every tracker that takes pictures."""
        self._send(step, {name: file}, lambda tracker, _: tracker.picture(step, name, file))

    def close(self, step: int) -> None:
        """End what was started, so that a service has everything before the process ends.

        Args:
            step: Optimizer steps done.
        """
        for key, tracker in self._trackers.items():
            with self._told_once(key, step):
                tracker.close()
        self._trackers.clear()

    def _send(
        self, step: int, values: Mapping[str, Any], send: Callable[[Tracker, dict[str, Any]], None]
    ) -> None:
        for key, tracker in self._trackers.items():
            new = self._written.missing(key, step, values)
            if new:
                with self._told_once(key, step):
                    send(tracker, new)
                    self._written.mark(key, step, new)

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

    def _start_trackers(self, output: Path | None) -> None:
        """Start ``dat.logging.trackers``; a collective."""
        names = self._services
        self._services = []
        logs = self._run.dat.logging
        has_files = "tensorboard" in logs.trackers and "tensorboard" not in self._run.deepspeed
        if output is not None and has_files:
            names = ["tensorboard", *names]
        run_id = self._written.run_id
        self._start(
            {
                name: functools.partial(start_tracker, name, self._run, output, run_id)
                for name in names
            },
            "dat.logging.trackers names {!r}",
            "leave it out",
        )

    def _start(self, makers: Mapping[str, Callable[[], Tracker]], asked: str, remedy: str) -> None:
        """Start trackers on the main rank; a collective.

        Args:
            makers: By name.
            asked: What asked for one of a name, for the message where it cannot be started.
            remedy: How to do without it, for the same message.
        """
        if not makers:
            return
        with self._ranks.together():
            if self._ranks.is_main:
                for name, make in makers.items():
                    try:
                        self._trackers[name] = make()
                    except Exception as error:  # whatever a service raises
                        raise ConfigError(
                            f"{asked.format(name)}, but it cannot be started: {_shown(error)}. "
                            f"Correct that, or {remedy.format(name)}."
                        ) from None


def report_outcome(
    run: RunConfig,
    output: Path,
    *,
    step: int,
    accuracies: Mapping[str, float | None],
    picture: Path | None,
) -> None:
    """Tell the trackers of a run that has ended what it came to, once; on one rank.

    Args:
        run: Its config.
        output: Its folder.
        step: Optimizer steps done.
        accuracies: On the test images, by name, in [0, 1]; None is left out.
        picture: A PNG file of examples, where there is one.
    """
    # DeepSpeed's monitors have ended with its engine; a section may turn TensorBoard's files off.
    off: dict[str, Any] = {"tensorboard": {}} if "tensorboard" in run.deepspeed else {}
    alone = Ranks(rank=0, count=1, device=torch.device("cpu"), cpu_group=None)
    monitor = Monitor(dataclasses.replace(run, deepspeed=off), alone, global_batch=1)
    try:
        monitor.take_over(output)
    except ConfigError as error:  # after all of the training
        logger.warning("The outcome reaches no tracker: %s", error)
        return
    monitor.write(step, {f"test/{name}": value for name, value in accuracies.items()})
    if picture is not None:
        monitor.picture(step, "examples", picture)
    monitor.close(step)


def _check_folder(monitor: Any) -> None:
    """Raise where a folder has vanished: TensorBoard's writer would wait for a thread that died."""
    if isinstance(monitor, (csvMonitor, TensorBoardMonitor)):
        folder = Path(monitor.output_path) / monitor.job_name
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}")


def _shown(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
