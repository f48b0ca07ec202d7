"""Claim: the tables of the results page are those of their records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dat_ds.bench.tables.reproduction import table_of

RESULTS = Path(__file__).parents[2] / "docs" / "results"
RECORDS = sorted((RESULTS / "reproduce").glob("*.json"))


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_with(link: str) -> list[list[str]]:
    """The page's table that links a record: header and rows."""
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    (found,) = [table for table in tables if f"]({link})" in table]
    header, _, *rows = found.splitlines()
    return [cells_of(line) for line in (header, *rows)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_a_table_of_a_published_result_is_that_of_its_record(record: Path) -> None:
    values = json.loads(record.read_text(encoding="utf-8"))
    header, _, *rows = map(cells_of, table_of(values).splitlines())
    shown_header, *shown = table_with(f"reproduce/{record.name}")
    scores = slice(1, len(header) - 2)  # the last two are ranks and seconds
    assert shown_header[scores] == header[scores]
    names = [re.sub(r"\[(.*)\]\(.*\)", r"\1", row[0]) for row in shown]
    has_ranks = "ranks" in shown_header
    for row in rows:
        name = "the published network, measured here" if "here" in row[0] else row[0]
        found = shown[names.index(name)]
        assert (found[scores], found[-1]) == (row[scores], row[-1]), name
        assert not has_ranks or found[-2] == row[-2], name
    assert len(shown) == len(rows)
