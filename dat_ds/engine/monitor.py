"""TensorBoard and other monitors, through DeepSpeed's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from dat_ds.config import RunConfig

MONITOR_KEYS = ("tensorboard", "wandb", "csv_monitor", "comet")


class Monitor:
    """Writes named scalars to every monitor that the run config enables; for the main rank.

    The monitors are kept out of DeepSpeed's engine, which would wait for the device in every step
    to write its loss.

    Args:
        run: Its DeepSpeed sections ``tensorboard``, ``wandb``, ``csv_monitor`` and ``comet`` apply;
            TensorBoard is on unless the config says otherwise.
        output: Folder of the run; TensorBoard's files go into ``tensorboard``.
    """

    def __init__(self, run: RunConfig, output: Path) -> None:
        sections = {key: run.deepspeed[key] for key in MONITOR_KEYS if key in run.deepspeed}
        if run.dat.logging.tensorboard:
            default = {"enabled": True, "output_path": str(output), "job_name": "tensorboard"}
            sections.setdefault("tensorboard", default)
        self._master = MonitorMaster(get_monitor_config(sections))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among ``values`` at ``step``."""
        events = [
            (name, value, step) for name, value in values.items() if isinstance(value, (int, float))
        ]
        if self._master.enabled:
            self._master.write_events(events)
