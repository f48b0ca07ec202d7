"""The report is one page that needs nothing else, escapes users' text, and says what is missing."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dat_ds.attacks import ThreatModel
from dat_ds.cli.main import main
from dat_ds.errors import DataError
from dat_ds.evaluation import figures, html
from dat_ds.evaluation.report import report_table
from dat_ds.files import sha256_of
from dat_ds.judge.evidence import read_evidence
from dat_ds.judge.report import measure_curves, write_report
from dat_ds.length import Length

VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = '<script>alert("$x^2$")</script>&'


class Page(HTMLParser):
    """Parsed page: fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def evaluation(**values: Any) -> dict[str, Any]:
    """Contents of an ``evaluation.json``: of 4 images 3 correct, of which 1 stands."""
    attack = {"attacked": 3, "broken": 2, "forwards": 30, "backwards": 27, "seconds": 0.5}
    stage = {"label": "apgd-ce-9", **attack}
    return {
        "target": "zoo:net",
        "threat_model": {"norm": "linf", "eps": "2/255", "lower": 0.0, "upper": 1.0},
        "data": {"name": "npz", "path": "folder/images.npz"},
        "ensemble": "standard",
        "attacks": [{"name": "apgd-ce-9", **attack, "stages": [stage]}],
        "natural_acc": 0.75,
        "robust_acc": {"apgd-ce-9": 0.25, "all": 0.25},
        "intervals": {"natural_acc": [0.3, 0.95], "all": [0.05, 0.7]},
        "num_examples": 4,
        "num_classes": 2,
        "class_names": ["cat", "dog"],
        "passes": 57,
        "seconds": 0.5,
        "checks": [],
        "seed": 0,
        "ranks": 1,
        "versions": {"torch": "9.9"},
        "hardware": {"device": "cpu"},
        "commit": None,
        "config": None,
        **values,
    }


def samples() -> list[dict[str, Any]]:
    broken = {"robust": False, "broken_by": "apgd-ce-9", "predicted_under_attack": 1}
    rows: list[dict[str, Any]] = [
        {"label": 0, "correct": True, "robust": True},
        {"label": 0, "correct": True, **broken},
        {"label": 0, "correct": True, **broken},
        {"label": 1, "correct": False, "robust": False},
    ]
    plain = {"broken_by": None, "predicted_under_attack": None, "verified": None}
    return [{"index": i, **plain, **row} for i, row in enumerate(rows)]


def record() -> dict[str, Any]:
    """Contents of a run's ``record.json`` with two attacks, each on all images."""
    dat = {
        "threat_model": {"norm": "l2", "eps": 0.5, "lower": 0.0, "upper": 1.0},
        "data": {"name": "digits"},
        "model": {"name": "vit"},
        "attack": {"name": "pgd", "steps": 3},
        "objective": {"name": "at"},
    }
    return {
        "natural_acc": 0.75,
        "robust_acc": {"pgd-5": 0.5, "pgd-9": 0.5},
        "num_examples": 4,
        "outcomes": {"natural": "1110", "pgd-5": "1100", "pgd-9": "0110"},
        "natural": False,
        "seed": 0,
        "ranks": 1,
        "config": {"dat": dat, "zero_optimization": {"stage": 2}},
        "versions": {},
        "hardware": {},
        "commit": "abc",
        "validation": [{"epoch": 1.0, "natural_acc": 0.5, "robust_acc": {"pgd-2": 0.25}}],
        "seconds": {"train": 7.0, "evaluate": 1.0, "total": 9.0},
    }


def write(folder: Path, **files: Any) -> Path:
    """Write ``NAME.json`` from an object and ``NAME.jsonl`` from a list."""
    folder.mkdir(exist_ok=True)
    for name, values in files.items():
        if isinstance(values, list):
            text = "".join(json.dumps(row) + "\n" for row in values)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        else:
            (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


class Brightness(nn.Module):
    """Class 1 where an image is bright."""

    def forward(self, x: Tensor) -> Tensor:
        value = 20 * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-value, value], dim=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a report can show."""
    folder = tmp_path_factory.mktemp("whole")
    level = torch.tensor([0.1, 0.45, 0.48, 0.49])
    x = level.view(4, 1, 1, 1).expand(4, 1, 5, 5).clone()
    data = TensorDataset(x, torch.tensor([0, 0, 0, 1]))
    measure_curves(Brightness(), data, ThreatModel("linf", Length("12/255")), folder)
    metrics = [
        {
            "step": n,
            "epoch": n / 4,
            "loss": 1 / n,
            "natural_acc": 0.5,
            "robust_acc": None,
            "lr": 0.1,
        }
        for n in range(1, 5)
    ]
    return write(
        folder, evaluation=evaluation(), samples=samples(), record=record(), metrics=metrics
    )


@pytest.mark.fast
def test_the_page_is_well_formed_and_needs_nothing_else(whole: Path) -> None:
    page = page_of(whole)
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {name for name, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert {a["src"][:22] for a in page.all("img") if a["src"]} == {"data:image/png;base64,"}
    assert all(a["href"] and a["href"].startswith("#") for a in page.all("a"))
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for a in page.all("a") if a["href"]} <= anchors


def test_the_page_can_be_read_without_seeing_it(whole: Path) -> None:
    page = page_of(whole)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("img")) == 6
    assert all(len(a["alt"] or "") > 20 for a in page.all("img"))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert "cat becomes dog" in " ".join(a["alt"] or "" for a in page.all("img"))


def test_figures_lie_beside_the_page_as_they_are_in_it(whole: Path) -> None:
    page = page_of(whole)
    inside = {base64.b64decode((a["src"] or "").partition(",")[2]) for a in page.all("img")}
    beside = {path.read_bytes() for path in (whole / "figures").iterdir()}
    assert inside == beside
    assert all(png.startswith(b"\x89PNG") for png in inside)


def test_the_headline_says_what_was_measured(whole: Path) -> None:
    text = page_of(whole).text.replace("\xa0", " ")
    for words in (
        "Robust accuracy25.0 %1 of 4 images95 % CI: 5.0 to 70.0 %",
        "worst case over the standard ensemble: apgd-ce-9",
        "Clean accuracy75.0 %3 of 4 images",
        "eps = 2/255l-infinity norm",
        "npz (images.npz)",
        "57 passes",
        sha256_of(whole / "samples.jsonl"),
    ):
        assert words in text


def test_without_an_ensemble_nothing_is_called_robust(tmp_path: Path) -> None:
    folder = write(tmp_path, evaluation=evaluation(ensemble=None), samples=samples())
    page = page_of(folder)
    assert "Accuracy under apgd-ce-9" in page.text
    assert "obust accuracy" not in page.text
    assert "obust accuracy" not in " ".join(a["alt"] or "" for a in page.all("img"))


def test_a_record_of_today_gives_a_page(tmp_path: Path) -> None:
    text = page_of(write(tmp_path, record=record())).text.replace("\xa0", " ")
    assert "Accuracy under 2 attacks25.0 %1 of 4 images" in text
    assert "worst case over pgd-5, pgd-9" in text
    assert "obust accuracy" not in text
    assert "pgd-531250.0 %" in text, "3 attacked, 1 broken, 2 standing"
    assert "eps = 0.5l2 norm" in text


def test_a_model_that_does_not_classify_shows_its_losses(tmp_path: Path) -> None:
    losses = {"natural_loss": 1.25, "robust_loss": {"pgd-5": 2.5}}
    values = {**record(), "natural_acc": None, "robust_acc": {}, "outcomes": {}, **losses}
    text = page_of(write(tmp_path, record=values)).text
    assert "Mean loss without an attack1.25" in text
    assert "Mean loss under pgd-52.5" in text
    assert "accuracy" not in text.split("Checks")[0].lower()


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path: Path) -> None:
    page = page_of(write(tmp_path, evaluation=evaluation()))
    assert not page.all("img")
    command = "dat-ds eval TARGET --attacks standard --output DIR"
    assert page.text.count(command) == 4
    assert page.text.count(f"{command} --report") == 2
    assert "dat-ds train" in page.text


def test_what_users_wrote_is_text(tmp_path: Path) -> None:
    check = dict.fromkeys(("name", "found", "meaning", "remedy"), EVIL)
    values = evaluation(
        target=EVIL,
        data={"name": EVIL, "path": EVIL},
        class_names=[EVIL, "dog"],
        checks=[{**check, "status": "ok", "value": None}],
        versions={EVIL: EVIL},
        config={"dat": {"x": EVIL}},
    )
    values["attacks"][0]["name"] = EVIL
    values["robust_acc"] = {EVIL: 0.25, "all": 0.25}
    page = page_of(write(tmp_path, evaluation=values, samples=samples()))
    assert not page.all("script")
    assert page.text.count(EVIL) > 8


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_checks_that_raise_doubt_come_first(tmp_path: Path, order: tuple[int, ...]) -> None:
    statuses = ("ok", "skipped", "suspicious", "failed")
    checks = [
        {"name": f"check {n}", "status": statuses[n], "found": "", "meaning": "", "remedy": ""}
        for n in order
    ]
    text = page_of(write(tmp_path, evaluation=evaluation(checks=checks))).text
    assert re.findall(r"check (\d)", text) == ["3", "2", "0", "1"]
    assert "Of 4 checks: 1 failed and 1 suspicious." in text


def test_checks_that_pass_give_no_warning(tmp_path: Path) -> None:
    check = {"name": "a", "status": "ok", "found": "", "meaning": "", "remedy": ""}
    page = page_of(write(tmp_path, evaluation=evaluation(checks=[check])))
    assert "Read them" not in page.text


def test_the_report_of_a_run_shows_its_evaluation_and_the_other_way_round(tmp_path: Path) -> None:
    run = write(tmp_path / "run", record=record(), metrics=[{"step": 1, "loss": 2.0}])
    inner = write(run / "evaluation", evaluation=evaluation(target=str(run)), samples=samples())
    for folder in (run, inner):
        evidence = read_evidence(folder)
        assert evidence.is_ensemble
        assert len(evidence.samples) == 4
        assert evidence.metrics == [{"step": 1, "loss": 2.0}]
        assert evidence.record == record()


def test_more_classes_than_fit_are_a_table_to_open(tmp_path: Path) -> None:
    rows = [{**samples()[0], "index": n, "label": n} for n in range(40)]
    page = page_of(write(tmp_path, evaluation=evaluation(class_names=None), samples=rows))
    assert "All 40 classes" in page.text
    assert "The 20 classes with the smallest" in page.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("evaluation.json", "{", "evaluation.json is damaged"),
        ("evaluation.json", "[]", "it holds a list"),
        ("evaluation.json", "{}", "lacks natural_acc, num_examples, robust_acc"),
        ("samples.jsonl", "1\n{}\n", "line 1 is not an object"),
        ("samples.jsonl", "{\n{}\n", "line 1 is not JSON"),
        ("curves.json", "", "curves.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    write(tmp_path, evaluation=evaluation())
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_row_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, record=record())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_evidence(tmp_path).metrics == [{"step": 1, "loss": 2}]
    assert "1 optimizer steps" in page_of(tmp_path).text


def test_the_command_writes_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "results", evaluation=evaluation())
    assert main(["report", str(folder), "--html"]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert main(["report", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == (folder / "report.html").read_text()
    assert main(["report", str(folder), str(folder), "--html"]) == 2
    assert main(["report", str(folder), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert main(["report", str(tmp_path), "--html"]) == 2
    assert "No result at" in capsys.readouterr().err


def test_the_table_reads_evaluations_of_targets_beside_runs(tmp_path: Path) -> None:
    second = {"name": "apgd-t-9", "attacked": 1, "broken": 1}
    values = evaluation(robust_acc={"apgd-ce-9": 0.25, "apgd-t-9": 0.0, "all": 0.0})
    values["attacks"].append(second)
    folders = [
        write(tmp_path / "run", record=record()),
        write(tmp_path / "target", evaluation=values),
    ]
    header, _, of_run, of_target = report_table(folders).splitlines()
    assert "| after apgd-t-9 % | apgd-ce-9 % | pgd-5 % | pgd-9 % |" in header
    assert of_run.endswith(
        "| vit | pgd-3 | 2 | 1 | 75.0 | not measured | not measured | 50.0 | 50.0 | 4 | 7 |"
    )
    assert of_target.endswith(
        "| zoo:net | - | - | 1 | 75.0 | 0.0 | 25.0 | not measured | not measured | 4 | - |"
    )


def test_curves_are_measured_on_the_first_images(whole: Path) -> None:
    curves = json.loads((whole / "curves.json").read_text())
    assert curves["threat_model"] == {"norm": "linf", "eps": "12/255", "lower": 0.0, "upper": 1.0}
    radius = dict(
        zip(curves["against_radius"]["radii"], curves["against_radius"]["standing"], strict=True)
    )
    # The distances to 0.5 are 0.4, 0.05 and 0.02; 12/255 = 0.047.
    assert radius[0.0] == 3
    assert radius[12 / 255] == 2
    assert curves["against_steps"]["standing"] == [2] * 7
    assert curves["surface"]["index"] == 2, "the one that is broken"
    assert curves["examples"]["labels"] == [0, 0, 0, 1]
    assert curves["examples"]["before"] == [0, 0, 0, 0]
    assert curves["examples"]["after"] == [0, 0, 1, 0]


def test_labels_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="2"):
        measure_curves(Brightness(), data, ThreatModel("linf", 0.1), tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (8 / 255, "8/255"),
        (1.5 / 255, "1.5/255"),
        (0.5 / 255 * 0.5, "0.25/255"),
        (2 / 16, "0.125"),
        (0.5, "0.5"),
        (3.0, "3"),
        (0.0, "0"),
        ("2/255", "2/255"),
        (Length("2/16"), "2/16"),
    ],
)
def test_lengths_are_shown_as_they_are_written(value: float | str, words: str) -> None:
    assert figures.length_in_words(value) == words


def test_the_same_figure_gives_the_same_file() -> None:
    curve = {
        "norm": "linf",
        "radii": [0.0, 1 / 255, 2 / 255],
        "accuracy": [1.0, 0.5, 0.0],
        "intervals": [[0.9, 1.0], [0.4, 0.6], [0.0, 0.1]],
    }
    first, second = (figures.as_png(figures.radius_figure(curve, 1 / 255)) for _ in range(2))
    assert first == second


def test_cells_are_escaped_and_columns_have_heads() -> None:
    text = html.table("a < b", ["x", "y & z"], [["<i>", 1]], numbers=[1])
    page = Page(text)
    assert page.text == "a < bxy & z<i>1"
    assert [a.get("scope") for a in page.all("th")] == ["col", "col", "row"]
