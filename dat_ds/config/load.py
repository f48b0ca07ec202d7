"""Reading a run config: JSON file, overrides, checks. Every problem is reported in one error."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dat_ds.config.deepspeed.logs import log_notes
from dat_ds.config.deepspeed.optimizer import notes_on
from dat_ds.config.deepspeed.resolve import resolve_deepspeed
from dat_ds.config.former import without_foreign_keys, without_former_keys
from dat_ds.config.rules import check_run, cost_notes, resolve_dat, step_notes
from dat_ds.config.schema import DatConfig, RunConfig
from dat_ds.config.trackers import check_trackers
from dat_ds.errors import ConfigError
from dat_ds.files import open_regular
from dat_ds.method import Section, UnknownKey, import_methods, parse_section

_LARGEST_FILE = 2**24
_MOST_KEYS, _MOST_ITEMS = 1000, 10_000
_DEEPEST, _LONGEST_KEY, _LONGEST_TEXT = 50, 200, 10_000

DIGITS_MODEL = {
    "name": "vit_tiny_patch16_224",
    "patch_size": 4,
    "depth": 4,
    "embed_dim": 64,
    "num_heads": 4,
}
"""``dat.model`` where a config names none and the data are the embedded digits of 8 x 8 pixels."""


def load_config(
    source: str | Path | Mapping[str, Any] | RunConfig,
    *,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    client_optimizer: bool = False,
    imports: Sequence[str] = (),
    here: bool = True,
) -> RunConfig:
    """Read, merge, check and resolve a run config.

    Precedence: ``defaults`` < JSON < ``overrides``. Where no model is named, the embedded digits
    get :data:`DIGITS_MODEL`.

    Args:
        source: Path of a DeepSpeed JSON file with our ``"dat"`` section, or its content. A
            :class:`RunConfig` is returned as it is.
        overrides: ``"dotted.key=value"``; values are JSON, anything else is a string.
        defaults: Nested values for keys that the JSON leaves out (a recipe's choices).
        client_optimizer: The caller brings an optimizer of its own, so the config names none.
        imports: Modules whose methods the config may name, as ``"package.module:Class"``; they
            are imported, which runs their code.
        here: Whether the run is to be carried out on this machine, which then has to have what the
            run reports to, such as a monitor's package. False where a finished run is read.

    Returns:
        The resolved run.

    Raises:
        ConfigError: With all problems found, one per line.
    """
    if isinstance(source, RunConfig):
        return source
    for module in imports:
        import_methods(module)
    if isinstance(source, Mapping):
        refuse_absurd(source)
    values = read_values(source)
    for override in overrides:
        apply_override(values, override)
    refuse_absurd(values)
    values = _merge(dict(defaults or {}), values)
    ours = values.pop("dat", {})
    if isinstance(ours, dict) and _is_digits(ours.get("data", {})):
        model = ours.get("model", {})
        if isinstance(model, dict) and "name" not in model:
            ours["model"] = {**DIGITS_MODEL, **model}
    problems: list[str] = []
    ours = without_former_keys(without_foreign_keys(ours), problems)
    dat = resolve_dat(parse_dat(ours, problems), problems)
    deepspeed = resolve_deepspeed(
        values, dat, problems, client_optimizer=client_optimizer, here=here
    )
    check_trackers(dat.logging.trackers, deepspeed, problems, here=here)
    accumulation = deepspeed.get("gradient_accumulation_steps")
    check_run(dat, deepspeed, problems, accumulation=accumulation)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    notes = (
        *notes_on(deepspeed, dat),
        *log_notes(deepspeed),
        *cost_notes(dat),
        *step_notes(dat),
    )
    return RunConfig(deepspeed=deepspeed, dat=dat, notes=notes)


def parse_dat(values: Any, problems: list[str]) -> DatConfig:
    """The sections under ``"dat"``, before rules that concern several of them.

    Args:
        values: Decoded JSON, hopefully an object.
        problems: Receives one message per problem found; an unknown key that another section has
            is told where it belongs.
    """
    found: list[str] = []
    dat = parse_section(DatConfig, values, "dat", found)
    problems += [_with_home(problem, dat) for problem in found]
    return dat


_HOMES = {"lr": "optimizer.params.lr", "weight_decay": "optimizer.params.weight_decay"}
"""Keys of DeepSpeed's part that are looked for in ours."""


def _with_home(problem: str, dat: DatConfig) -> str:
    """A message about an unknown key, with the section that has a key of this very name.

    Args:
        problem: Any message.
        dat: Sections with the methods that were chosen.
    """
    if not isinstance(problem, UnknownKey):
        return problem
    key = problem.key
    homes = [
        f"dat.{name}.{key}"
        for name in dat.known_keys()
        if isinstance(part := getattr(dat, name), Section) and key in part.known_keys()
    ]
    homes += [_HOMES[key]] if key in _HOMES and not homes else []
    homes += [f"dat.{key}"] if key in dat.known_keys() and problem.section != "dat" else []
    return problem.belonging_to(homes[0]) if len(homes) == 1 else problem


def refuse_absurd(values: Mapping[str, Any]) -> None:
    """Refuse what no config holds, before anything else reads it or prints it.

    Args:
        values: Decoded JSON, or what a caller gives in its place.

    Raises:
        ConfigError: For integers beyond 64 bits, endless texts and keys, and endless nesting.
    """
    problems = []
    pending: list[tuple[str, Any, int]] = [("", values, 0)]
    while pending:
        path, value, depth = pending.pop()
        if isinstance(value, (Mapping, list, tuple)):
            if depth > _DEEPEST:
                problems.append(f"Key {path!r}: nested more than {_DEEPEST} deep.")
                continue
            if len(value) > (_MOST_KEYS if isinstance(value, Mapping) else _MOST_ITEMS):
                at = f"Key {path!r}" if path else "The run config"
                problems.append(f"{at}: {len(value)} entries, which no run config has.")
                continue
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                if not str(key).isprintable() or len(str(key)) > _LONGEST_KEY:
                    at = f"{path}.{str(key)[:40]}" if path else str(key)[:40]
                    problems.append(f"Key {at!r} is not a key: it is too long, or not printable.")
                    continue
                pending.append((f"{path}.{key}" if path else str(key), item, depth + 1))
        elif isinstance(value, int) and abs(value) >= 2**63:
            problems.append(f"Key {path!r}: an integer beyond 64 bits.")
        elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
            problems.append(f"Key {path!r}: a text of {len(value)} characters.")
    if problems:
        raise ConfigError("\n".join(problems))


def _is_digits(data: Any) -> bool:
    return isinstance(data, Mapping) and data.get("name", "digits") == "digits"


def read_values(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A run config as it is written, unchecked: of a file, or a copy of its content.

    Raises:
        ConfigError: For a file that cannot be read, or is not a JSON object.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    path = Path(source)
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST_FILE + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
        raise ConfigError(f"Cannot read the run config {str(path)!r}: {error}.") from None
    if len(content) > _LARGEST_FILE:
        raise ConfigError(f"{path}: more than {_LARGEST_FILE} bytes, which no run config has.")
    try:
        values = json.loads(text, object_pairs_hook=_reject_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of 5000 digits
        raise ConfigError(f"{path}: JSON that no run config holds ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the run config must be a JSON object.")
    return values


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ConfigError(f"Keys given twice in the run config: {', '.join(twice)}.")
    return values


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, objects merged key by key.

    An object that names another method than the one below it does not inherit that one's options.
    """
    merged = copy.deepcopy(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict) and _same_method(below, value):
            merged[key] = _merge(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _same_method(below: Mapping[str, Any], top: Mapping[str, Any]) -> bool:
    names = [section["name"] for section in (below, top) if "name" in section]
    return len(set(map(str, names))) < 2


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the value of ``"dotted.key=value"`` within nested values.

    Raises:
        ConfigError: For text of another form.
    """
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(
            f"--set {override!r} is not 'dotted.key=value', as in dat.attack.steps=10."
        )
    *parents, last = path.split(".")
    node = values
    for i, key in enumerate(parents):
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(parents[: i + 1])} is not a section.")
        node = child
    try:
        node[last] = json.loads(text)
    except json.JSONDecodeError:
        node[last] = text
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"--set {path}: a value that no run config holds ({error}).") from None
