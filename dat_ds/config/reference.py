"""The page of all ``dat`` keys, written from the schema itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dat_ds.config.schema import DatConfig
from dat_ds.method import Section, Table, plain, summary_of

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


_CARDS = """\
# Methods

<!-- Written by: dat-ds config --methods -->

What the sections of a run config choose by `name`. Costs are in forwards `F` of the micro-batch: an
input gradient costs another `F`, and a full training step `3 F`, so a step with a K-step attack
costs `(2K + 3) F`. Keys and defaults: [config.md](config.md).
"""


def methods() -> str:
    """Markdown of every method: an overview of each table, and a card for each of its methods."""
    pages = [_CARDS]
    for key, field in DatConfig.known_keys().items():
        table = field.metadata.get("table")
        if isinstance(table, Table):
            pages += _cards(table, f"dat.{key}")
    return "\n".join(pages)


def _cards(table: Table[Any], path: str) -> Iterator[str]:
    yield f"## `{path}`\n"
    yield "| name | what it does | cost | source |"
    yield "| --- | --- | --- | --- |"
    for name, method in table.items():
        summary = summary_of(method).replace("|", r"\|")  # bars of norms would end the cell
        yield f"| `{name}` | {summary} | {method.cost} | {method.paper} |"
    yield ""
    for name, method in table.items():
        yield f"### {name}\n"
        yield _words(method) + "\n"
        section = {"name": name, **{k: v for k, v in method().to_dict().items() if v is not None}}
        own = {
            k: v
            for k, v in section.items()
            if k == "name" or not _is_inherited(method, table.base, k)
        }
        yield f"```json\n{json.dumps({path.removeprefix('dat.'): own})[1:-1]}\n```\n"
        if method.card:
            yield method.card
        if method.paper:
            yield f"Source: {method.paper}.\n"


def _section(cls: type[Section], path: str) -> Iterator[str]:
    nested = {}
    for key, field in cls.known_keys().items():
        section = field.metadata.get("table") or _section_type(get_type_hints(cls)[key])
        if section is not None:
            nested[key] = section
    yield f"## `{path}`\n"
    yield _words(cls) + "\n"
    yield from _rows(cls, [key for key in cls.known_keys() if key not in nested])
    for key, section in nested.items():
        if isinstance(section, Table):
            yield from _methods(section, f"{path}.{key}")
        else:
            yield from _section(section, f"{path}.{key}")


def _methods(table: Table[Any], path: str) -> Iterator[str]:
    """Reference of a section's methods: the keys of all, then those of each."""
    common = list(table.base.known_keys())
    yield f"## `{path}`\n"
    about = _words(table.base).split(". ")[0].rstrip(".")
    yield f"{about}. A key that the chosen one does not take is refused.\n"
    names = ", ".join(f"`{name}`" for name in table)
    if table.names:
        yield f"`name` is {table.names}.\n"
    else:
        yield f"`name` is one of {names}. Default: `{table.default}`.\n"
    if common:
        yield from _rows(table.base, common)
    for name, method in table.items():
        own = [key for key in method.known_keys() if not _is_inherited(method, table.base, key)]
        left_out = [key for key in common if key not in method.known_keys()]
        heading = f"{path} of {name}" if table.names else f"{path}.name={json.dumps(name)}"
        yield f"### `{heading}`\n"
        yield _words(method) + "\n"
        if left_out:
            yield f"It does not take {', '.join(f'`{key}`' for key in left_out)}.\n"
        if own:
            yield from _rows(method, own)


def _is_inherited(method: type[Section], base: type[Section], key: str) -> bool:
    """Whether a key and its default are those of all methods."""
    mine, theirs = method.known_keys()[key], base.known_keys().get(key)
    return theirs is not None and _default(mine) == _default(theirs)


def meanings(section: str, name: str | None = None) -> dict[str, str]:
    """First sentence of what each key of a section means.

    Args:
        section: Key of ``dat``, such as ``"attack"``.
        name: The method that it chooses, where it chooses one.
    """
    field = DatConfig.known_keys()[section]
    table = field.metadata.get("table")
    cls = _section_type(get_type_hints(DatConfig)[section])
    if isinstance(table, Table):
        cls = table.find(name, section, []) if name is not None else table[table.default]
    assert cls is not None
    notes = {key: text.split(". ")[0].rstrip(".") + "." for key, text in _notes(cls).items()}
    return notes | ({} if name is None else {"name": summary_of(cls)})


def _notes(cls: type[Section]) -> dict[str, str]:
    """The docstring under each field, inherited ones too."""
    notes: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        if kind is not Section and dataclasses.is_dataclass(kind):
            notes |= _field_docs(kind)
    return notes


def _rows(cls: type[Section], keys: Sequence[str]) -> Iterator[str]:
    notes = _notes(cls)
    yield "| key | default | valid | meaning |"
    yield "| --- | --- | --- | --- |"
    for key in keys:
        field = cls.known_keys()[key]
        valid = field.metadata.get("valid") or _spelled(cls, key)
        yield f"| `{key}` | {_default(field)} | {valid} | {notes.get(key, '')} |"
    yield ""


def _words(cls: type[Section]) -> str:
    """A section's docstring, but for what concerns its source."""
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\nAttributes:")[0]
    return " ".join(text.split("\n\nArgs:")[0].replace("``", "`").split())


def _section_type(hint: Any) -> type[Section] | None:
    for candidate in (hint, *getattr(hint, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
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
