"""Whole runs on one rank, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dat_ds import models
from dat_ds.attacks import ThreatModel
from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.evaluation import evaluate
from tests.integration import tiny_run

METRICS = {
    "step",
    "epoch",
    "loss",
    "natural_acc",
    "robust_acc",
    "lr",
    "seconds_attack",
    "seconds_update",
    "images_per_second",
    "bytes_sent",
    "attack_zero_share",
    "attack_nonfinite_share",
}
RECORD = {
    "config",
    "versions",
    "hardware",
    "commit",
    "seed",
    "ranks",
    "seconds",
    "natural_acc",
    "robust_acc",
    "num_examples",
}


def train(folder: Path, values: dict[str, Any], *arguments: str) -> int:
    path = tiny_run.write(folder / "config.json", values)
    return main(["train", "--deepspeed_config", str(path), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    values = tiny_run.config(folder / "run")
    values["dat"]["evaluation"]["natural_twin"] = True
    assert train(folder, values) == 0
    return folder / "run"


def test_a_run_leaves_every_file_of_the_contract(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert record.keys() >= RECORD
    assert record["num_examples"] == 20
    assert 0 <= record["robust_acc"]["pgd-5"] <= record["natural_acc"] <= 1
    assert record["largest_perturbation"]["pgd-5"] == pytest.approx(2 / 16, abs=1e-6)
    rows = tiny_run.rows(finished)
    assert [row["step"] for row in rows] == list(range(1, 25))  # 90 images in batches of 8, twice
    assert all(row.keys() >= METRICS for row in rows)
    assert list((finished / "tensorboard").glob("events*"))
    assert (finished / "examples.png").stat().st_size > 5000
    twin = json.loads((finished / "natural_twin" / "record.json").read_text())
    assert twin["natural"]
    assert twin["config"]["dat"]["attack"]["name"] == "none"


def test_the_saved_config_loads_to_the_same_run(finished: Path) -> None:
    saved = json.loads((finished / "config.json").read_text())
    assert load_config(saved).to_dict() == saved


def test_the_loaded_model_is_the_one_the_record_speaks_of(finished: Path) -> None:
    from dat_ds.assembly import build_data_of

    record = json.loads((finished / "record.json").read_text())
    run = load_config(record["config"])
    again = evaluate(
        models.load(finished), build_data_of(run).test, ThreatModel("linf", 2 / 16), ["pgd-5"]
    )
    assert again.outcomes == record["outcomes"]


def test_eval_and_report_read_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), "--set", 'dat.evaluation.attacks=["pgd-3-2"]']) == 0
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert list(evaluation["robust_acc"]) == ["pgd-3-2"]
    capsys.readouterr()
    assert main(["report", str(finished), str(finished / "natural_twin")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert "| natural |" in table[3]


@pytest.mark.parametrize(
    ("model", "augment"),
    [({**tiny_run.VIT, "patch_size": 2}, "resized_crop_flip"), (tiny_run.CNN, "crop_flip")],
    ids=["vit", "cnn"],
)
def test_images_need_not_be_square(tmp_path: Path, model: dict[str, Any], augment: str) -> None:
    data = {"name": "synthetic", "image_shape": [3, 6, 10], "num_train": 40, "num_test": 10}
    values = tiny_run.config(
        tmp_path / "run", model=model, data={**data, "augment": augment}, schedule={"epochs": 1}
    )
    assert train(tmp_path, values) == 0
    assert (tmp_path / "run" / "examples.png").stat().st_size > 5000
    assert models.load(tmp_path / "run")(torch.rand(2, 3, 6, 10)).shape == (2, 10)
    assert main(["eval", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("model", [tiny_run.VIT, tiny_run.CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_exact(tmp_path: Path, model: dict[str, Any], stage: int) -> None:
    values = tiny_run.config(tmp_path / "whole", model=model)
    values["zero_optimization"] = {"stage": stage}
    check_resume(tmp_path, values)


def test_resume_is_bit_exact_where_micro_batches_are_attacked_together(tmp_path: Path) -> None:
    values = tiny_run.config(tmp_path / "whole", engine={"attack_micro_batches": 2})
    values |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    check_resume(tmp_path, values)


def test_resume_is_bit_exact_from_what_was_written_beside_training(tmp_path: Path) -> None:
    values = tiny_run.config(tmp_path / "whole")
    values["dat"]["checkpoint"]["asynchronous"] = True
    check_resume(tmp_path, values)


def test_other_data_are_refused_and_another_rate_has_to_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_run.config(tmp_path / "run", schedule={"name": "constant", "epochs": 1})
    values["dat"]["evaluation"]["pictures"] = 0
    assert train(tmp_path, values) == 0
    values["optimizer"]["params"]["lr"] = 0.001
    values["dat"]["schedule"]["epochs"] = 2
    assert train(tmp_path, values, "--resume", "auto") == 2
    message = capsys.readouterr().err
    assert "optimizer.params.lr: checkpoint 0.003, this run 0.001" in message
    assert "dat.schedule.epochs: checkpoint 1.0, this run 2.0" in message
    named = ["--changed", "optimizer.params.lr", "--changed", "dat.schedule"]
    assert train(tmp_path, values, "--resume", "auto", *named) == 0
    rows = tiny_run.rows(tmp_path / "run")
    assert [row["lr"] for row in rows] == pytest.approx([0.003] * 12 + [0.001] * 12)
    values["dat"]["data"]["num_train"] = 60  # 54 to train on: 7 steps an epoch
    values["dat"]["schedule"]["epochs"] = 4
    assert train(tmp_path, values, "--resume", "auto", "--changed", "dat.schedule") == 2
    message = capsys.readouterr().err
    assert "dat.data: other training data: checkpoint 90 samples, this run 54" in message
    assert "dat.data.num_train: checkpoint 100, this run 60" in message
    assert train(tmp_path, values, "--resume", "auto", "--changed", "dat") == 0
    assert len(tiny_run.rows(tmp_path / "run")) == 28


def test_a_checkpoint_of_an_earlier_version_resumes_too(tmp_path: Path) -> None:
    check_resume(tmp_path, tiny_run.config(tmp_path / "whole"), earlier=True)


def make_earlier(checkpoint: Path) -> None:
    """Take out of a checkpoint what earlier versions did not write."""
    state = json.loads((checkpoint / "state.json").read_text())
    for key in ("data_position", "accumulation", "global_batch", "data"):
        del state[key]
    (checkpoint / "state.json").write_text(json.dumps({**state, "format": 1}))
    (checkpoint / "manifest.json").unlink()
    own = torch.load(checkpoint / "rank-0.pt", weights_only=True)
    del own["rng_python"], own["rng_numpy"], own["client_state"], own["layout"]
    torch.save(own, checkpoint / "rank-0.pt")


def check_resume(tmp_path: Path, values: dict[str, Any], *, earlier: bool = False) -> None:
    """A run that is broken off and resumed goes on as the whole one, bit by bit."""
    assert train(tmp_path, values) == 0
    # What a kill -9 after step 18 leaves: the checkpoint of step 15 and rows beyond it.
    interrupted = tmp_path / "interrupted"
    values["dat"]["output_dir"] = str(interrupted)
    values["dat"]["checkpoint"]["keep"] = 99
    assert train(tmp_path, values) == 0
    (interrupted / "record.json").unlink()
    (interrupted / "checkpoints" / "latest").write_text("step-00000015")
    for other in (5, 10, 20, 24):
        shutil.rmtree(interrupted / "checkpoints" / f"step-{other:08d}")
    shutil.rmtree(interrupted / "checkpoints" / "best")
    if earlier:
        make_earlier(interrupted / "checkpoints" / "step-00000015")
    torch.manual_seed(12345)
    assert train(tmp_path, values, "--resume", "auto") == 0
    whole, resumed = tiny_run.rows(tmp_path / "whole"), tiny_run.rows(interrupted)
    timeless = {"loss", "step", "natural_acc", "robust_acc", "lr", "attack_zero_share"}
    assert [{k: row[k] for k in timeless} for row in resumed] == [
        {k: row[k] for k in timeless} for row in whole
    ]
    records = [
        json.loads((r / "record.json").read_text()) for r in (tmp_path / "whole", interrupted)
    ]
    assert records[0]["outcomes"] == records[1]["outcomes"]
    assert records[0]["validation"] == records[1]["validation"]


def test_three_line_loop(tmp_path: Path) -> None:
    import dat_ds
    from dat_ds.assembly import build_data_of, build_model_of

    run = load_config(tiny_run.config(tmp_path / "run"))
    splits = build_data_of(run)
    engine, optimizer, loader, scheduler = dat_ds.initialize(
        model=build_model_of(run, splits), config=run, training_data=splits.train
    )
    assert optimizer is engine.deepspeed.optimizer
    assert scheduler is not None
    assert loader is not None
    for x, y in loader:
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
    assert engine.global_steps == loader.steps_per_epoch == 12
    metrics = engine.metrics
    assert metrics["loss"] == pytest.approx(
        loss.item()
    )  # the last batch, of 2 images, has weight 1
    assert metrics["seconds_attack"] > 0
    assert metrics["bytes_sent"] == dict.fromkeys(metrics["bytes_sent"], 0)
    engine.close()


def test_a_loop_of_ones_own_continues_a_run_and_not_the_other_way_round(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dat_ds
    from dat_ds.assembly import build_data_of, build_model_of

    values = json.loads((finished / "config.json").read_text())
    run = load_config(values)
    splits = build_data_of(run)
    engine, _, loader, _ = dat_ds.initialize(
        model=build_model_of(run, splits), config=run, training_data=splits.train
    )
    assert loader is not None
    path, client_state = engine.load_checkpoint(finished / "checkpoints")
    assert path == finished / "checkpoints" / "step-00000024"
    assert client_state == {}
    assert (engine.global_steps, loader.position) == (24, (2, 0))
    values["dat"]["output_dir"] = str(tmp_path / "own")
    (tmp_path / "own").mkdir()
    engine.save_checkpoint(tmp_path / "own" / "checkpoints")
    engine.close()
    assert train(tmp_path, values, "--resume", "auto") == 2
    assert "written by engine.save_checkpoint in a loop of its own" in capsys.readouterr().err
