"""``docs/files.md`` names every file and key that real runs write, with its type, and no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from dat_ds import checkpoints
from dat_ds.checkpoints import read_state
from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.engine import reproducer
from dat_ds.engine.reproducer import read_reproducer
from dat_ds.errors import CheckpointError, ConfigError, ModelError
from dat_ds.evaluation.samples import open_folder
from dat_ds.judge.evidence import read_evidence
from dat_ds.models import load, saved
from tests.docs.pages import DOCS, ROOT, slug_of
from tests.integration import tiny_run
from tests.integration.tiny_run import rows_of

PAGE = DOCS / "files.md"
KEYS, FILES = ["key", "type and unit", "meaning"], "file"
EXPORTS = ("timm", "safetensors", "robustbench", "folder")
OTHER_EXPORTS = {"hf", "onnx", "program"}
ZOO = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
"""


# ---- the page


@dataclass
class Row:
    """A row of a table of keys, or of a table of files."""

    name: str
    cells: list[str]
    hit: bool = False

    @property
    def is_optional(self) -> bool:
        return any("only when" in cell.lower() for cell in self.cells)

    @property
    def types(self) -> list[str]:
        """The alternatives, without the unit."""
        return self.cells[0].partition(",")[0].split(" or ")

    @property
    def link(self) -> str:
        """The page or heading that describes the value; empty where the row does."""
        found = re.search(r"\]\(([^)]+)\)", self.cells[0])
        return "" if found is None else found[1]


@dataclass
class Section:
    """What stands under a heading of the page."""

    keys: list[Row] = field(default_factory=list)
    files: list[Row] = field(default_factory=list)
    text: str = ""


@cache
def page() -> dict[str, Section]:
    """Sections by the anchors of their headings."""
    found: dict[str, Section] = {}
    section, kind = Section(), ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section, kind = Section(), ""
            found[slug_of(line.lstrip("# "))] = section
        elif not line.startswith("|"):
            section.text, kind = f"{section.text} {line}", ""
        elif not kind:
            header = cells_of(line)
            kind = "keys" if header == KEYS else header[0]
        elif not line.startswith("| ---"):
            first, *rest = cells_of(line)
            names = re.findall(r"`([^`]+)`", first)
            if kind == "keys":
                (name,) = names
                section.keys.append(Row(name, rest))
            elif kind == FILES:
                section.files += [Row(name, rest) for name in names]
    return found


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


@cache
def pattern_of(name: str) -> re.Pattern[str]:
    """Names in capitals stand for any text; STEP and RANK for numbers."""
    parts = re.split(r"([A-Z]{3,})", name)
    wild = {"STEP": r"\d+", "RANK": r"\d+"}
    return re.compile("".join(wild.get(p, ".+") if p.isupper() else re.escape(p) for p in parts))


@dataclass
class Expected:
    """A key of a file, with the row that describes it."""

    key: str
    row: Row

    def accepts(self, path: str) -> bool:
        return bool(pattern_of(self.key).fullmatch(path))


def expected_keys(anchor: str, prefix: str = "", seen: tuple[str, ...] = ()) -> list[Expected]:
    """The keys of a file: of its table, of those that it refers to, and of nested objects."""
    section = page()[anchor]
    found = []
    for row in section.keys:
        found.append(Expected(prefix + row.name, row))
        if row.link.startswith("#") and row.link not in seen:
            inside = "[]." if row.types[0].startswith("list") else "."
            found += expected_keys(row.link[1:], prefix + row.name + inside, (*seen, row.link))
    for other in re.findall(r"the keys of \[[^\]]+\]\(#([^)]+)\)", section.text):
        found += expected_keys(other, prefix, seen)
    return found


def has_type(value: Any, kind: str) -> bool:
    kind = kind.strip()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind.startswith("list of "):
        return isinstance(value, list) and all(has_type(v, kind[len("list of ") :]) for v in value)
    if kind.startswith("["):
        return isinstance(value, dict)
    return {
        "any": lambda: True,
        "null": lambda: value is None,
        "text": lambda: isinstance(value, str),
        "boolean": lambda: isinstance(value, bool),
        "object": lambda: isinstance(value, dict),
        "integer": lambda: is_number and isinstance(value, int),
        "bytes": lambda: is_number and isinstance(value, int) and value >= 0,
        "number": lambda: is_number,
        "seconds": lambda: is_number and value >= 0,
        "fraction": lambda: is_number and 0 <= value <= 1,
        "tensor": lambda: isinstance(value, Tensor),
        "tensors": lambda: isinstance(value, dict),
    }[kind]()


class Table:
    """The keys of a kind of file."""

    def __init__(self, anchor: str) -> None:
        self.keys = expected_keys(anchor)
        self.parents = {
            expected.key[: end.start()]
            for expected in self.keys
            for end in re.finditer(r"\.|\[\]", expected.key)
        }

    def row_of(self, path: str) -> Row | None:
        """The row of a key; one with a name in capitals only where no other fits."""
        fitting = [expected for expected in self.keys if expected.accepts(path)]
        return min(fitting, key=lambda e: e.key != path).row if fitting else None

    def has_children(self, path: str) -> bool:
        return any(pattern_of(parent).fullmatch(path) for parent in self.parents)

    def problems(self, value: Any, path: str = "") -> Iterator[str]:
        """What the page does not say, or says otherwise, about a value."""
        row = self.row_of(path) if path else None
        is_whole = row is not None and (not row.link.startswith("#") or not value)
        if isinstance(value, dict) and (not path or self.has_children(path)) and value:
            yield from self.kind_problems(row, value, path)
            for key, inner in value.items():
                yield from self.problems(inner, f"{path}.{key}" if path else key)
        elif is_listed(value) and self.has_children(path):
            yield from self.kind_problems(row, value, path)
            for inner in value:
                yield from self.problems(inner, f"{path}[]")
        elif row is not None and is_whole:
            yield from self.kind_problems(row, value, path)
        elif value in ({}, []) and self.has_children(path):
            return
        else:
            yield f"{path} is not on the page"

    def kind_problems(self, row: Row | None, value: Any, path: str) -> Iterator[str]:
        if row is not None:
            row.hit = True
            if not any(has_type(value, kind) for kind in row.types):
                yield f"{path}={str(value)[:60]!r} is not of the type {row.cells[0]!r}"


def is_listed(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


# ---- the files


def run(*words: str | Path, code: int = 0) -> None:
    assert main([str(word) for word in words]) == code, words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tiny runs, evaluations and exports that write every kind of file."""
    place = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        (place / "zoo.py").write_text(ZOO)
        patch.chdir(place)
        patch.syspath_prepend(place)
        train(place, "run", trains_well)
        train(place, "fault", explodes, code=1)
        run("eval", "run")
        few = ["--attacks", "pgd-2", "apgd-ce-2", "--no_checks", "--num_examples", "8"]
        run("eval", "run", *few)
        evaluate_callable(place)
        for form in EXPORTS:
            run("export", "run", "--to", form)
        run("doctor", *zoo(), "--num_examples", "2", "--output", "doctor", code=1)
        labels = write_config(place, "labels", hides_labels)
        run(
            "label",
            "zoo:network",
            "--import",
            "zoo",
            "--deepspeed_config",
            labels,
            "--output",
            "labels",
        )
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(place / "black.png")
        run("predict", "run", "black.png", "--output", "predictions.json")
        yield place


def write_config(place: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    values = tiny_run.config(place / name, schedule={"max_steps": 3}, checkpoint={"every_steps": 2})
    values["dat"]["data"] |= {"num_train": 24, "num_test": 8}
    values["dat"]["evaluation"] |= {"validation_every_epochs": 0.5, "pictures": 1}
    change(values)
    return tiny_run.write(place / f"{name}.config.json", values)


def train(place: Path, name: str, change: Callable[[dict[str, Any]], None], code: int = 0) -> None:
    run("train", "--deepspeed_config", write_config(place, name, change), code=code)


def trains_well(values: dict[str, Any]) -> None:
    """With the optional columns that cost little, and an event."""
    del values["optimizer"]
    values["dat"] |= {
        "optimizer": {"name": "lamb"},
        "objective": {"name": "alp"},
        "numerics": {"trust_ratios": "warn", "largest_trust_ratio": 1e-6},
        "guard": {"action": "strengthen", "every_steps": 1, "probe_steps": 2, "num_images": 4},
    }
    values["dat"]["evaluation"]["natural_twin"] = True


def explodes(values: dict[str, Any]) -> None:
    """Ends in the second step, whose loss is not finite."""
    values |= {"gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": {"lr": 1e30}}}
    values["dat"]["schedule"] = {"max_steps": 3, "warmup_epochs": 0}


def hides_labels(values: dict[str, Any]) -> None:
    values["dat"]["data"]["labelled_fraction"] = 0.5


def zoo() -> list[str]:
    return ["zoo:network", "--import", "zoo", "--data", "npz:zoo.npz", "--threat", "linf:8/255"]


def evaluate_callable(place: Path) -> None:
    """A linear model, which attacks break in no time, with all that an evaluation can write."""
    import zoo as module  # written by the fixture

    x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    logits = module.network()(torch.from_numpy(x).permute(0, 3, 1, 2) / 255)
    y = logits.argmax(1).numpy()
    y[0] = (y[0] + 1) % 4
    np.savez(place / "zoo.npz", x_test=x, y_test=y)
    attacks = ["--attacks", "pgd-2", "apgd-ce-3", "--prefilter", "bf16", "--no_checks"]
    run("eval", *zoo(), *attacks, "--report", "--output", "verdict")


def json_of(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def card_of(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8").split("---\n")[1])


def kept_step(file: Path) -> Any:
    values = torch.load(file, weights_only=True)
    return {**values, "samples": list(values["samples"])}


ONE = Callable[[Path], Any]
WRITTEN: dict[str, list[tuple[str, ONE]]] = {
    "metricsjsonl": [("run/metrics.jsonl", rows_of), ("run/natural_twin/metrics.jsonl", rows_of)],
    "recordjson": [("run/record.json", json_of), ("run/natural_twin/record.json", json_of)],
    "eventsjsonl": [("*/events.jsonl", rows_of)],
    "trackersjson": [("run/trackers.json", json_of)],
    "evaluationjson-of-a-run": [("run/evaluation.json", json_of)],
    "statejson": [("run/checkpoints/step-*/state.json", json_of)],
    "manifestjson": [("run/checkpoints/step-*/manifest.json", json_of)],
    "modeljson": [
        ("run/checkpoints/*/model.json", json_of),
        ("run/exports/folder/model.json", json_of),
        ("fault/faults/step-*/model.json", json_of),
    ],
    "rank-rankpt": [("fault/faults/step-*/rank-*.pt", kept_step)],
    "evaluationjson-of-an-ensemble": [
        ("run/evaluation/evaluation.json", json_of),
        ("verdict/evaluation.json", json_of),
    ],
    "samplesjsonl": [("verdict/samples.jsonl", rows_of)],
    "planjson": [("run/evaluation/plan.json", json_of), ("verdict/plan.json", json_of)],
    "curvesjson": [("verdict/curves.json", json_of)],
    "readmemd-of-an-export": [("run/exports/*/README.md", card_of)],
    "configjson-of-a-timm-export": [("run/exports/timm/config.json", json_of)],
    "specjson": [("run/exports/safetensors/spec.json", json_of)],
    "robustbenchs-json": [("run/exports/robustbench/model_info/**/*.json", json_of)],
    "doctorjson": [("doctor/doctor.json", json_of)],
    "labelsjson": [("labels/labels.json", json_of)],
    "predictions": [("predictions.json", json_of)],
}
SHARED = {"accuracies", "origin", "validations", "findings"}  # tables that others refer to


def values_of(place: Path, anchor: str) -> Iterator[tuple[Path, Any]]:
    for pattern, read in WRITTEN[anchor]:
        files = sorted(place.glob(pattern))
        assert files, pattern
        for file in files:
            found = read(file)
            yield from ((file, value) for value in (found if isinstance(found, list) else [found]))


# ---- keys


@pytest.mark.parametrize("anchor", WRITTEN)
def test_every_key_that_is_written_is_on_the_page_with_its_type(place: Path, anchor: str) -> None:
    table = Table(anchor)
    problems = {
        f"{file.relative_to(place)}: {problem}"
        for file, value in values_of(place, anchor)
        for problem in table.problems(value)
    }
    assert not problems


def test_every_key_on_the_page_is_written_or_optional(place: Path) -> None:
    for anchor in WRITTEN:
        table = Table(anchor)
        for _, value in values_of(place, anchor):
            list(table.problems(value))
    missing = [
        f"{anchor}: {row.name}"
        for anchor, section in page().items()
        for row in section.keys
        if not row.hit and not row.is_optional
    ]
    assert not missing


def test_every_table_of_keys_is_compared_with_files() -> None:
    tables = {anchor for anchor, section in page().items() if section.keys}
    assert tables == WRITTEN.keys() | SHARED


def test_a_page_that_lies_is_seen() -> None:
    table = Table("samplesjsonl")
    assert list(table.problems({"index": 0, "robust": True})) == []
    assert list(table.problems({"index": "0"})) == ["index='0' is not of the type 'integer'"]
    assert list(table.problems({"idx": 0})) == ["idx is not on the page"]
    table = Table("evaluationjson-of-an-ensemble")
    assert list(table.problems({"attacks": [{"nam": ""}]})) == ["attacks[].nam is not on the page"]
    assert list(table.problems({"checks": [{"status": 1}]}))
    assert list(table.problems({"natural_acc": 93.5})), "percent is not a fraction"


def test_every_event_is_on_the_page() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dat_ds").rglob("*.py"))
    (row,) = [row for row in page()["eventsjsonl"].keys if row.name == "event"]
    assert set(re.findall(r'"event": "(\w+)"', source)) == set(
        re.findall(r"`(\w+)`", row.cells[1].split("(of a")[0])
    )


# ---- what the keys mean


def test_numbers_are_what_the_page_says(place: Path) -> None:
    metrics = rows_of(place / "run" / "metrics.jsonl")
    record = json_of(place / "run" / "record.json")
    assert metrics[-1]["lr"] == 0 < metrics[0]["lr"], "of the next step"
    for row, batch in zip(metrics, (8, 8, 6), strict=True):  # 22 images to train on
        seconds = row["seconds_attack"] + row["seconds_update"]
        assert row["images_per_second"] == pytest.approx(batch / seconds)
        assert row["epoch"] == row["step"] / 3
    for name, text in record["outcomes"].items():
        share = record["natural_acc"] if name == "natural" else record["robust_acc"][name]
        assert text.count("1") / record["num_examples"] == share
    seconds = record["seconds"]
    assert seconds["checkpoints"] < seconds["train"]
    assert seconds["train"] + seconds["evaluate"] < seconds["total"]
    best = record["best_validation"]
    assert best["value"] == best["robust_acc"]["pgd-2"]


def test_an_evaluation_adds_up_as_the_page_says(place: Path) -> None:
    found = json_of(place / "verdict" / "evaluation.json")
    samples = rows_of(place / "verdict" / "samples.jsonl")
    count = found["num_examples"]
    assert found["natural_acc"] == sum(sample["correct"] for sample in samples) / count == 15 / 16
    standing = round(found["natural_acc"] * count)
    for attack in found["attacks"]:
        assert attack["attacked"] == attack["stages"][0]["attacked"] == standing
        for key in ("broken", "forwards", "backwards"):
            assert attack[key] == sum(stage[key] for stage in attack["stages"])
        standing -= attack["broken"]
        assert found["robust_acc"][attack["name"]] == standing / count
    assert found["robust_acc"]["all"] == standing / count
    passes = sum(attack["forwards"] + attack["backwards"] for attack in found["attacks"])
    assert found["passes"] == passes + count


# ---- files


def problems_with(folder: Path, files: list[str], rows: list[Row]) -> list[str]:
    """Files that no row names, and rows that no file has."""
    found = []
    for file in files:
        fitting = [row for row in rows if covers(row.name, file)]
        for row in fitting:
            row.hit = True
        if not fitting:
            found.append(f"{folder}/{file} is not on the page")
    return found + [
        f"{folder}: {row.name} was not written"
        for row in rows
        if not row.hit and not row.is_optional
    ]


def covers(name: str, file: str) -> bool:
    pattern = pattern_of(name).pattern
    return bool(re.fullmatch(f"{pattern}.+" if name.endswith("/") else pattern, file))


def files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("folder", "anchor"),
    [
        ("run", "a-run"),
        ("run/checkpoints", "a-checkpoint"),
        ("verdict", "an-evaluation"),
        ("run/evaluation", "an-evaluation"),
    ],
)
def test_every_file_of_a_folder_is_on_the_page(place: Path, folder: str, anchor: str) -> None:
    rows = [Row(row.name, row.cells) for row in page()[anchor].files]
    assert not problems_with(Path(folder), files_in(place / folder), rows)


def test_files_that_only_some_runs_write_are_on_the_page(place: Path) -> None:
    names = [row.name for row in page()["a-run"].files]
    for folder in ("fault", "run/natural_twin"):
        for file in files_in(place / folder):
            assert any(covers(name, file) for name in names), f"{folder}/{file}"
    assert not (place / "run" / "natural_twin" / "examples.png").exists()
    names = [row.name for row in page()["other-commands"].files]
    assert set(files_in(place / "labels")) == {"labels.json", "labels.npz", "plan.json"}
    assert files_in(place / "doctor") == ["doctor.json"]
    assert names == ["doctor.json", "labels.json", "labels.npz"]


@pytest.mark.parametrize("form", EXPORTS)
def test_every_file_of_an_export_is_on_the_page(place: Path, form: str) -> None:
    rows = []
    for row in page()["an-export"].files:
        formats = set(re.findall(r"`(\w+)`", row.cells[0]))
        if row.cells[0].startswith("all"):
            formats = {*EXPORTS, *OTHER_EXPORTS} - formats
        if form in formats:
            rows.append(Row(row.name, row.cells))
    folder = place / "run" / "exports" / form
    assert not problems_with(folder, files_in(folder), rows)


# ---- versions, and keys that are not known


def changed(file: Path, target: Path, change: Callable[[Any], None]) -> Path:
    values = json_of(file)
    change(values)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(values), encoding="utf-8")
    return target


def test_the_page_tells_the_versions_of_the_formats() -> None:
    text = PAGE.read_text(encoding="utf-8").split("### Versions")[1].split("\n## ")[0]
    versions = dict(re.findall(r"^\| `([^`]+)`[^|]* \| `format`, (\d+) \|", text, re.MULTILINE))
    assert versions == {
        "model.json": str(saved.FORMAT),
        "state.json": str(checkpoints.FORMAT),
        "faults/step-STEP/rank-RANK.pt": str(reproducer.FORMAT),
    }


def test_other_versions_are_refused(place: Path, tmp_path: Path) -> None:
    checkpoint = place / "run" / "checkpoints" / "step-00000003"
    state = json_of(checkpoint / "state.json")
    for version in (1, 2, 3, 4):
        (tmp_path / "state.json").write_text(json.dumps({**state, "format": version}))
        if version <= 3:
            assert read_state(tmp_path)["format"] == version
    with pytest.raises(CheckpointError, match="it reads 1 to 3"):
        read_state(tmp_path)
    model = copy_of_model(checkpoint, tmp_path / "model", lambda v: v.update(format=2))
    with pytest.raises(ModelError, match="format 2"):
        load(model)
    (kept,) = (place / "fault").glob("faults/*/rank-0.pt")
    torch.save({**torch.load(kept, weights_only=True), "format": 2}, tmp_path / "rank-0.pt")
    with pytest.raises(CheckpointError, match="another version"):
        read_reproducer(tmp_path / "rank-0.pt")


def copy_of_model(checkpoint: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    changed(checkpoint / "model.json", folder / "model.json", change)
    shutil.copy(checkpoint / "model.safetensors", folder)
    return folder


def test_unknown_keys_are_refused_or_ignored(place: Path, tmp_path: Path) -> None:
    def add(values: Any) -> None:
        values["strange"] = 1

    with pytest.raises(ConfigError, match="strange"):
        load_config(
            changed(place / "run" / "config.json", tmp_path / "c.json", lambda v: add(v["dat"]))
        )
    checkpoint = place / "run" / "checkpoints" / "step-00000003"
    with pytest.raises(ModelError, match="strange"):
        load(copy_of_model(checkpoint, tmp_path / "model", lambda v: add(v["spec"])))
    load(copy_of_model(checkpoint, tmp_path / "other", add))
    plan = changed(place / "verdict" / "plan.json", tmp_path / "plan" / "plan.json", add)
    with pytest.raises(CheckpointError, match="strange"):
        open_folder(plan.parent, json_of(place / "verdict" / "plan.json"))
    (kept,) = (place / "fault").glob("faults/*/rank-0.pt")
    torch.save({**torch.load(kept, weights_only=True), "strange": 1}, tmp_path / "rank-0.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        read_reproducer(tmp_path / "rank-0.pt")
    changed(checkpoint / "state.json", tmp_path / "state.json", add)
    assert read_state(tmp_path)["strange"] == 1
    for name in ("evaluation.json", "curves.json"):
        changed(place / "verdict" / name, tmp_path / "verdict" / name, add)
    assert read_evidence(tmp_path / "verdict").evaluation["strange"] == 1
