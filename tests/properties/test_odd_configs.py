"""A config that is odd and valid trains, or is refused in words: no traceback, no hang.

Values at the ends of every key's range, ours and DeepSpeed's, alone and in pairs, are trained for
two steps. The long form, with a table: ``python -m tests.properties.test_odd_configs 300``.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import tempfile
import time
import types
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dat_ds.config import DatConfig, load_config
from dat_ds.config.deepspeed.sections import SECTIONS
from dat_ds.engine.deepspeed_part import check_deepspeed
from dat_ds.errors import ConfigError, NumericsError, UserError, is_out_of_memory
from dat_ds.length import Length, OfEps
from dat_ds.method import Section
from tests.integration import tiny_run
from tests.isolation import Outcome, isolated
from tests.settings import METHODS, TABLES, settings_of

SHORT, SECONDS = 3, 60.0
Path = tuple[str, ...]

INTEGERS = [0, 1, 2, 3, 5, 1000, 10**6, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -1]
NUMBERS = [0.0, 1e-300, 1e-30, 1e-7, 0.5, 1.0, 1.5, 1e3, 1e7, 1e30, 1e60, 1e300, -0.5, -1e300]
LENGTHS = [0, "0/1", "1/255", 1e-300, 1e-30, 0.5, 1, 2, 1e30, 1e60, 1e300]
TEXTS = ["", " ", "x", "/dev/null", "/proc/self/mem", ".", "\U0001f600", "float16", "auto", "pgd-1"]


def values_of(hint: Any) -> list[Any]:
    """Odd values of a key by its type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [
            None,
            *(v for arg in get_args(hint) if arg is not type(None) for v in values_of(arg)),
        ]
    if origin is Literal:
        return list(get_args(hint))
    if origin is list:
        items = values_of(get_args(hint)[0]) or [{}, {"match": "("}, 1]  # sections
        return [[], items[:1], items[:2], items[-2:], items[:5], [items[1]] * 3]
    if origin is dict:
        return [{}, {"a": 1}, {"l2": 1e30}, {"l1": 1e-30, "l2": 0}]
    table = {bool: [False, True], int: INTEGERS, float: NUMBERS, str: TEXTS, Length: LENGTHS}
    table[OfEps] = ["eps", "0 eps", "1e3 eps", "eps/1000000", "2 eps/3"]
    return table.get(hint, [])


def keys_of_section(section: type[Section], path: Path) -> Iterator[tuple[Path, list[Any]]]:
    hints = get_type_hints(section)
    for key, field in section.known_keys().items():
        if field.metadata.get("table") is not None:
            continue
        hint = hints[key]
        if isinstance(hint, type) and issubclass(hint, Section):
            yield from keys_of_section(hint, (*path, key))
        elif values := values_of(hint):
            yield (*path, key), values


def keys_of_model(model: Any, path: Path) -> Iterator[tuple[Path, list[Any]]]:
    """Keys of one of DeepSpeed's pydantic models."""
    for name, field in model.model_fields.items():
        key = (*path, field.alias or name)
        hint = field.annotation
        inner = [arg for arg in (hint, *get_args(hint)) if hasattr(arg, "model_fields")]
        if inner:
            yield from keys_of_model(inner[0], key)
            continue
        members = [arg for arg in (hint, *get_args(hint)) if hasattr(arg, "__members__")]
        if members:
            yield key, [member.value for member in members[0]]
        elif values := values_of(hint):
            yield key, values


def deepspeeds_keys() -> list[tuple[Path, list[Any]]]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
    }
    scalars: dict[str, list[Any]] = {
        "train_batch_size": INTEGERS,
        "train_micro_batch_size_per_gpu": INTEGERS,
        "gradient_accumulation_steps": INTEGERS,
        "gradient_clipping": NUMBERS,
        "gradient_predivide_factor": NUMBERS,
        "prescale_gradients": [False, True],
        "communication_data_type": [None, *TEXTS, "fp32", "bf16", "fp16", "int8"],
        "steps_per_print": INTEGERS,
        "wall_clock_breakdown": [True],
        "memory_breakdown": [True],
        "dump_state": [True],
        "disable_python_gc": [True],
        "zero_allow_untested_optimizer": [False, True],
        "zero_force_ds_cpu_optimizer": [False, True],
        "log_level": ["debug", "critical"],
    }
    optimizers = [
        "Adam",
        "AdamW",
        "SGD",
        "Lion",
        "Muon",
        "MuAdam",
        "MuAdamW",
        "MuSGD",
        "Adagrad",
        "Lamb",
        "OneBitAdam",
    ]
    optimizers += [
        "RMSprop",
        "Rprop",
        "ASGD",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adadelta",
        "Adafactor",
        "LBFGS",
        "SparseAdam",
    ]
    parameters = {"lr": NUMBERS, "eps": NUMBERS, "weight_decay": NUMBERS, "momentum": NUMBERS}
    betas = [[], [0.9], [0, 0], [0.9, 1.0], [1, 2, 3], [0.9, 0.999], 0.9, None, ["a", "b"]]
    return [
        *(key for name, model in models.items() for key in keys_of_model(model, (name,))),
        *(key for name, section in SECTIONS.items() for key in keys_of_section(section, (name,))),
        *(((key,), values) for key, values in scalars.items()),
        *((("optimizer", "params", key), values) for key, values in parameters.items()),
        (("optimizer", "params", "betas"), betas),
        *([(("optimizer", "type"), list(optimizers))] * 4),
    ]


def our_keys() -> list[tuple[Path, list[Any]]]:
    keys = dict(keys_of_section(DatConfig, ("dat",)))
    del keys["dat", "engine", "compile"]  # minutes a model
    return list(keys.items())


def set_at(values: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        below = values.get(key)
        values[key] = dict(below) if isinstance(below, dict) else {}
        values = values[key]
    values[path[-1]] = value


def base() -> dict[str, Any]:
    """Two steps of a tiny model, and everything around them small."""
    values = tiny_run.config(typing.cast(Any, "run"))
    values["dat"]["schedule"] = {"epochs": 1, "max_steps": 2}
    values["dat"]["evaluation"] |= {"num_examples": 8, "validation_examples": 8}
    return values


def drawn(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A config, and what is odd about it."""
    values, story = base(), []
    kind = rng.random()
    for _ in range(rng.choice([1, 1, 2])):
        if kind < 0.45:
            path, choices = rng.choice(DEEPSPEED)
        elif kind < 0.7:
            path, choices = rng.choice(OURS)
        else:
            section, name = rng.choice([m for m in METHODS if m[1] not in NEEDS_FILES])
            chosen = values["dat"].get(section, {})
            if chosen.get("name") != name:
                kept = {"epochs": 1, "max_steps": 2} if section == "schedule" else {}
                values["dat"][section] = settings_of(section, name) | kept
                story.append(f"dat.{section}.name={name!r}")
            if section == "optimizer":
                values.pop("optimizer", None)
            if section == "data":
                values["dat"]["data"].setdefault("img_size", 8)
            keys = list(keys_of_section(TABLES[section][name], ("dat", section)))
            if not keys:
                continue
            path, choices = rng.choice(keys)
        value = rng.choice(choices)
        if path[-1] == "enabled" or (
            path[0] in SECTIONS and "enabled" in SECTIONS[path[0]].known_keys()
        ):
            set_at(values, (path[0], "enabled"), True)
        if path[0] in ("bf16", "fp16"):
            set_at(values, (path[0], "enabled"), True)
        set_at(values, path, value)
        story.append(f"{'.'.join(path)}={value!r}")
    if rng.random() < 0.5 and "zero_optimization.stage" not in " ".join(story):
        stage = rng.choice([0, 1, 3])
        set_at(values, ("zero_optimization", "stage"), stage)
        story.append(f"zero_optimization.stage={stage}")
    return values, " ".join(story)


NEEDS_FILES = ("cifar10", "cifar100", "npz", "imagefolder", "hat")
OURS, DEEPSPEED = our_keys(), deepspeeds_keys()


def trained(values: dict[str, Any]) -> Outcome:
    from dat_ds.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            run = load_config(values)
            record = train(run)
        except NumericsError as error:
            return "not finite", str(error)
        except UserError as error:
            return "refused later", str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return "out of memory", str(error)
    return ("record", "") if record is not None else ("no record", "")


@dataclasses.dataclass
class Table:
    """What became of the configs."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    later: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.outcomes.most_common())
        return "\n".join([f"odd configs: {counts}", *self.later, *self.faults])


def tried(count: int, first: int = 0, *, told: bool = False) -> Table:
    """Train ``count`` odd configs that the checks accept."""
    table, seed, started = Table(), first, time.time()
    while count:
        values, story = drawn(random.Random(seed))
        seed += 1
        try:
            run = load_config(values)
            check_deepspeed(run.deepspeed)
        except ConfigError:
            table.outcomes["refused"] += 1
            continue
        count -= 1
        kind, words = isolated(trained, values, seconds=SECONDS)
        if kind == "hang" and any("passes of the model" in note for note in run.notes):
            kind = "long, as it said"
        table.outcomes[kind] += 1
        line = f"[{seed - 1}] {story}: {kind}: {words}"
        if kind in ("traceback", "hang", "died", "no record"):
            table.faults.append(line)
        elif kind == "refused later":
            table.later.append(line)
        if told:
            print(f"{time.time() - started:.0f} s {line[:600]}", flush=True)
    return table


def test_an_odd_config_trains_or_is_refused_in_words() -> None:
    table = tried(SHORT)
    assert not table.faults, str(table)
    assert table.outcomes["record"] > 0


if __name__ == "__main__":
    print(tried(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, told=True))
