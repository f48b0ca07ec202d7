"""Names of classes and their order, from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dat_ds.contracts import MOST_CLASSES
from dat_ds.errors import DataError
from dat_ds.files import open_regular

_MOST_BYTES = 2**28


def read_class_map(path: str, key: str = "dat.data.class_map") -> tuple[str, ...]:
    """Names of classes in the order of their labels.

    Args:
        path: A text file with one name a line; or, ending in ``.json``, a list of names, or an
            object from names to labels.
        key: Key of the config that named it, for messages.

    Raises:
        DataError: It cannot be read, is empty, or names a class or a label twice.
    """
    where = f"{key}={path!r}"
    try:
        with open_regular(path) as stream:
            text = stream.read(_MOST_BYTES).decode("utf-8")
        names = _of_json(json.loads(text)) if Path(path).suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{where} is not a class map ({reason}): write a text file with one name a line, or a "
            '.json file with ["first", "second", ...] or {"first": 0, "second": 1, ...}.'
        ) from None
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not 0 < len(names) <= MOST_CLASSES:
        raise DataError(f"{where} holds {len(names)} names: write 1 to {MOST_CLASSES}.")
    if "" in names:
        raise DataError(
            f"{where}: the name of class {names.index('')} is empty. Each class needs its own name."
        )
    twice = (
        {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    )
    if twice:
        raise DataError(
            f"{where} names {listed(twice)} more than once: each class needs its own name."
        )
    return tuple(names)


def _of_json(content: Any) -> list[str]:
    """Names in the order of their labels.

    Raises:
        ValueError: It is neither a list of names nor an object from names to labels.
    """
    if isinstance(content, dict):
        labels = list(content.values())
        if any(type(label) is not int for label in labels):
            raise ValueError("a label is not an integer")
        if sorted(labels) != list(range(len(labels))):
            raise ValueError(f"the labels are not 0 to {len(labels) - 1}, each once")
        return sorted(content, key=content.__getitem__)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    raise ValueError("neither a list of names nor an object from names to labels")


def listed(names: Iterable[str]) -> str:
    """Name at most five, so that a wrong ImageNet folder does not print a thousand."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:5]) or "none"
    return f"{shown} and {len(ordered) - 5} more" if len(ordered) > 5 else shown
