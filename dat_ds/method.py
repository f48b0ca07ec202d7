"""Methods: what a section of the run config chooses by name, and what it then is.

A :class:`Section` is a frozen dataclass whose fields are the keys of a JSON object; :func:`option`
gives a field its range in words, its check, and the traits that its value brings. A
:class:`Method` is a section with a name: an attack, an objective, an optimizer. A :class:`Table`
holds the methods among which a section chooses. What several methods cannot do together is said
once for each pair of traits (:class:`Rule`), not for pairs of names.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import importlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from dat_ds.errors import ConfigError
from dat_ds.length import Length, OfEps, parse_step

S = TypeVar("S", bound="Section")
M = TypeVar("M", bound="Method")
_INVALID = object()
LARGEST_INTEGER = 2**31 - 1
"""Of every key of ours: no count, size or seed needs more, and products of two fit 64 bits."""
_MOST_NAMED = 2  # methods that have a key, in the message of one that has not
_ARTICLES = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
}


class Trait(enum.Enum):
    """Property of a part of a run, as a phrase that follows its key in a message."""

    ASKS_THE_HOST = "leaves decisions to the host"
    CARRIES_PERTURBATIONS = "goes on with the perturbation of earlier steps"
    CHANGES_SIZES = "changes the size of images along the run"
    CHANGES_THE_MODEL = "changes the model from call to call"
    COMPARES_ACCURACIES = "compares accuracies"
    COMPARES_SAMPLES = "compares the images of a batch with one another"
    COMPARES_WITH_STRONGER = "compares the attack with a stronger one in the same ball"
    COMPILES = "compiles the model's forward"
    COMPILES_THE_UPDATE = "compiles the update's forward"
    CONCERNS_LABELS = "concerns labels"
    CONCERNS_UNLABELLED = "concerns unlabelled images"
    COPIES_IMAGES = "trains on several perturbations of each image"
    DROPS_GRADIENTS = "loses the gradients of what lies behind frozen layers"
    FLAT_AT_THE_IMAGE = "has no gradient at the image itself"
    FOLDS_WEIGHTS = "needs whole weights before the forward"
    FREEZES = "freezes parameters"
    GATHERS_PARAMETERS = "gathers parameters forward by forward, into other memory"
    GOES_BY_THE_BATCH = "lets BatchNorm and dropout go by the batch that is attacked"
    GROUPS_MICRO_BATCHES = "attacks several micro-batches as one"
    HAS_NO_STRONGER = "has no stronger attack in the same ball"
    HAS_NO_UNLABELLED = "leaves no image unlabelled"
    KNOWS_NO_CLASSES = "knows no classes"
    LACKS_LABELS = "leaves images without labels"
    LEARNS_NO_CLASSES = "learns no classes"
    LOOKS_AT_CLASSES = "looks at which images are misclassified"
    LOSS_OF_CLASSES = "is a loss of class logits"
    MAKES_NO_IMAGES = "makes no adversarial images"
    MIXES_LABELS = "makes labels probabilities"
    NEEDS_ADVERSARIAL = "needs adversarial images"
    NEEDS_GRADIENT_LENGTHS = "needs the length of input gradients"
    NEEDS_LABELS = "needs labels"
    NEEDS_START = "compares outputs with those of where the attack started"
    NEEDS_TRUE_CLASS = "needs a true class"
    OWN_PRECISION = "gives the attack a precision of its own"
    RECORDS_THE_ATTACK = "records the attack and replays it"
    REFUSES_PLAIN_GRADIENTS = "allows no gradients apart from the update's"
    SAVES_RANDOM_STATES = "saves and restores random states in every pass"
    SHORT_MODEL = "gives the whole model 16 bits"
    SHOWS_OTHER_VIEWS = "shows other views of each image in every step"
    SPLITS_BATCH_NORM = "gives each kind of image statistics of its own"
    STARTS_AT_THE_IMAGE = "starts at the image itself"
    SUPPORTS_CLASSES = "is for a model that learns classes"
    TAKES_GRADIENTS_APART = "takes gradients apart from the update's"
    TELLS_NO_START = "does not tell where it started"
    UNDERFLOWS = "lets input gradients underflow"


@dataclass(frozen=True)
class Rule:
    """Two traits that do not go together.

    Args:
        first: A trait.
        second: Another one.
        remedy: Advice that ends the message.
    """

    first: Trait
    second: Trait
    remedy: str = "Remove one of them."


Facts = Iterable[tuple[Trait, str]]
"""Traits found in a run, each with the key and value that brings it."""


def broken(rules: Iterable[Rule], facts: Facts) -> Iterator[str]:
    """One message for each pair of facts that a rule forbids."""
    found: dict[Trait, list[str]] = {}
    for trait, words in facts:
        found.setdefault(trait, []).append(words)
    for rule in rules:
        for first in found.get(rule.first, ()):
            for second in found.get(rule.second, ()):
                yield (
                    f"{first} {rule.first.value}, but {second} {rule.second.value}. {rule.remedy}"
                )


# ---- options


def option(
    default: Any,
    valid: str | None = None,
    check: Callable[[Any], bool] | None = None,
    *,
    traits: Mapping[Trait, Callable[[Any], bool]] | None = None,
    is_key: bool = True,
) -> Any:
    """A field of a section.

    Args:
        default: Its default; a list or dict is copied for every instance. None where it depends on
            other sections, or where there is none.
        valid: The valid values, in words; None: described by the type.
        check: Decides; not asked about None.
        traits: Traits that a value may bring to the run.
        is_key: Whether it is a key of the JSON.
    """
    metadata = {"valid": valid, "check": check, "traits": traits or {}, "is_key": is_key}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def at_least(bound: float, default: Any, **more: Any) -> Any:
    """A number of at least ``bound``."""
    return option(default, f"a number of at least {bound:g}", lambda v: v >= bound, **more)


def step_length() -> Any:
    """A step size, by default that of the attack: a length, or a multiple of eps."""
    valid = "a length of at least 0, such as '2/255', or a multiple of eps, such as 'eps/4'"
    return option(None, valid, lambda v: isinstance(v, OfEps) or v >= 0)


def above(bound: float, default: Any, **more: Any) -> Any:
    """A number above ``bound``."""
    return option(default, f"a number above {bound:g}", lambda v: v > bound, **more)


def fraction(default: Any, **more: Any) -> Any:
    """A number in [0, 1)."""
    return option(default, "a number in [0, 1)", lambda v: 0 <= v < 1, **more)


def share(default: Any, **more: Any) -> Any:
    """A number in [0, 1]."""
    return option(default, "a number in [0, 1]", lambda v: 0 <= v <= 1, **more)


def positive_share(default: Any, **more: Any) -> Any:
    """A number in (0, 1]."""
    return option(default, "a number in (0, 1]", lambda v: 0 < v <= 1, **more)


# ---- sections and methods


@dataclass(frozen=True, kw_only=True)
class Section:
    """A JSON object of the run config."""

    @classmethod
    def known_keys(cls) -> dict[str, dataclasses.Field[Any]]:
        """Its keys, in the order of their declaration."""
        return {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("is_key", True)}

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that depend on values of the same section, by key."""
        return {}

    def problems(self) -> Iterator[str]:
        """Contradictions between its own keys; each message starts with a key."""
        return iter(())

    def facts(self, path: str) -> Iterator[tuple[Trait, str]]:
        """Traits that its values bring to the run, with the dotted key and value that do."""
        for key, f in self.known_keys().items():
            value = getattr(self, key)
            for trait, brings in f.metadata.get("traits", {}).items():
                if value is not None and brings(value):
                    yield trait, f"{path}.{key}={shown(value)}"

    def to_dict(self) -> dict[str, Any]:
        """Its keys as JSON-serialisable values; parsing them gives an equal section."""
        return {key: plain(getattr(self, key)) for key in self.known_keys()}


@dataclass(frozen=True, kw_only=True)
class Method(Section):
    """A section that was chosen by its name.

    The docstring of a subclass says what the method does, with its source; its first line is the
    summary of tables and help pages.

    Attributes:
        kind: Kind of method, in words: ``"attack"``.
        name: Value of the section's ``name``.
        traits: Traits that it brings to every run.
        cost: Cost in a training step, in forwards ``F`` of the micro-batch, where it has a
            cost of its own.
        paper: Where it is from.
        required: Keys that a run must give, and what they are to hold.
        passes_over_others: Whether other methods' keys beside its name are not a mistake.
        card: Markdown for its page: formula, defaults and where they come from, when it fails.
    """

    kind: ClassVar[str] = "method"
    name: ClassVar[str]
    traits: ClassVar[frozenset[Trait]] = frozenset()
    cost: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    passes_over_others: ClassVar[bool] = False
    required: ClassVar[Mapping[str, str]] = {}
    card: ClassVar[str] = ""

    def chosen_at(self, path: str) -> str:
        """The key and value that chose it, for messages."""
        return f"{path}.name={name_of(type(self))!r}"

    def facts(self, path: str) -> Iterator[tuple[Trait, str]]:
        """Its traits, under its name, and those of its values."""
        for trait in sorted(self.traits, key=lambda trait: trait.name):
            yield trait, self.chosen_at(path)
        yield from super().facts(path)

    def to_dict(self) -> dict[str, Any]:
        """Its name and keys."""
        return {"name": name_of(type(self)), **super().to_dict()}


def name_of(method: type[Method]) -> str:
    """Value of ``name`` that selects a method: its name, or ``MODULE:CLASS`` from outside."""
    if is_from_outside(method):
        return f"{method.__module__}:{method.__qualname__}"
    return method.name


def is_from_outside(item: Any) -> bool:
    """Whether a class or a function is defined outside this package."""
    module = str(getattr(item, "__module__", ""))
    return module.split(".")[0] != __name__.split(".")[0]


@dataclass(frozen=True)
class Table(Mapping[str, type[M]]):
    """The methods among which a section chooses, by name.

    Args:
        kind: Kind of the methods, in words.
        base: Class of all of them.
        methods: By name.
        default: Name of the one that an empty section is.
        names: Valid names in words, where they are not those of the methods.
    """

    kind: str
    base: type[M]
    methods: Mapping[str, type[M]]
    default: str
    names: str = ""

    def __getitem__(self, name: str) -> type[M]:
        return self.methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def find(self, name: Any, path: str, problems: list[str]) -> type[M] | None:
        """The method of that name; None after saying why there is none.

        A name ``"package.module:Class"`` is looked up in modules that :func:`import_methods`
        imported, and in no others: a JSON file by itself runs no code.
        """
        if isinstance(name, str) and ":" in name:
            return self._find_own(name, path, problems)
        if isinstance(name, str) and name in self.methods:
            return self.methods[name]
        hint = did_you_mean(name, self.methods) if isinstance(name, str) else ""
        valid = ", ".join(repr(choice) for choice in self.methods)
        problems.append(f"{path}.name={name!r} is not valid{hint}. Write one of {valid}.")
        return None

    def _find_own(self, name: str, path: str, problems: list[str]) -> type[M] | None:
        module, _, qualname = name.partition(":")
        if module not in _imported:
            problems.append(
                f"{path}.name={name!r} names code of your own: say --import {module} as well, or "
                f"call dat_ds.import_methods({module!r}) first."
            )
            return None
        found: Any = sys.modules[module]
        for attribute in qualname.split("."):
            found = getattr(found, attribute, None)
        if isinstance(found, type) and issubclass(found, self.base):
            if inspect.get_annotations(found) and "__dataclass_params__" not in vars(found):
                # Its fields would keep the defaults of the class above it, in silence.
                problems.append(
                    f"{path}.name={name!r}: the class declares fields, which count only under "
                    "@dataclass(frozen=True, kw_only=True). Decorate it."
                )
                return None
            return found
        problems.append(
            f"{path}.name={name!r}: {module} has no {self.base.__name__} by the name of "
            f"{qualname!r}. Write a subclass of {self.base.__module__}.{self.base.__name__}."
        )
        return None

    def takers(self, key: str) -> list[str]:
        """Names of the methods that have ``key``."""
        return [name for name, method in self.methods.items() if key in method.known_keys()]


_imported: set[str] = set()


def import_methods(module: str) -> None:
    """Import a module and let run configs name its methods, as ``"package.module:Class"``.

    It is looked for in the current folder too, after all others.

    Raises:
        ConfigError: If it cannot be imported.
    """
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--import {module}: {error}. Is its folder in PYTHONPATH?") from error
    _imported.add(module)


def chosen_from(table: Table[Any], default: Any = dataclasses.MISSING) -> Any:
    """A field that holds a method of ``table``; by default its default one, or ``default``."""
    metadata = {"table": table}
    if default is dataclasses.MISSING:
        return field(default_factory=table.methods[table.default], metadata=metadata)
    return field(default=default, metadata=metadata)


# ---- parsing


def build_method(table: Table[M], config: Mapping[str, Any], path: str) -> M:
    """The method that plain settings choose, apart from a run.

    Args:
        table: Methods to choose from.
        config: ``name`` and that method's options; one that is None has its default.
        path: Dotted path, for messages.

    Raises:
        ConfigError: With all problems: an unknown name or option, a value out of range.
    """
    problems: list[str] = []
    method = parse_method(table, config, path, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return method


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest choice, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class UnknownKey(str):
    """The message about a key that a section does not have, with what it is about.

    Attributes:
        section: Dotted path of the section.
        key: The key, as it was written.
        named: The key with its section, and the nearest valid one.
        valid: A sentence about the valid keys; may be empty.
    """

    _INTRODUCTION = "Unknown key in the run config: "
    section: str
    key: str
    named: str
    valid: str

    def __new__(cls, section: str, key: object, choices: Iterable[str], valid: str) -> Self:
        """From the key, the keys it may be a misspelling of, and what to say of the valid ones."""
        named = f"{section}.{key}{did_you_mean(str(key), choices)}"
        message = super().__new__(cls, f"{cls._INTRODUCTION}{named}. {valid}".rstrip())
        message.section, message.key, message.named, message.valid = section, str(key), named, valid
        return message

    def belonging_to(self, home: str) -> str:
        """The message where another section has a key of this very name."""
        moved = f"It belongs to another section: {home}."
        return f"{self._INTRODUCTION}{self.section}.{self.key}. {moved} {self.valid}"

    def within(self, path: str) -> str:
        """The message as a problem of the section at ``path``, which is put before it."""
        return f"{path} has an unknown key: {self.named}. {self.valid}"


def parse_method(table: Table[M], values: Any, path: str, problems: list[str]) -> M:
    """The method that a section chooses, with its options.

    Args:
        table: Methods to choose from.
        values: Decoded JSON, hopefully an object.
        path: Dotted path of the section, for messages.
        problems: Receives one message per problem found.

    Returns:
        The method; where the name is at fault, the table's default.
    """
    default = table.methods[table.default]
    if not isinstance(values, Mapping):
        problems.append(
            f"{path}={shown(values)} must be an object such as {{'name': {table.default!r}}}."
        )
        return default()
    method = table.find(values.get("name", table.default), path, problems)
    if method is None:
        return default()
    known = method.known_keys()
    given = {key: value for key, value in values.items() if key != "name" or key in known}
    takes = ", ".join(known) or "no keys"
    for key in [key for key in given if key not in known]:
        value = given.pop(key)
        takers = table.takers(key)
        if takers and (value is None or method.passes_over_others):
            continue  # not given, or left from the method that stood there before
        if takers:
            of = f", but of {', '.join(takers)}" if len(takers) <= _MOST_NAMED else ""
            problems.append(
                f"{path}.{key}={shown(value)} is not a setting of the {table.kind} "
                f"{values.get('name', table.default)!r}{of}: remove it. It takes {takes}."
            )
        else:
            every = dict.fromkeys(
                k for m in (method, *table.methods.values()) for k in m.known_keys()
            )
            chosen = values.get("name", table.default)
            valid = f"Valid keys of the {table.kind} {chosen!r}: {takes}."
            problems.append(UnknownKey(path, key, every, valid))
    return parse_section(method, given, path, problems)


def parse_section(cls: type[S], values: Any, path: str, problems: list[str]) -> S:
    """Build a section from JSON values.

    Args:
        cls: Its class.
        values: Decoded JSON, hopefully an object.
        path: Dotted path of the section, for messages.
        problems: Receives one message per problem found.

    Returns:
        The section; a key with a problem keeps its default, so that later checks can go on.
    """
    fields = cls.known_keys()
    names = ", ".join(fields)
    if not isinstance(values, Mapping):
        problems.append(f"{path}={shown(values)} must be an object with the keys {names}.")
        return cls()
    problems += [
        UnknownKey(path, key, fields, f"Valid keys of {path!r}: {names}.")
        for key in values
        if key not in fields
    ]
    values = {**cls.defaults_for(values), **values}
    hints = _hints_of(cls)  # type: ignore[arg-type]  # a class is hashable
    parsed = {}
    for name, f in fields.items():
        if name not in values:
            continue
        at = f"{path}.{name}"
        value = values[name]
        if value is None and issubclass(cls, Method) and not _takes_none(hints[name]):
            continue  # as if it were not given
        if (table := f.metadata.get("table")) is not None:
            takes_none = value is None and f.default is None
            parsed[name] = None if takes_none else parse_method(table, value, at, problems)
            continue
        value = _convert(value, hints[name], at, problems)
        if value is not _INVALID and _passes(value, f, at, problems):
            parsed[name] = value
    section = cls(**parsed)
    problems += [f"{path}.{problem}" for problem in section.problems()]
    return section


@functools.cache
def _hints_of(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _takes_none(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _passes(value: Any, f: dataclasses.Field[Any], path: str, problems: list[str]) -> bool:
    check = f.metadata.get("check")
    if value is None or check is None or check(value):
        return True
    problems.append(f"{path}={shown(value)} is not valid: write {f.metadata['valid']}.")
    return False


def _convert(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """``value`` as the type ``hint``, or ``_INVALID`` after reporting why not."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hints = [arg for arg in get_args(hint) if arg is not type(None)]
        return _convert(value, OfEps if OfEps in hints else hints[0], path, problems)
    if isinstance(hint, type) and issubclass(hint, Section):
        return parse_section(hint, value, path, problems)
    if origin is Literal:
        choices = get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        hinted = did_you_mean(value, choices) if isinstance(value, str) else ""
        valid = ", ".join(repr(choice) for choice in choices)
        problems.append(f"{path}={shown(value)} is not valid{hinted}. Write one of {valid}.")
        return _INVALID
    if origin is list:
        if not isinstance(value, list):
            problems.append(f"{path}={shown(value)} must be a list.")
            return _INVALID
        (item,) = get_args(hint)
        items = [_convert(v, item, f"{path}[{i}]", problems) for i, v in enumerate(value)]
        return _INVALID if any(v is _INVALID for v in items) else items
    if origin is dict:
        if isinstance(value, dict):
            return value
        problems.append(f"{path}={shown(value)} must be an object.")
        return _INVALID
    return _convert_scalar(value, hint, path, problems)


def _convert_scalar(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    if hint in (Length, OfEps):
        try:
            if not isinstance(value, bool):
                length = parse_step(value) if hint is OfEps else Length(value)
                if isinstance(length, OfEps) or math.isfinite(length):
                    return length
        except (OverflowError, TypeError, ValueError):
            pass
        share = ", or 'eps/4' (a multiple of eps)" if hint is OfEps else ""
        problems.append(
            f"{path}={shown(value)} is not a length: write 0.03 or '8/255' (pixel units){share}."
        )
        return _INVALID
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    is_whole = is_number and (isinstance(value, int) or value.is_integer())
    if hint is int and is_whole:
        if abs(value) <= LARGEST_INTEGER:
            return int(value)
        problems.append(
            f"{path}={shown(value)} is not valid: write an integer of at most {LARGEST_INTEGER}."
        )
        return _INVALID
    if hint in (bool, str) and isinstance(value, hint):
        return value
    problems.append(f"{path}={shown(value)} must be {_ARTICLES[hint]}.")
    return _INVALID


def shown(value: Any) -> str:
    """``value`` for a message, which a number of thousands of digits would fill."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "(too large to print)"
    return text if len(text) <= 200 else text[:197] + "..."


def plain(value: Any) -> Any:
    """``value`` with every length as it was written and sections as dicts, for JSON."""
    if isinstance(value, (Length, OfEps)):
        return value.text
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def table_of(kind: str, base: type[M], methods: Sequence[type[M]], default: str = "") -> Table[M]:
    """A table of methods in the order given; the first is the default unless told otherwise."""
    by_name = {method.name: method for method in methods}
    return Table(kind, base, by_name, default or methods[0].name)


def summary_of(section: type[Section]) -> str:
    """First sentence of a section's docstring."""
    text = " ".join(inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].split())
    return text.replace("``", "`")
