"""Runs on images as they lie on disks: damaged ones, lost shards, mixtures, other class orders."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.judge.target import dataset_of
from dat_ds.models.saved import find_saved, read_spec
from tests.distributed.harness import run_ranks
from tests.integration import tiny_run


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root: Path, count: int = 20, classes: str = "ab") -> list[Path]:
    files = []
    for part in ("train", "test"):
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                file = root / part / name / f"{i:02d}.png"
                file.write_bytes(encoded(1000 * (part == "test") + 100 * number + i))
                files.append(file)
    return files[: len(classes) * count]


def write_shards(root: Path) -> Path:
    root.mkdir()
    for part, count in (("train-0", 20), ("train-1", 20), ("test-0", 8)):
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            for i in range(count):
                for name, content in ((f"{i}.png", encoded(i)), (f"{i}.cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def config(folder: Path, data: dict[str, Any], **dat: Any) -> dict[str, Any]:
    values = tiny_run.config(
        folder / "run",
        data={"img_size": 8, "crop_share": 1.0, "validation_fraction": 0, **data},
        **dat,
    )
    values["dat"]["evaluation"] |= {"pictures": 0, "attacks": [], "validation_attack": "pgd-1"}
    values["dat"]["attack"] = {"steps": 1, "step_size": "1/16"}
    return values


def train(folder: Path, values: dict[str, Any], *arguments: str) -> int:
    path = tiny_run.write(folder / "config.json", values)
    return main(["train", "--deepspeed_config", str(path), *arguments])


def test_damaged_images_are_listed_counted_and_known_after_a_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = write_folder(tmp_path / "data")
    for file in (files[3], files[4], files[30]):
        file.write_bytes(b"no image")
    data = {"name": "imagefolder", "path": str(tmp_path / "data"), "num_workers": 1}
    values = config(tmp_path, data)
    assert train(tmp_path, values) == 2, "the default ends the run"
    assert "dat.data.path: cannot read the image" in capfd.readouterr().err

    values = config(tmp_path, {**data, "damaged": "skip", "most_damaged": 2})
    values["dat"]["output_dir"] = str(run := tmp_path / "skips")
    assert train(tmp_path, values) == 2
    captured = capfd.readouterr()
    assert captured.out.count("Another image stands for a damaged one: ") == 1
    assert "3 damaged training images were met, and dat.data.most_damaged=2 allows 2 of 40" in (
        captured.err
    )
    assert len((run / "damaged.txt").read_text().splitlines()) == 3
    assert train(tmp_path, values, "--resume", "auto") == 2, "the limit holds after a resume"
    values["dat"]["data"]["most_damaged"] = 0.1
    assert train(tmp_path, values, "--resume", "auto") == 0
    record = json.loads((run / "record.json").read_text())
    assert (record["damaged_images"], record["steps"]) == (3, 10)
    lines = (run / "damaged.txt").read_text().splitlines()
    assert sorted(lines) == sorted(set(lines))
    assert all(any(str(file) in line for line in lines) for file in (files[3], files[4], files[30]))


def test_names_of_classes_lie_in_the_run_and_go_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", count=8)
    for file in (tmp_path / "data").rglob("*.png"):  # which are easy to tell apart
        level = 40 if file.parent.name == "a" else 200
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file)
    (tmp_path / "map.txt").write_text("b\na\n")
    data = {"name": "imagefolder", "path": str(tmp_path / "data")}
    values = config(tmp_path, {**data, "class_map": str(tmp_path / "map.txt")})
    values["dat"]["schedule"] = {"epochs": 10}
    assert train(tmp_path, values) == 0
    run = tmp_path / "run"
    record = json.loads((run / "record.json").read_text())
    assert record["class_names"] == ["b", "a"]
    assert record["natural_acc"] == 1
    assert read_spec(find_saved(run) / "model.json")["class_names"] == ["b", "a"]
    chosen = dataset_of("imagefolder:any", load_config(run / "config.json"), {}, [])
    assert (chosen.img_size, chosen.crop_share) == (8, 1)
    # Neither the map nor the run's data are needed any more to know the order.
    (tmp_path / "map.txt").unlink()
    (tmp_path / "data" / "train").rename(tmp_path / "gone")
    common = ["eval", str(run), "--data", f"imagefolder:{tmp_path}/data/test", "--attack", "pgd-1"]
    assert main([*common, "--output", str(tmp_path / "e")]) == 0
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert found["natural_acc"] == record["natural_acc"]
    (tmp_path / "data" / "test" / "a").rename(tmp_path / "data" / "test" / "c")
    assert main([*common, "--output", str(tmp_path / "f")]) == 2


def test_a_mixture_is_trained_on_and_another_one_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "shards")
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "made.npz", images=images, labels=np.arange(100) % 2)
    extra = {"name": "npz", "path": str(tmp_path / "made.npz")}
    data = {"name": "webdataset", "path": str(shards), "extra": extra, "extra_fraction": 0.75}
    values = config(tmp_path, data)
    values["dat"]["schedule"]["max_steps"] = 7
    assert train(tmp_path, values) == 0
    out = capfd.readouterr().out
    assert "140 training images (100 of them of dat.data.extra, 75% of every batch)" in out
    assert json.loads((tmp_path / "run" / "record.json").read_text())["steps"] == 7
    values["dat"]["data"]["extra_fraction"] = 0.5
    assert train(tmp_path, values, "--resume", "auto") == 2
    assert "dat.data.extra_fraction: checkpoint 0.75, this run 0.5" in capfd.readouterr().err
    values["dat"]["data"]["extra_fraction"] = 0.75
    np.savez(tmp_path / "made.npz", images=images[::-1], labels=np.arange(100) % 2)
    assert train(tmp_path, values, "--resume", "auto") == 2
    assert "dat.data: other training data: sample 40 and" in capfd.readouterr().err


def two_ranks(folder: str) -> dict[str, Any]:
    """What happens on a rank whose images are damaged, and on one whose shard is lost."""
    from dat_ds.errors import UserError
    from dat_ds.training.run import train

    root = Path(folder)
    found: dict[str, Any] = {}

    def outcome(name: str, data: dict[str, Any], **more: Any) -> None:
        values = config(root / name, data)
        values["train_micro_batch_size_per_gpu"] = 4
        try:
            record = train(load_config(values), **more)
            found[name] = None if record is None else record["damaged_images"]
        except UserError as error:
            found[name] = str(error).removeprefix("rank 0: ").removeprefix("rank 1: ")

    data = {"name": "imagefolder", "path": str(root / "data"), "damaged": "skip"}
    outcome("listed", {**data, "most_damaged": 3})
    outcome("too_many", {**data, "most_damaged": 2})

    import dat_ds.data.tars as tars

    read = tars.TarImages.decode
    shards = {"name": "webdataset", "path": str(root / "shards")}

    def lose(self: Any, index: int) -> Any:
        if index == 25:
            (root / "shards" / "train-1.tar").unlink(missing_ok=True)
        return read(self, index)

    logging.getLogger("dat_ds").setLevel(logging.ERROR)
    tars.TarImages.decode = lose  # type: ignore[method-assign]
    outcome("lost", shards)
    tars.TarImages.decode = read  # type: ignore[method-assign]
    return found


def test_two_ranks_end_together_and_list_the_images_of_both(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "data")
    write_shards(tmp_path / "shards")
    for file in (files[3], files[14], files[30]):
        file.write_bytes(b"no image")
    one, other = run_ranks(two_ranks, 2, str(tmp_path))
    assert one == other
    assert one["listed"] == 3
    assert len((tmp_path / "listed" / "run" / "damaged.txt").read_text().splitlines()) == 3
    assert "3 damaged training images were met" in one["too_many"]
    assert one["lost"].startswith(f"dat.data.path: the shard {tmp_path}/shards/train-1.tar cannot")
