"""``dat-ds predict``: image files, seen as the run saw its test images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.export.predict import predict
from dat_ds.models import load
from tests.integration import tiny_run

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, of three classes and several shapes, and a run on them."""
    place = tmp_path_factory.mktemp("predict")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for name, colour in COLOURS.items():
            folder = place / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-40, 40, (20 + i, 30, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    data = {"name": "imagefolder", "path": str(place / "photos"), "img_size": 16}
    values = tiny_run.config(place / "run", data=data, schedule={"epochs": 3})
    values["dat"]["evaluation"] |= {"pictures": 0}
    assert main(["train", "--deepspeed_config", str(tiny_run.write(place / "c.json", values))]) == 0
    return place


def test_a_file_is_seen_as_the_test_images_are(place: Path) -> None:
    run = load_config(str(place / "run" / "config.json"))
    images = run.dat.data.read_test(0).images
    model = load(place / "run")
    files = [images.file_of(i) for i in range(len(images))]  # type: ignore[union-attr]
    found = predict(place / "run", files, top=3)
    for i, prediction in enumerate(found):
        with torch.no_grad():
            expected = model(images[i][0][None]).double().softmax(1)[0]
        order = expected.argsort(descending=True).tolist()
        assert prediction.classes == tuple(list(COLOURS)[k] for k in order)
        assert prediction.probabilities == pytest.approx(expected[order].tolist(), rel=1e-5)
    # Colours this far apart are told apart by any model that has learnt anything.
    assert [p.classes[0] for p in found] == [name for name in COLOURS for _ in range(3)]


def test_the_command_prints_and_writes_files_and_folders(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, output = place / "photos" / "test", place / "predictions.json"
    words = [str(photos / "red" / "0.png"), str(photos / "blue"), "--top", "1"]
    assert main(["predict", str(place / "run"), *words, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [photos / "red" / "0.png", *(photos / "blue" / f"{i}.png" for i in range(3))]
    assert [line.rpartition(":")[0] for line in lines] == [str(file) for file in files]
    assert lines[0].split()[-2] == "red"
    written = json.loads(output.read_text(encoding="utf-8"))["predictions"]
    assert [one["file"] for one in written] == [str(file) for file in files]
    assert [one["classes"] for one in written] == [["red"], ["blue"], ["blue"], ["blue"]]


@pytest.mark.parametrize("kind", ["missing", "damaged", "empty", "transparent"])
def test_what_is_no_image_is_named(
    place: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image.png"
    if kind == "damaged":
        path.write_bytes(b"no image")
    elif kind == "empty":
        path.mkdir()
    elif kind == "transparent":
        Image.new("RGBA", (4, 4)).save(path)
    good = place / "photos" / "test" / "red" / "0.png"
    assert main(["predict", str(place / "run"), str(good), str(path)]) == 2
    said = capsys.readouterr()
    assert str(path) in said.out + said.err
    assert "Traceback" not in said.out + said.err


def test_grey_models_take_grey_files_alone(tmp_path: Path) -> None:
    values = tiny_run.config(tmp_path / "run", schedule={"epochs": 1, "max_steps": 1})
    values["dat"]["evaluation"] |= {"pictures": 0}
    assert main(["train", "--deepspeed_config", str(tiny_run.write(tmp_path / "c", values))]) == 0
    for name, mode, colour in (("grey", "L", 100), ("red", "RGB", (200, 0, 0))):
        Image.new(mode, (8, 8), colour).save(tmp_path / f"{name}.png")
    (found,) = predict(tmp_path / "run", [str(tmp_path / "grey.png")], top=9)
    assert sorted(found.classes) == ["0", "1", "2", "3"]
    assert sum(found.probabilities) == pytest.approx(1.0)
    with torch.no_grad():
        seen = load(tmp_path / "run")(torch.full((1, 1, 8, 8), 100 / 255)).double().softmax(1)
    assert sorted(found.probabilities) == pytest.approx(sorted(seen[0].tolist()), rel=1e-5)
    with pytest.raises(Exception, match=r"red\.png has colours, and the model was trained on grey"):
        predict(tmp_path / "run", [str(tmp_path / "red.png")])
