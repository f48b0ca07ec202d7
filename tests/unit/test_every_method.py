"""Claims about every method of every table: it parses, prints itself, refuses and is documented."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from dat_ds.config import Length, load_config
from dat_ds.method import Method, Trait
from tests.settings import METHODS, SETTINGS, TABLES, config_of, settings_of
from tests.unit.config_helpers import problems

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
OPTIONS = [
    (section, name, key) for section, name in METHODS for key in TABLES[section][name].known_keys()
]
every_method = pytest.mark.parametrize(("section", "name"), METHODS)
every_option = pytest.mark.parametrize(("section", "name", "key"), OPTIONS)

NO_PAPER = {
    "attack": {"none": "natural training"},
    "objective": {},
    "optimizer": {},
    "compression": {
        "none": "no codec",
        "int8": "rounding of blocks, as everywhere",
        "int4": "rounding of blocks, as everywhere",
    },
    "schedule": {"constant": "no course at all", "step": "a habit older than its papers"},
    "data": dict.fromkeys(TABLES["data"], "data, no method of a paper"),
}
"""Methods that come from no paper, each with the reason."""


# ---- the table of settings


@every_method
def test_it_has_its_settings(section: str, name: str) -> None:
    settings_of(section, name)


def test_the_settings_name_no_method_that_is_gone() -> None:
    assert {s: set(named) - set(TABLES[s]) for s, named in SETTINGS.items()} == {
        section: set() for section in TABLES
    }


# ---- parsing and printing


@every_method
def test_it_is_the_section_that_chooses_it(section: str, name: str) -> None:
    chosen = getattr(load_config(config_of(section, name)).dat, section)
    assert type(chosen) is TABLES[section][name]
    for key, value in SETTINGS[section][name].items():
        assert getattr(chosen, key) == value, key


@every_method
def test_a_run_of_it_loads_as_what_it_printed(section: str, name: str) -> None:
    run = load_config(config_of(section, name))
    assert load_config(run.to_dict()) == run
    assert load_config(json.loads(json.dumps(run.to_dict()))).to_dict() == run.to_dict()


@every_method
def test_it_cannot_be_changed_and_says_its_values(section: str, name: str) -> None:
    chosen = getattr(load_config(config_of(section, name)).dat, section)
    words = repr(chosen)
    assert words.startswith(f"{type(chosen).__name__}(")
    assert all(f"{key}=" in words for key in chosen.known_keys())
    for key in chosen.known_keys():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(chosen, key, None)


@every_method
def test_its_values_are_those_of_its_own_dictionary(section: str, name: str) -> None:
    chosen = getattr(load_config(config_of(section, name)).dat, section)
    assert chosen.to_dict().keys() == {"name", *chosen.known_keys()}
    assert chosen.to_dict()["name"] == name


# ---- refusals


def other_types(method: type[Method], key: str) -> list[Any]:
    """Values that are of no type of the option."""
    hint = typing.get_type_hints(method)[key]
    hints = typing.get_args(hint) or (hint,)
    if hint is Length or Length in hints:
        return [{}, True, "far", math.nan]
    if str not in hints and typing.get_origin(hint) is not typing.Literal:
        return [{"a": 1}, [{}], "text"] if dict not in _origins(hints) else ["text", [1]]
    return [{"a": 1}, [1], 1.5]


def _origins(hints: Any) -> list[Any]:
    return [typing.get_origin(hint) or hint for hint in hints] + [typing.get_origin(hints)]


@every_option
def test_another_type_is_refused_by_its_dotted_key(section: str, name: str, key: str) -> None:
    method = TABLES[section][name]
    hint = typing.get_type_hints(method)[key]
    values = other_types(method, key)
    if dict in (typing.get_origin(hint), *_origins(typing.get_args(hint))):
        values = ["text", [1], 3]
    for value in values:
        found = problems(config_of(section, name, **{key: value}))
        assert found[0].startswith(f"dat.{section}.{key}"), (value, found)


@every_option
def test_a_number_out_of_range_is_refused_with_what_is_valid(
    section: str, name: str, key: str
) -> None:
    method = TABLES[section][name]
    field = method.known_keys()[key]
    check, valid = field.metadata.get("check"), field.metadata.get("valid")
    if check is None:
        return  # whatever its type holds is in range
    is_list = isinstance(getattr(method(), key), list)
    numbers = [-1, 0, 1, 1.5, 10**9, -0.5]
    values: list[Any] = [[], [-1, -1], [1, 1], [2, 2, 2], [0, 1]] if is_list else numbers
    outside = [value for value in values if not check(value)]
    assert outside, f"a number that {key} does not take is missing here"
    for value in outside:
        (problem, *_) = problems(config_of(section, name, **{key: value}))
        assert problem.startswith(f"dat.{section}.{key}"), problem
        assert problem.endswith((f"write {valid}.", "must be an integer.")), problem


@every_option
def test_numbers_that_are_none_are_refused(section: str, name: str, key: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        (problem, *_) = problems(config_of(section, name, **{key: value}))
        assert problem.startswith(f"dat.{section}.{key}"), problem


@every_method
def test_keys_of_other_methods_are_refused_with_those_that_take_them(
    section: str, name: str
) -> None:
    table = TABLES[section]
    mine = table[name].known_keys()
    foreign = {key for other in table.values() for key in other.known_keys()} - set(mine)
    for key in sorted(foreign):
        if table[name].passes_over_others:
            assert load_config(config_of(section, name, **{key: 1})).dat is not None
            continue
        (problem, *_) = problems(config_of(section, name, **{key: 1}))
        takers = [other for other in table if key in table[other].known_keys()]
        of = f", but of {', '.join(takers)}" if len(takers) <= 2 else ""
        assert problem.startswith(
            f"dat.{section}.{key}=1 is not a setting of the {table.kind} {name!r}{of}: remove it. "
            "It takes "
        )


@every_method
def test_a_key_of_nobody_is_refused_with_the_nearest_and_the_valid_ones(
    section: str, name: str
) -> None:
    for key in ("stpes", "nmae", ""):
        (problem, *_) = problems(config_of(section, name, **{key: 1}))
        assert problem.startswith(f"Unknown key in the run config: dat.{section}.{key}")
        assert f"Valid keys of the {TABLES[section].kind} {name!r}: " in problem


@pytest.mark.parametrize("section", TABLES)
@pytest.mark.parametrize("name", ["nothing", "", None, 3, ["pgd"], {}])
def test_a_name_of_no_method_is_refused_with_those_there_are(section: str, name: Any) -> None:
    first = next(iter(TABLES[section]))
    config = config_of(section, first)
    config["dat"][section] = {"name": name}
    found = problems(config)
    assert found[0].startswith(f"dat.{section}.name={name!r} is not valid")
    assert all(repr(there) in found[0] for there in TABLES[section])


# ---- words


@every_method
def test_it_says_what_it_is_and_where_it_is_from(section: str, name: str) -> None:
    method = TABLES[section][name]
    assert method.__dict__.get("__doc__"), "a docstring of its own"
    summary = inspect.cleandoc(method.__doc__ or "").split("\n\n")[0]
    assert summary.endswith("."), summary
    assert not summary.startswith(f"{method.__name__}("), "dataclasses writes that where none is"
    is_cited = bool(method.paper or re.search("arXiv|openreview", method.__doc__ or ""))
    assert is_cited != (name in NO_PAPER[section]), "a paper, or in NO_PAPER why it has none"
    assert all(isinstance(trait, Trait) for trait in method.traits)


@every_method
def test_the_reference_names_it_with_all_of_its_own_keys(section: str, name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    heading = f"### `dat.{section}.name={json.dumps(name)}`\n"
    assert page.count(heading) == 1
    about = page.split(heading)[1].split("\n#")[0]
    common = page.split(f"## `dat.{section}`\n")[1].split("\n#")[0]
    for key in TABLES[section][name].known_keys():
        assert f"| `{key}` |" in about + common, key
