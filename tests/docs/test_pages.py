"""Every page is found, every link leads somewhere, every public name is documented."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.pages import (
    DOCS,
    PAGES,
    READ_ON_GITHUB,
    ROOT,
    anchors,
    blocks,
    links,
    name_of,
    toctrees,
)

pytestmark = pytest.mark.fast
API = {
    "dat_ds": "training",
    "dat_ds.attacks": "attacks",
    "dat_ds.compression": "compression",
    "dat_ds.data": "data",
    "dat_ds.evaluation": "evaluation",
    "dat_ds.integrations.hf": "huggingface",
    "dat_ds.models": "models",
    "dat_ds.objectives": "objectives",
    "dat_ds.optim": "optim",
}
ELSEWHERE = {"dat_ds.ThreatModel": "dat_ds.attacks", "dat_ds.UserError": "dat_ds.errors"}
GROUPS = ["Start", "Tutorials", "How-to", "Reference", "Explanation", "Results"]
WITHOUT_GPU = re.compile(r"no gpu|gpu and nccl runs of this version are not", re.IGNORECASE)


def test_every_page_is_in_one_table_of_contents():
    counts = Counter(entry for entries in toctrees().values() for entry in entries)
    missing = set(PAGES) - set(counts) - {DOCS / "index.md"}
    assert not missing, f"add to a toctree of docs/index.md: {sorted(map(name_of, missing))}"
    assert set(counts) <= set(PAGES), "a toctree names a page that is not there"
    assert max(counts.values()) == 1


def test_the_index_has_its_groups():
    found = [
        re.search(r"^:caption: (.+)$", text, re.MULTILINE)
        for _, text in blocks(DOCS / "index.md", "{toctree}")
    ]
    assert [match[1] for match in found if match] == GROUPS


def problem_with(page: Path, target: str) -> str | None:
    if re.match(r"[a-z]+:", target):
        return None  # of the web; checked by sphinx-build -b linkcheck
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target}: no such file"
    if not file.is_relative_to(ROOT):
        return f"{target}: outside of the repository"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{target}: no such heading"
    return None


@pytest.mark.parametrize("page", [*PAGES, *READ_ON_GITHUB], ids=name_of)
def test_every_internal_link_and_anchor_leads_somewhere(page):
    problems = [problem for target in links(page) if (problem := problem_with(page, target))]
    assert not problems


def test_broken_links_are_seen(tmp_path, monkeypatch):
    page = DOCS / "index.md"
    assert problem_with(page, "nowhere.md") == "nowhere.md: no such file"
    assert problem_with(page, "start.md#nowhere") == "start.md#nowhere: no such heading"
    assert problem_with(page, "start.md#install") is None
    example = tmp_path / "page.md"
    example.write_text("[a](b.md) `[c](d.md)`\n```\n[e](f.md)\n```\n[g](h.md#i) ![](j.png)\n")
    assert links(example) == ["b.md", "h.md#i", "j.png"]


def documented(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    module = re.search(r"^\.\. py:module:: (\S+)", text, re.MULTILINE)
    assert module
    automatic = re.findall(r"^\.\. auto(?:class|function):: (\S+)", text, re.MULTILINE)
    data = re.findall(r"^\.\. py:data:: (\S+)", text, re.MULTILINE)
    return {*automatic, *(f"{module[1]}.{name}" for name in data)}


@pytest.mark.parametrize("module", API)
def test_every_public_name_has_its_place_in_the_reference(module):
    public = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    found = documented(DOCS / "api" / f"{API[module]}.md")
    missing = public - found - set(ELSEWHERE)
    assert not missing, f"add to docs/api/{API[module]}.md: {sorted(missing)}"


def test_every_error_is_in_the_reference():
    errors = importlib.import_module("dat_ds.errors")
    public = {
        f"dat_ds.errors.{name}"
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert public <= documented(DOCS / "api" / "errors.md")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_that_are_documented_elsewhere_are(name):
    home = ELSEWHERE[name].rpartition(".")[2]
    page = DOCS / "api" / f"{home}.md"
    assert f"{ELSEWHERE[name]}.{name.rpartition('.')[2]}" in documented(page)


NEW = [p for p in PAGES if p.parent.name in ("tutorials", "howto", "explanation")]


@pytest.mark.parametrize(
    "page", [*NEW, *(DOCS / f"{name}.md" for name in ("launching", "composability"))], ids=name_of
)
def test_a_page_about_gpus_says_first_that_none_has_run(page):
    text = page.read_text(encoding="utf-8")
    if re.search(r"\b(GPU|NCCL|CUDA)", text):
        assert WITHOUT_GPU.search("\n".join(text.splitlines()[:6]))
