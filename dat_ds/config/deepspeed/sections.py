"""Sections of DeepSpeed's part whose keys it reads one by one, or hands to a monitor.

DeepSpeed passes over an unknown key of the former, and checks no type. A test compares every
section with the installed DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dat_ds.files import why_unwritable
from dat_ds.method import Section, above, at_least, option, parse_section

# ---- what a run reports to


@dataclass(frozen=True, kw_only=True)
class Report(Section):
    """Something that a run writes to beside its folder.

    Attributes:
        package: Distribution to install and module to import, where it needs one.
    """

    package: ClassVar[tuple[str, str] | None] = None

    enabled: bool = False

    def folder(self) -> tuple[str, Path] | None:
        """The key that names a folder and that folder; None where it writes to none."""
        return None

    def missing(self, path: str) -> Iterator[str]:
        """What it needs on this machine and does not find, as messages.

        Args:
            path: Its key in the config.
        """
        if self.package is not None and not is_installed(self.package[1]):
            yield (
                f"{path}.enabled=true, but the package {self.package[1]!r} is not installed: "
                f"pip install {shlex.quote(self.package[0])}, or write {path}.enabled=false."
            )
        if (place := self.folder()) is not None and (reason := why_unwritable(place[1])):
            yield (
                f"{path}.{place[0]}={getattr(self, place[0])!r} cannot be written to ({reason}): "
                f"name another place, or write {path}.enabled=false."
            )


@dataclass(frozen=True, kw_only=True)
class _FolderReport(Report):
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"

    def folder(self) -> tuple[str, Path] | None:
        return "output_path", Path(self.output_path) / self.job_name


@dataclass(frozen=True, kw_only=True)
class TensorBoard(_FolderReport):
    """TensorBoard's files."""

    package: ClassVar[tuple[str, str] | None] = ("tensorboard", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class CsvMonitor(_FolderReport):
    """A CSV file for each name."""


@dataclass(frozen=True, kw_only=True)
class Wandb(Report):
    """Weights & Biases."""

    package: ClassVar[tuple[str, str] | None] = ("wandb", "wandb")

    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


@dataclass(frozen=True, kw_only=True)
class Comet(Report):
    """Comet."""

    package: ClassVar[tuple[str, str] | None] = ("comet_ml>=3.41.0", "comet_ml")

    samples_log_interval: int = above(0, 100)
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None


@dataclass(frozen=True, kw_only=True)
class FlopsProfiler(Report):
    """Operations of the update's forward, in one step."""

    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None

    def folder(self) -> tuple[str, Path] | None:
        """That of ``output_file``."""
        return None if self.output_file is None else ("output_file", Path(self.output_file).parent)


MONITORS: dict[str, type[Report]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "csv_monitor": CsvMonitor,
    "comet": Comet,
}
"""Sections that name a monitor."""

_REPORTS: dict[str, type[Report]] = {**MONITORS, "flops_profiler": FlopsProfiler}


def enabled_monitors(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of the monitors that DeepSpeed's part of a checked run config enables."""
    return {key: config[key] for key in MONITORS if config.get(key, {}).get("enabled")}


def without_monitors(config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's part of a run config without the sections that name a monitor."""
    return {key: value for key, value in config.items() if key not in MONITORS}


def is_installed(module: str) -> bool:
    """Whether a package can be imported; a mere folder of its name, such as wandb's, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


# ---- the others


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing(Section):
    """Read by ``deepspeed.checkpointing.configure`` alone."""

    partition_activations: bool = False
    number_checkpoints: int | None = None
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    cpu_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Aio(Section):
    """Asynchronous files, for offload to NVMe."""

    block_size: int = above(0, 1048576)
    queue_depth: int = above(0, 8)
    intra_op_parallelism: int = above(0, 1)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """How DeepSpeed writes its part of a checkpoint."""

    tag_validation: str = "Warn"
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: dict[str, Any] | None = None
    checkpoint_serialization: bool = True
    writer: dict[str, Any] | None = None

    def problems(self) -> Iterator[str]:
        """What our checkpoints cannot go along with."""
        reasons = {
            "load_universal": "checkpoints of dat_ds are read as they were written",
            "use_node_local_storage": "a checkpoint lies in one folder that all machines share",
            "parallel_write": "it concerns pipeline parallelism, which is not supported",
            "writer": "a checkpoint is published when it is complete, and this one writes on",
        }
        for key, reason in reasons.items():
            if (value := getattr(self, key)) not in (None, False):
                yield f"{key}={value!r} is refused: {reason}. Remove it."


_DTYPES = (
    *("fp32", "float32", "float", "torch.float32"),
    *("bf16", "bfloat16", "torch.bfloat16"),
    *("fp16", "float16", "half", "torch.float16"),
)


def _dtype() -> Any:
    return option(None, "'fp32', 'bf16' or 'fp16'", _DTYPES.__contains__)


@dataclass(frozen=True, kw_only=True)
class DataTypes(Section):
    """Precision of gradients, parameters and buffers."""

    grad_accum_dtype: str | None = _dtype()
    param_dtype: str | None = _dtype()
    buffer_dtype: str | None = _dtype()
    keep_in_fp32_modules: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TorchAutocast(Section):
    """Autocast in the forward."""

    enabled: bool = False
    dtype: str = "bfloat16"
    lower_precision_safe_modules: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TopLevel(Section):
    """Numbers and switches that stand in no section; DeepSpeed takes them as they are."""

    gradient_clipping: float = at_least(0, 1.0)
    gradient_predivide_factor: float = above(0, 1.0)
    prescale_gradients: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True


SECTIONS: dict[str, type[Section]] = {
    **_REPORTS,
    "activation_checkpointing": ActivationCheckpointing,
    "aio": Aio,
    "checkpoint": Checkpoint,
    "data_types": DataTypes,
    "torch_autocast": TorchAutocast,
}


def check_sections(
    config: Mapping[str, Any],
    problems: list[str],
    *,
    kinds: Mapping[str, type[Section]] = SECTIONS,
    here: bool,
) -> None:
    """Check keys and types of sections, and what they need on this machine.

    Args:
        config: DeepSpeed's part of a run config.
        problems: Receives one message per problem found.
        kinds: Sections to check.
        here: Whether the run is to be carried out on this machine.
    """
    keys = TopLevel.known_keys()
    alone = {key: value for key, value in config.items() if key in keys and value != "auto"}
    found: list[str] = []
    parse_section(TopLevel, alone, "", found)
    problems += [problem.removeprefix(".") for problem in found]
    for key, kind in kinds.items():
        if key not in config:
            continue
        section = parse_section(kind, config[key], key, problems)
        if here and isinstance(section, Report) and section.enabled:
            problems += section.missing(key)
