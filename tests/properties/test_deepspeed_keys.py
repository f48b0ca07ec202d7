"""``dat-ds config`` and training agree on every key of DeepSpeed's part, nested ones included.

Values of every kind are put under keys of every section; what ``dat-ds config`` calls valid then
has to start and make a step, and what it refuses is refused by key. The long form, with a table:
``python -m tests.properties.test_deepspeed_keys 3000``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
import sys
from collections import Counter
from typing import Any

from dat_ds.config import load_config
from dat_ds.engine.deepspeed_part import check_deepspeed
from dat_ds.errors import ConfigError, UserError, is_out_of_memory
from tests.distributed import tiny
from tests.isolation import Outcome, isolated, where
from tests.properties.test_config_fuzz import VALUES, names_a_key
from tests.properties.test_odd_configs import DEEPSPEED, set_at

SHORT, BATCH, SECONDS = 60, 100, 120.0
ELSEWHERE = ("this device has no float16", "is not train_micro_batch_size_per_gpu=")
"""What a config cannot show by itself."""
NEAR = [0, 1, 2, 1.0, True, False, "true", "cpu", "none", "auto", {"device": "cpu"}, {"stage": 1}]
"""Values that are right under some key."""


def drawn(seed: int) -> tuple[dict[str, Any], str]:
    """A config with a key or two of DeepSpeed's changed, and which."""
    rng = random.Random(seed)
    values, story = tiny.config(rng.choice([0, 1, 2, 3]), dat={"attack": {"steps": 1}}), []
    for _ in range(rng.choice([1, 1, 2])):
        path, choices = rng.choice(DEEPSPEED)
        kind = rng.random()
        if kind < 0.25:  # a typo, or a key where it means nothing
            word = path[-1]
            place = rng.randrange(len(word))
            words = [
                word[:place] + word[place + 1 :],
                word + "s",
                "name",
                rng.choice(DEEPSPEED)[0][-1],
            ]
            path = (*path[:-1], rng.choice(words))
        if kind < 0.6:
            value = rng.choice(choices)
        elif kind < 0.8:
            value = rng.choice(NEAR)
        else:
            value = VALUES[rng.choice(list(VALUES))]
        if path[0] in ("bf16", "fp16", "torch_autocast", "comms_logger") and rng.random() < 0.5:
            set_at(values, (path[0], "enabled"), True)
        set_at(values, path, value)
        story.append(f"{'.'.join(path)}={shortened(value)}")
    return values, f"seed {seed}: {', '.join(story)}"


def shortened(value: Any) -> str:
    try:
        return repr(value)[:60]
    except (ValueError, RecursionError):
        return "(too large to print)"


def told(values: dict[str, Any]) -> Outcome:
    """What ``dat-ds config`` says."""
    try:
        check_deepspeed(load_config(values).deepspeed)
    except ConfigError as error:
        lines = str(error).removeprefix("DeepSpeed refuses its part of the config:\n").split("\n")
        bad = [line for line in lines if not (names_a_key(line) or re.match(r"[a-z_]+\.", line))]
        return ("refused without a key", bad[0][:300]) if bad else ("refused", str(error)[:300])
    except Exception as error:
        return "traceback", f"dat-ds config: {where(error)}"
    return "valid", ""


def started(values: dict[str, Any]) -> Outcome:
    """What becomes of a step of training."""
    import dat_ds

    try:
        engine, *_ = dat_ds.initialize(model=tiny.vit(), config=copy.deepcopy(values))
        x, y = tiny.images(4)
        engine.train_step([(x, y)] * int(engine.deepspeed.gradient_accumulation_steps()))
        engine.close()
    except UserError as error:
        return "refused", f"{type(error).__name__}: {error}"[:300]
    except Exception as error:
        if is_out_of_memory(error):
            return "out of memory", str(error)[:100]
        return "traceback", where(error)
    return "valid", ""


def verdicts(seeds: list[int], folder: str) -> Outcome:
    """Both verdicts of every seed, as JSON."""
    os.chdir(folder)
    found = []
    for seed in seeds:
        values, story = drawn(seed)
        first = told(copy.deepcopy(values)) if small(values) else told(values)
        second = started(values) if first[0] == "valid" else first
        found.append((first[0], second[0], f"{story}: {second[1]}"))
    return "done", json.dumps(found)


def small(values: dict[str, Any]) -> bool:
    try:
        copy.deepcopy(values)
    except RecursionError:
        return False
    return True


@dataclasses.dataclass
class Table:
    """Pairs of verdicts."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)

    def add(self, first: str, second: str, story: str) -> None:
        if second == "refused" and any(words in story for words in ELSEWHERE):
            second = "refused by the device or the number of ranks"
        kind = f"config: {first}, training: {second}"
        self.outcomes[kind] += 1
        if second not in (first, "refused by the device or the number of ranks"):
            self.faults.append(f"{kind}: {story}")

    def __str__(self) -> str:
        lines = [f"{count} x {kind}" for kind, count in self.outcomes.most_common()]
        return "\n".join([*lines, f"{len(self.faults)} faults", *self.faults])


def tried(count: int, folder: str, first: int = 0) -> Table:
    table = Table()

    def part(seeds: list[int]) -> None:
        limit = SECONDS if len(seeds) == 1 else 5 * SECONDS
        kind, words = isolated(verdicts, seeds, folder, seconds=limit)
        if kind == "done":
            for found in json.loads(words):
                table.add(*found)
        elif len(seeds) == 1:
            table.add("?", kind, f"{drawn(seeds[0])[1]}: {words}")
        else:
            for half in (seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]):
                part(half)

    for start in range(first, first + count, BATCH):
        part(list(range(start, min(start + BATCH, first + count))))
    return table


def test_what_config_calls_valid_trains_and_what_it_refuses_is_named(tmp_path: Any) -> None:
    table = tried(SHORT, str(tmp_path))
    assert not table.faults, str(table)
    assert len(table.outcomes) >= 2, "both verdicts occur"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        print(tried(int(sys.argv[1]), place, int(sys.argv[2]) if len(sys.argv) > 2 else 0))
