"""Broken run configs are refused in words: whatever is done to a valid one, and never otherwise.

The long form, with a tally: ``python -m tests.properties.test_config_fuzz 10000``.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import json
import math
import os
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dat_ds.config import load_config
from dat_ds.config.deepspeed.keys import TOP_LEVEL_KEYS
from dat_ds.errors import ConfigError
from tests.settings import METHODS, TABLES, config_of

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
SHORT, SEED, LIMIT = 300, 0, 120
Random = random.Random


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus one": -1,
    "two and a half": 2.5,
    "huge": 2**63,
    "5000 digits": 10**5000,
    "minus 5000 digits": -(10**5000),
    "1e308": 1e308,
    "infinity": math.inf,  # what JSON makes of 1e400
    "minus infinity": -math.inf,
    "nan": math.nan,
    "1e400 in words": "1e400",
    "division by zero": "1/0",
    "nan in words": "nan",
    "5000 digits in words": "9" * 5000,
    "empty text": "",
    "NUL": "\0",
    "lone surrogate": "\ud800",
    "long text": "x" * 100_000,
    "auto": "auto",
    "code": "os:system",
    "empty list": [],
    "list of null": [None],
    "list of huge": [10**5000, 1],
    "mixed list": [1, "a", None, {}],
    "empty object": {},
    "object of itself": {"name": {"name": "pgd"}},
    "deep list": nested(200, lambda value: [value]),
    "deep object": nested(200, lambda value: {"a": value}),
    "very deep list": nested(20_000, lambda value: [value]),
}
"""What a value may be replaced by."""
KEYS = ["", "\0", "stpes", "nmae", "näme", "a.b", "dat", "name", "x" * 10_000, "a\nb", "__class__"]
"""Keys that nobody has asked for; ``name`` and ``dat`` in places where they mean nothing."""


@dataclass
class Tally:
    """What became of the configs tried."""

    accepted: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    reproductions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.accepted} accepted, {self.refused} refused, {self.faults.total()} faults of "
            f"{len(self.faults)} kinds"
        ]
        for kind, count in self.faults.most_common():
            lines.append(f"{count} x {kind}\n    {self.reproductions[kind]}")
        return "\n".join(lines)


def valid_configs() -> list[dict[str, Any]]:
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    shipped = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    resolved = [load_config(config).to_dict() for config in shipped]
    return shipped + resolved + [config_of(*method) for method in METHODS]


# ---- mutations, each described in words


def places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a config, also of sections."""
    items: Any = ()
    if isinstance(config, dict):
        items = config.items()
    elif isinstance(config, list) and len(config) < 50:
        items = enumerate(config)
    for key, value in items:
        yield (*path, key)
        if len(path) < 6:
            yield from places(value, (*path, key))


def at(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


def sections(config: Any) -> list[tuple[Any, ...]]:
    return [(), *(path for path in places(config) if isinstance(at(config, path), dict))]


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(key)[:30] for key in path)


def replace_value(config: dict[str, Any], rng: Random) -> str:
    path = rng.choice(list(places(config)))
    what = rng.choice(list(VALUES))
    at(config, path[:-1])[path[-1]] = copy_of(VALUES[what])
    return f"{dotted(path)} = {what}"


def copy_of(value: Any) -> Any:
    with contextlib.suppress(RecursionError):
        return copy.deepcopy(value)
    return value


def give_a_key(config: dict[str, Any], rng: Random) -> str:
    section = rng.choice(sections(config))
    known = sorted({key for _, _, key in _keys()})
    key = rng.choice([*KEYS, *rng.sample(known, 11)])
    what = rng.choice(list(VALUES))
    at(config, section)[key] = copy_of(VALUES[what])
    return f"{dotted((*section, key))!r} = {what}"


def _keys() -> list[tuple[str, str, str]]:
    return [(s, n, key) for s, n in METHODS for key in ("name", *TABLES[s][n].known_keys())]


def remove_a_key(config: dict[str, Any], rng: Random) -> str:
    path = rng.choice([p for p in places(config) if isinstance(at(config, p[:-1]), dict)])
    del at(config, path[:-1])[path[-1]]
    return f"without {dotted(path)}"


def move_a_key(config: dict[str, Any], rng: Random) -> str:
    path = rng.choice([p for p in places(config) if isinstance(at(config, p[:-1]), dict)])
    value = at(config, path[:-1]).pop(path[-1])
    section = rng.choice(sections(config))
    at(config, section)[path[-1]] = value
    return f"{dotted(path)} moved to {dotted(section) or 'the top'}"


def choose_another_method(config: dict[str, Any], rng: Random) -> str:
    section, name = rng.choice(METHODS)
    ours = config.setdefault("dat", {})
    if not isinstance(ours, dict):
        return "nothing"
    below = ours.get(section)
    ours[section] = {**(below if isinstance(below, dict) else {}), "name": name}
    return f"dat.{section}.name = {name!r} over what was there"


def add_another_method(config: dict[str, Any], rng: Random) -> str:
    """Settings of a second method beside the first."""
    section, name = rng.choice(METHODS)
    ours = config.setdefault("dat", {})
    if not isinstance(ours, dict):
        return "nothing"
    below = ours.get(section)
    second = config_of(section, name)["dat"][section]
    ours[section] = {**second, **(below if isinstance(below, dict) else {})}
    return f"dat.{section} with what {name!r} takes beside it"


def wrap_a_value(config: dict[str, Any], rng: Random) -> str:
    path = rng.choice(list(places(config)))
    holder = at(config, path[:-1])
    holder[path[-1]] = rng.choice([[holder[path[-1]]], {"name": holder[path[-1]]}])
    return f"{dotted(path)} in a list or an object"


MUTATIONS = [
    replace_value,
    replace_value,
    replace_value,
    give_a_key,
    give_a_key,
    remove_a_key,
    move_a_key,
    choose_another_method,
    add_another_method,
    wrap_a_value,
]
TEXTS: dict[str, Callable[[str], bytes]] = {
    "as it is": lambda text: text.encode("utf-8", "surrogatepass"),
    "twice the key": lambda text: text.replace("{", '{"dat": {}, "dat": {}, ', 1).encode(),
    "1e400": lambda text: re.sub(r"\d+", "1e400", text, count=1).encode(),
    "5000 digits": lambda text: re.sub(r"\d+", "9" * 5000, text, count=1).encode(),
    "deep nesting": lambda text: re.sub(
        r"\d+", "[" * 20_000 + "]" * 20_000, text, count=1
    ).encode(),
    "cut off": lambda text: text[: len(text) // 2].encode(),
    "NUL": lambda text: text.encode() + b"\0",
    "no UTF-8": lambda text: text.encode() + b"\xff",
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "nothing": lambda text: b"",
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "latin-1": lambda text: (text + '"é').encode("latin-1", "replace"),
    "NaN": lambda text: re.sub(r"\d+", "NaN", text, count=1).encode(),
    "Infinity": lambda text: re.sub(r"\d+", "-Infinity", text, count=1).encode(),
    "huge exponent": lambda text: re.sub(r"\d+", "1e999999999", text, count=1).encode(),
    "tiny exponent": lambda text: re.sub(r"\d+", "1e-999999999", text, count=1).encode(),
    "5000 decimals": lambda text: re.sub(r"\d+", "0." + "9" * 5000, text, count=1).encode(),
    "deep nesting of objects": lambda text: ('{"dat":' * 20_000 + "1" + "}" * 20_000).encode(),
    "unfinished nesting": lambda text: b"[" * 500_000,
    "twice a nested key": lambda text: re.sub(r'("\w+": \d+)', r"\1, \1", text, count=1).encode(),
    "lone surrogate": lambda text: text.replace('"', '"\\ud800', 1).encode(),
    "escaped NUL": lambda text: text.replace('"', '"\\u0000', 1).encode(),
    "control characters": lambda text: text.replace(" ", "\x01", 1).encode(),
    "a comment": lambda text: text.encode() + b"// the end",
    "a list": lambda text: f"[{text}]".encode(),
    "null": lambda text: b"null",
    "a number": lambda text: b"3",
    "100,000 keys": lambda text: json.dumps({f"k{i}": 1 for i in range(100_000)}).encode(),
    "20 MB": lambda text: text.encode() + b" " * 20_000_000,
    "random bytes": lambda text: random.Random(len(text)).randbytes(1000),
}
"""What is done to the text of a file."""
THINGS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to itself": lambda file: file.symlink_to(file),
    "a dangling link": lambda file: file.symlink_to("nowhere"),
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
    "an empty device": lambda file: file.symlink_to("/dev/null"),
    "no file": lambda file: None,
}
"""What may stand in the place of a file."""


# ---- one config


def names_a_key(line: str) -> bool:
    """Whether a line of a refusal says which key, file or override it is about."""
    if re.search(r"\b(dat|" + "|".join(TOP_LEVEL_KEYS) + r")(\.\S|=| and | are |')", line):
        return True
    starts = (
        r"(Unknown top-level key|Key|Keys given twice in the run config:|--set) |No optimizer: "
    )
    return bool(re.match(starts + r"|The run config: |.*\.json|\S+='auto' |Key '", line))


def outcome(load: Callable[[], Any]) -> str:
    """``accepted``, ``refused``, or in words what else happened."""
    try:
        run = load()
    except ConfigError as error:
        lines = str(error).split("\n")
        bad = [line for line in lines if not names_a_key(line)]
        long = [line for line in lines if len(line) > 30_000]
        if bad:
            return f"a line without a key: {bad[0][:200]!r}"
        return f"a line of {len(long[0])} characters: {long[0][:150]!r}" if long else "refused"
    except Exception as error:
        return where(error)
    try:
        written = json.dumps(run.to_dict())
        again = json.dumps(load_config(json.loads(written)).to_dict())
    except Exception as error:
        return f"accepted, but cannot be written and read: {where(error)}"
    return "accepted" if again == written else "accepted, but reads otherwise when written"


def where(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "dat_ds" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).relative_to(ROOT) if frames else last.filename}:{last.lineno}"
    try:
        words = str(error)[:100]
    except ValueError:
        words = "(too large to print)"
    return f"{type(error).__name__} at {place}: {re.sub('[0-9]{3,}', '(number)', words)}"


def tried(configs: list[dict[str, Any]], seed: int, folder: Path) -> tuple[str, str]:
    """Outcome of one random config, and how it came about."""
    rng = Random(seed)
    number = rng.randrange(len(configs))
    config = copy.deepcopy(configs[number])
    steps = [rng.choice(MUTATIONS)(config, rng) for _ in range(rng.choice([1, 1, 2, 3])) if config]
    story = f"seed {seed}: config {number}: {'; '.join(steps)}"
    route = rng.random()
    if route < 0.75:
        return outcome(lambda: load_config(config)), story
    if route < 0.85:
        path = rng.choice(list(places(configs[number])))
        value = rng.choice(["", "1e400", "NaN", "-1", "[", "9" * 5000, "[" * 20_000, "\0", "null"])
        override = f"{'.'.join(map(str, path))}={value}"
        story = f"seed {seed}: config {number}: --set {override[:80]}"
        return outcome(lambda: load_config(configs[number], overrides=[override])), story
    try:
        text = json.dumps(config)
    except (RecursionError, ValueError):
        text = json.dumps(configs[number])
    what = rng.choice(list(TEXTS))
    file = folder / f"{seed}.json"
    if rng.random() < 0.1:
        what = rng.choice(list(THINGS))
        THINGS[what](file)
    else:
        file.write_bytes(TEXTS[what](text))
    return outcome(lambda: load_config(file)), f"{story}; in a file: {what}"


def fuzz(count: int, first: int = SEED) -> Tally:
    tally, configs = Tally(), valid_configs()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            faulthandler.dump_traceback_later(LIMIT, exit=True)  # a hang is not an outcome
            try:
                found, story = tried(configs, seed, Path(folder))
            finally:
                faulthandler.cancel_dump_traceback_later()
            if found == "accepted":
                tally.accepted += 1
            elif found == "refused":
                tally.refused += 1
            else:
                tally.faults[found] += 1
                shorter = len(story) < len(tally.reproductions.get(found, story + " "))
                if shorter:
                    tally.reproductions[found] = story
    return tally


def test_a_mutated_config_is_accepted_or_refused_by_its_keys() -> None:
    tally = fuzz(SHORT)
    assert not tally.faults, str(tally)
    assert tally.accepted > SHORT // 20, "the mutations leave something whole"
    assert tally.refused > SHORT // 3, "the mutations break something"


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else SHORT))
