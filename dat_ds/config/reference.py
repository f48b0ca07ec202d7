"""The page of all ``dat`` keys, written from the schema itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dat_ds.config.schema import DatConfig, plain

_INTRODUCTION = """\
# Config keys

<!-- Written by: dat-ds config --reference -->

A run is one JSON file: a DeepSpeed config with our keys under `"dat"`. Any key, DeepSpeed's too,
can be set on the command line: `--set dat.attack.steps=10`. Lengths are pixel units in [0, 1],
written as a number or as a fraction such as `"8/255"`. `dat-ds config --deepspeed_config FILE
--print` shows the resolved run, with the defaults filled in that depend on other keys, and the
DeepSpeed defaults that change results.
"""


def reference() -> str:
    """Markdown tables of every key, its type, default and meaning."""
    pages = [_INTRODUCTION, *_section(DatConfig, "dat")]
    return "\n".join(pages)


def _section(cls: type, path: str) -> Iterator[str]:
    fields, nested = [], []
    hints, notes = get_type_hints(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        section = _section_type(hints[field.name])
        if section is not None:
            nested.append((section, f"{path}.{field.name}"))
        else:
            fields.append((field, notes.get(field.name, "")))
    yield f"## `{path}`\n"
    yield " ".join(inspect.cleandoc(cls.__doc__ or "").replace("``", "`").split()) + "\n"
    yield "| key | default | valid | meaning |"
    yield "| --- | --- | --- | --- |"
    for field, note in fields:
        valid = field.metadata.get("valid") or _spelled(cls, field.name)
        yield f"| `{field.name}` | {_default(field)} | {valid} | {note} |"
    yield ""
    for section, inner in nested:
        yield from _section(section, inner)


def _section_type(hint: Any) -> type | None:
    for candidate in (hint, *getattr(hint, "__args__", ())):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(plain(field.default_factory()))}`"
    return f"`{json.dumps(plain(field.default))}`"


def _spelled(cls: type, name: str) -> str:
    """The field's type as JSON users say it."""
    hint = get_type_hints(cls)[name]
    options = [arg for arg in getattr(hint, "__args__", (hint,)) if arg is not type(None)]
    if len(options) == 1 and get_origin(options[0]) is Literal:
        options = list(get_args(options[0]))
    if all(isinstance(option, str) for option in options):
        return ", ".join(f"`{option}`" for option in options)
    words = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}
    if len(options) == 1 and options[0] in words and getattr(hint, "__origin__", None) is not list:
        return words[options[0]]
    return "an object" if str(hint).startswith("dict") else "a list"


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            text = " ".join(str(following.value.value).split()).replace("``", "`")
            docs[statement.target.id] = text
    return docs
