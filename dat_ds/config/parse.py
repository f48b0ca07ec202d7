"""Strict conversion of JSON values into the config dataclasses, collecting every problem."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dat_ds.length import Length

T = TypeVar("T")
_INVALID = object()
_ARTICLES = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
}


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest choice, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def parse_section(cls: type[T], values: Any, path: str, problems: list[str]) -> T:
    """Build the dataclass ``cls`` from JSON values.

    Args:
        cls: A config dataclass.
        values: Decoded JSON, hopefully an object.
        path: Dotted path of the section, for messages.
        problems: Receives one message per problem found.

    Returns:
        The section; a key with a problem keeps its default, so that later checks can go on.
    """
    if not isinstance(values, Mapping):
        problems.append(f"{path}={values!r} must be an object with the keys {_names(cls)}.")
        return cls()
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            problems.append(
                f"Unknown key in the run config: {path}.{key}{did_you_mean(key, fields)}. "
                f"Valid keys of {path!r}: {_names(cls)}."
            )
    hints = get_type_hints(cls)
    parsed = {}
    for name, field in fields.items():
        if name in values:
            value = _convert(values[name], hints[name], f"{path}.{name}", problems)
            if value is not _INVALID and _passes(value, field, f"{path}.{name}", problems):
                parsed[name] = value
    return cls(**parsed)


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _passes(value: Any, field: dataclasses.Field[Any], path: str, problems: list[str]) -> bool:
    check = field.metadata.get("check")
    if value is None or check is None or check(value):
        return True
    problems.append(f"{path}={value!r} is not valid: write {field.metadata['valid']}.")
    return False


def _convert(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """``value`` as the type ``hint``, or ``_INVALID`` after reporting why not."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
        return _convert(value, hint, path, problems)
    if dataclasses.is_dataclass(hint):
        return parse_section(hint, value, path, problems)  # type: ignore[arg-type]
    if origin is Literal:
        choices = get_args(hint)
        if value in choices:
            return value
        hinted = did_you_mean(value, choices) if isinstance(value, str) else ""
        valid = ", ".join(repr(choice) for choice in choices)
        problems.append(f"{path}={value!r} is not valid{hinted}. Write one of {valid}.")
        return _INVALID
    if origin is list:
        if not isinstance(value, list):
            problems.append(f"{path}={value!r} must be a list.")
            return _INVALID
        (item,) = get_args(hint)
        items = [_convert(v, item, f"{path}[{i}]", problems) for i, v in enumerate(value)]
        return _INVALID if any(v is _INVALID for v in items) else items
    if origin is dict:
        if isinstance(value, dict):
            return value
        problems.append(f"{path}={value!r} must be an object.")
        return _INVALID
    return _convert_scalar(value, hint, path, problems)


def _convert_scalar(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    if hint is Length:
        try:
            if not isinstance(value, bool):
                return Length(value)
        except (TypeError, ValueError):
            pass
        problems.append(f"{path}={value!r} is not a length: write 0.03 or '8/255' (pixel units).")
        return _INVALID
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is int and is_number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    problems.append(f"{path}={value!r} must be {_ARTICLES[hint]}.")
    return _INVALID
