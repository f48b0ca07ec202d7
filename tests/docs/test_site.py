"""Sphinx builds the site without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

pytestmark = pytest.mark.slow
for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package, reason="pip install -e '.[docs]'")


def build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", source, output],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    done = build(DOCS, output)
    assert done.returncode == 0, done.stderr
    return output


def test_links_to_other_files_lead_into_the_repository(site):
    page = (site / "launching.html").read_text(encoding="utf-8")
    assert "/blob/main/recipes/slurm/train.sbatch" in page
    results = (site / "results" / "README.html").read_text(encoding="utf-8")
    assert "/blob/main/docs/results/convergence.json" in results
    assert "/blob/main/docs/results/speedup" in results  # a folder


def test_links_between_pages_stay_in_the_site(site):
    page = (site / "export.html").read_text(encoding="utf-8")
    assert 'href="reliability.html"' in page


def test_tables_and_signatures_are_rendered(site):
    assert "<table" in (site / "attacks.html").read_text(encoding="utf-8")
    page = (site / "api" / "attacks.html").read_text(encoding="utf-8")
    assert 'id="dat_ds.attacks.pgd"' in page
    assert "step_size" in page
