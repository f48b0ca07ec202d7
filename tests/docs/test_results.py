"""Claim: tables of results are those of their records."""

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


def table_with(link: str, file: Path = RESULTS / "README.md") -> list[list[str]]:
    """A page's table that links a record: header and rows."""
    page = file.read_text(encoding="utf-8")
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


@pytest.mark.parametrize(
    ("file", "prefix"),
    [(RESULTS / "README.md", ""), (RESULTS.parents[1] / "README.md", "docs/results/")],
)
def test_the_digits_are_those_of_their_records(file: Path, prefix: str) -> None:
    header, *rows = table_with(f"{prefix}digits_vit_zero2_robust.record.json", file)
    foolbox = (RESULTS / "digits_vit_zero2_foolbox.txt").read_text(encoding="utf-8").splitlines()
    for row, line, name in zip(rows, foolbox, ("robust", "natural_twin"), strict=True):
        read = {
            kind: json.loads((RESULTS / f"digits_vit_zero2_{name}.{kind}.json").read_text("utf-8"))
            for kind in ("record", "evaluation")
        }
        judged = read["evaluation"]
        assert read["record"]["commit"] == judged["commit"]
        assert read["record"]["natural_acc"] == judged["natural_acc"]
        accuracies = [judged["natural_acc"], *judged["robust_acc"].values()]
        assert list(judged["robust_acc"]) == ["pgd-20", "pgd-100-10"]
        assert row[1:4] == [f"{100 * accuracy:.1f}" for accuracy in accuracies]
        assert f" {row[4]}% of 359 images" in line, header
