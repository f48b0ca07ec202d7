"""What DeepSpeed logs of a run by itself: checks of these keys, and notes on what they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dat_ds.method import did_you_mean

_SWITCHES = ("disable_python_gc", "dump_state", "memory_breakdown", "wall_clock_breakdown")
_LEVELS = ("debug", "info", "warning", "error", "critical")
_SHOWING = ("debug", "info")


def check_logs(config: Mapping[str, Any], problems: list[str]) -> None:
    """Refuse values of these keys that fail in the middle of a run, or do something else.

    Args:
        config: DeepSpeed's part of a run config.
        problems: Receives one message per problem found.
    """
    problems += [
        f"{key}={config[key]!r} must be true or false."
        for key in _SWITCHES
        if not isinstance(config.get(key, False), bool)
    ]
    every = config.get("steps_per_print")
    if every is not None and not (type(every) is int and every >= 1):
        problems.append(f"steps_per_print={every!r} is not valid: write an integer of at least 1.")
    level = config.get("log_level")
    if level is not None and level not in _LEVELS:
        near = did_you_mean(str(level), _LEVELS)
        valid = ", ".join(repr(name) for name in _LEVELS)
        problems.append(f"log_level={level!r} is not valid{near}. Write one of {valid}.")
    throughput = _section(_section(config, "timers"), "throughput")
    if throughput.get("enabled"):
        problems.append(
            "timers.throughput.enabled=true is refused: DeepSpeed's throughput leaves out the "
            "attack, and waits for the device in every pass of it. Remove it: the metrics hold "
            "seconds_attack and seconds_update."
        )
    if _section(config, "autotuning").get("enabled"):
        problems.append(
            "autotuning.enabled=true is refused: it ends the process in the middle of a run, and "
            "times no attack. Remove it; dat-ds bench attack times a step."
        )
    if _section(config, "compile").get("deepcompile"):
        problems.append(
            "compile.deepcompile=true is refused: the attack's passes would reduce and gather as "
            "the update's do. Remove it, or write dat.engine.compile='attack' or 'all'."
        )


def log_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on what is asked for and not seen, to be logged once.

    Args:
        config: DeepSpeed's part of a resolved run config.
    """
    notes = []
    asked = [key for key in ("steps_per_print", "dump_state") if config.get(key)]
    if counts_traffic(config) and config["comms_logger"].get("verbose"):
        asked.append("comms_logger.verbose")
    if asked and config.get("log_level") not in _SHOWING:
        notes.append(
            f"{' and '.join(asked)}: DeepSpeed logs this at level info, which it does not show by "
            "default: write log_level='info' to see it"
        )
    if counts_traffic(config):
        notes.append(
            "comms_logger.enabled=true: DeepSpeed waits for each of its own collectives; "
            "deepspeed.comm.log_summary() shows them, which training does not call. The metrics "
            "hold bytes_sent"
        )
    if config.get("activation_checkpointing"):
        notes.append(
            "activation_checkpointing is read by deepspeed.checkpointing.configure alone: models "
            "of dat_ds go by dat.model.activation_checkpointing"
        )
    return tuple(notes)


def counts_traffic(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed is to count its collectives, which it would also do with ``false``."""
    return bool(_section(config, "comms_logger").get("enabled"))


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}
