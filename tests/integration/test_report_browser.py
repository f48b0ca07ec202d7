"""The report in a real browser: nothing is loaded from elsewhere, nothing overflows, it prints.

Needs Chromium or Chrome; skipped where there is none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dat_ds.judge.report import write_report
from tests.unit.test_html_report import evaluation, record, samples, write

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

# A policy that lets nothing in from outside, and tells of what wanted in.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; img-src data:; script-src 'unsafe-inline'\">"
)
_MEASURE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  document.body.setAttribute("data-found", [
    document.documentElement.scrollWidth <= innerWidth,
    images.length, images.every((i) => i.complete && i.naturalWidth > 300),
    performance.getEntriesByType("resource").filter((r) => !r.name.startsWith("data:")).length,
  ].join(" "));
});</script>"""


def browse(folder: Path, *arguments: str) -> str:
    """Run the browser; what it printed."""
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    check = {"name": "a", "status": "failed", "meaning": "word " * 30, "remedy": "x" * 60}
    values = evaluation(checks=[{**check, "found": "0"}], target="a" * 90)
    metrics = [{"step": n, "epoch": n / 4, "loss": 1 / n, "lr": 0.1} for n in range(1, 9)]
    write(folder, evaluation=values, samples=samples(), record=record(), metrics=metrics)
    return write_report(folder)


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_fits_the_window_and_loads_nothing(page: Path, width: int) -> None:
    text = page.read_text(encoding="utf-8")
    watched = page.with_name(f"watched-{width}.html")
    watched.write_text(text.replace("</head>", f"{_POLICY}{_MEASURE}</head>"), encoding="utf-8")
    shown = browse(page.parent, f"--window-size={width},900", "--dump-dom", watched.as_uri())
    found = re.search(r'data-found="([^"]*)"', shown)
    assert found is not None
    assert found[1] == "true 2 true 0"


def test_the_page_is_dark_where_the_reader_likes_it_dark(page: Path) -> None:
    brightness = {}
    for name, flags in (("light", []), ("dark", ["--force-dark-mode"])):
        file = page.with_name(f"{name}.png")
        browse(
            page.parent,
            *flags,
            "--hide-scrollbars",
            "--window-size=900,1200",
            f"--screenshot={file}",
            page.as_uri(),
        )
        with Image.open(file) as image:
            brightness[name] = float(np.median(np.asarray(image.convert("L"))))
    assert brightness["light"] > 240
    assert brightness["dark"] < 40


def test_the_page_prints(page: Path) -> None:
    file = page.with_name("page.pdf")
    browse(page.parent, "--no-pdf-header-footer", f"--print-to-pdf={file}", page.as_uri())
    pdf = file.read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
