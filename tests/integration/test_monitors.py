"""Monitors hold the same rows from a training run and from a loop of one's own."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import logging
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dat_ds
from dat_ds.cli.main import main
from dat_ds.errors import ConfigError
from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.integration import tiny_run

EVERY, STEPS = 2, 5
DUE = [2, 4, 5]  # every second step, and the last


def sections(folder: Path) -> dict[str, Any]:
    """Both monitors that write files."""
    return {
        key: {"enabled": True, "output_path": str(folder), "job_name": job}
        for key, job in (("csv_monitor", "csv"), ("tensorboard", "tb"))
    }


def own_config(folder: Path, **dat: Any) -> dict[str, Any]:
    dat = {
        "logging": {"every_steps": EVERY},
        "schedule": {"name": "constant", "max_steps": STEPS},
        **dat,
    }
    return tiny.config(0, dat=dat, **sections(folder))


def csv_rows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What ``csv_monitor`` wrote, by name: steps and values."""
    found = {}
    for path in folder.glob("*.csv"):
        header, *rows = csv.reader(path.read_text().splitlines())
        assert header[0] == "step"
        assert path.stem.endswith(header[1])
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    return found


def tensorboard_rows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag.replace("/", "_"): [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def train(engine: dat_ds.AdversarialEngine, *, three_lines: bool) -> list[dict[str, Any]]:
    """``STEPS`` steps; the metrics of those that are due."""
    found = []
    for step in range(1, STEPS + 1):
        x, y = tiny.images(4, seed=step)
        if three_lines:
            engine.backward(engine(x, y))
            engine.step()
        else:
            engine.train_step([(x, y)])
        if step in DUE:
            found.append(engine.metrics)
    return found


@pytest.mark.parametrize("three_lines", [True, False], ids=["three lines", "train_step"])
def test_an_own_loop_writes_its_metrics(tmp_path: Path, three_lines: bool) -> None:
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=own_config(tmp_path))
    metrics = train(engine, three_lines=three_lines)
    engine.close()
    written = csv_rows(tmp_path / "csv")
    for name in ("loss", "robust_acc", "attack_zero_share", "seconds_attack", "skipped_steps"):
        assert written[f"train_{name}"] == list(zip(DUE, [m[name] for m in metrics], strict=True))
    assert written["train_lr"] == [(step, 0.1) for step in DUE]
    assert not any(name.startswith("Train_") for name in written), "those are DeepSpeed's"
    shown = tensorboard_rows(tmp_path / "tb")
    assert shown.keys() == written.keys()
    for name, rows in written.items():
        assert dict(shown[name]) == pytest.approx(dict(rows), rel=1e-6)


def test_an_own_loop_that_asks_for_no_monitor_writes_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny.config(0, dat={"logging": {"every_steps": 1}})
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
    train(engine, three_lines=True)
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_training_run_writes_each_row_once_and_its_twin_elsewhere(tmp_path: Path) -> None:
    values = tiny_run.config(
        tmp_path / "run",
        schedule={"epochs": 1, "max_steps": STEPS},
        logging={"every_steps": EVERY},
    )
    values["dat"]["evaluation"]["natural_twin"] = True
    values["csv_monitor"] = sections(tmp_path)["csv_monitor"]
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 0
    for run, folder in (("run", "csv"), ("run/natural_twin", "csv/natural_twin")):
        rows = tiny_run.rows(tmp_path / run)
        assert [row["step"] for row in rows] == DUE
        written = csv_rows(tmp_path / folder)
        for name in ("loss", "natural_acc", "lr", "epoch", "images_per_second"):
            expected = [(row["step"], row[name]) for row in rows if row[name] is not None]
            assert written.get(f"train_{name}", []) == expected
        assert [step for step, _ in written["validation_natural_acc"]] == [STEPS]
        # As ever, unless the config says otherwise.
        shown = tensorboard_rows(tmp_path / run / "tensorboard").keys()
        assert {name for name in shown if not name.startswith("test_")} == written.keys()


def test_a_folder_that_vanishes_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = own_config(tmp_path, logging={"every_steps": 1})
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
    x, y = tiny.images(4)
    engine.train_step([(x, y)])
    for job in ("csv", "tb"):
        shutil.rmtree(tmp_path / job)
    with caplog.at_level(logging.WARNING, logger="dat_ds"):
        for _ in range(2):
            engine.train_step([(x, y)])
    engine.close()
    assert sorted(record.message for record in caplog.records) == [
        f"{key} could not be written to after step 2, and perhaps not later either (there is no "
        f"folder {str(tmp_path / job)!r}). The run goes on."
        for key, job in (("csv_monitor", "csv"), ("tensorboard", "tb"))
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.monitor.csv_monitor import csvMonitor
    from tensorboard.summary.writer.record_writer import RecordWriter

    rows: list[bytes] = []
    real = RecordWriter.write

    def full_after_thirty(self: RecordWriter, data: bytes) -> None:
        rows.append(data)
        if len(rows) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full_after_thirty)
    monkeypatch.setattr(csvMonitor, "write_events", full)
    values = tiny_run.config(
        tmp_path / "run",
        schedule={"epochs": 1, "max_steps": STEPS},
        logging={"every_steps": 1},
    )
    values["csv_monitor"] = sections(tmp_path)["csv_monitor"]
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "The run goes on" in line]
    assert sorted(line.split(" could not be written to")[0] for line in told) == [
        "csv_monitor",
        "tensorboard",
    ]
    assert all("No space left on device" in line for line in told)
    assert [row["step"] for row in tiny_run.rows(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert (tmp_path / "run" / "record.json").exists()


class FakeWandb(types.ModuleType):
    """Records what it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, str]] = []
        self.run: object = None
        self.finished = 0

    def init(self, **options: Any) -> None:
        if options["project"] == "refused":
            raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login")
        self.started.append(options)
        self.run = self.run or object()

    def log(self, data: dict[str, Any], step: int, commit: None) -> None:
        self.logged += [(step, name) for name in data]

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """A package of that name, installed."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    fake = FakeWandb(tmp_path)
    # Found, not imported: an imported module would outlive this test.
    fake.__spec__ = importlib.util.find_spec("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_service_is_started_and_told_each_due_step(wandb: FakeWandb) -> None:
    dat = {"logging": {"every_steps": EVERY}, "schedule": {"name": "constant", "max_steps": STEPS}}
    config = tiny.config(0, dat=dat, wandb={"enabled": True, "project": "p", "team": "t"})
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
    train(engine, three_lines=True)
    engine.close()
    assert wandb.started == [{"project": "p", "group": None, "entity": "t"}]
    assert [step for step, name in wandb.logged if name == "train/loss"] == DUE
    assert wandb.finished == 1


def test_a_run_of_the_callers_own_is_not_ended(wandb: FakeWandb) -> None:
    wandb.init(project="theirs")
    config = tiny.config(0, wandb={"enabled": True})
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
    engine.close()
    assert wandb.finished == 0


def test_a_service_that_refuses_is_one_line(wandb: FakeWandb) -> None:
    config = tiny.config(0, wandb={"enabled": True, "project": "refused"})
    with pytest.raises(ConfigError) as caught:
        dat_ds.initialize(model=tiny.cnn(), config=config)
    assert str(caught.value) == (
        "wandb.enabled=true, but it cannot be started: api_key not configured (no-tty). Call "
        "wandb.login. Correct that, or write wandb.enabled=false."
    )


def test_a_timing_writes_to_no_monitor(tmp_path: Path) -> None:
    from dat_ds.bench.engines import optimizer_step, prepared_engine
    from dat_ds.config import load_config

    values = {**tiny_run.config(tmp_path / "run"), **sections(tmp_path)}
    engine, _, x, y = prepared_engine(load_config(values))
    optimizer_step(engine, x, y)
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_wall_clock_breakdown_times_the_update_alone() -> None:
    config = tiny.config(0, wall_clock_breakdown=True)
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
    x, y = tiny.images(4)
    loss = engine(x, y)  # three attack steps, and then the outer forward
    timers = engine.deepspeed.timers.get_timers()
    assert {len(timers[name].event_timers) for name in ("fwd_microstep", "fwd")} == {1}
    engine.backward(loss)
    engine.step()
    engine.close()


def _two_ranks(folder: str) -> list[str]:
    config = own_config(Path(folder))
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
    x, y = tiny.images(8)
    rank = engine.ranks.rank
    losses = []
    for step in range(1, STEPS + 1):
        engine.train_step([(x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4])])
        if step in DUE:
            losses.append(engine.reduced_metrics()["loss"])
    engine.close()
    return losses


def test_one_rank_writes_what_all_measured(tmp_path: Path) -> None:
    losses, _ = run_ranks(_two_ranks, 2, str(tmp_path))
    assert csv_rows(tmp_path / "csv")["train_loss"] == list(zip(DUE, losses, strict=True))
    assert len(list((tmp_path / "tb").iterdir())) == 1


# ---- dat.logging.trackers


class FakeService(types.ModuleType):
    """The part of wandb's and trackio's interface that is called, as one who keeps every call."""

    Image = staticmethod(lambda file: ("image", file))

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, str, Any]] = []
        self.run: object = None

    def init(self, **options: Any) -> None:
        self.started.append(options)
        self.run = object()

    def log(self, data: dict[str, Any], step: int) -> None:
        assert self.run is not None
        self.logged += [(step, name, value) for name, value in data.items()]

    def finish(self) -> None:
        self.run = None

    def steps_of(self, name: str) -> list[int]:
        return [step for step, logged, _ in self.logged if logged == name]


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeService]:
    """Packages of both names, installed."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    found = {}
    for name in ("wandb", "trackio"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("")
        found[name] = FakeService(name)
        found[name].__spec__ = importlib.util.find_spec(name)
        monkeypatch.setitem(sys.modules, name, found[name])
    return found


def tracked(folder: Path, **dat: Any) -> dict[str, Any]:
    names = ["tensorboard", "wandb", "trackio"]
    return tiny_run.config(
        folder,
        schedule={"epochs": 1, "max_steps": STEPS},
        logging={"every_steps": 1, "trackers": names, "project": "robust"},
        **dat,
    )


def test_trackers_get_each_row_of_the_metrics_and_the_pictures_once(
    tmp_path: Path, services: dict[str, FakeService]
) -> None:
    values = tracked(tmp_path / "run")
    values["dat"]["evaluation"] |= {"natural_twin": True, "pictures": 2}
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main(["train", "--deepspeed_config", str(path)]) == 0
    rows = tiny_run.rows(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "trackers.json").read_text())
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    for name, service in services.items():
        assert [(s, v) for s, n, v in service.logged if n == "train/loss"] == [
            (row["step"], row["loss"]) for row in rows
        ]
        assert (STEPS, "test/natural_acc", record["natural_acc"]) in service.logged
        picture = ("image", str(tmp_path / "run" / "examples.png"))
        assert [e for e in service.logged if e[1] == "examples"] == [(STEPS, "examples", picture)]
        # Of the run alone, not of its twin; the second time for the outcome.
        assert [options["resume"] for options in service.started] == ["allow", "allow"]
        assert {options["project"] for options in service.started} == {"robust"}
        assert service.started[0]["config"]["dat"]["logging"]["project"] == "robust"
        assert service.run is None, f"{name} was not finished"
    assert {options["id"] for options in services["wandb"].started} == {state["id"]}
    names = {options["name"] for options in services["trackio"].started}
    assert names == {f"run-{state['id'][:8]}"}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in events.Images("examples")] == [STEPS]
    assert [e.step for e in events.Scalars("train/loss")] == [row["step"] for row in rows]
    # Nothing is told twice of a run that had ended.
    before = {name: list(service.logged) for name, service in services.items()}
    assert main(["train", "--deepspeed_config", str(path), "--resume", "auto"]) == 0
    assert {name: service.logged for name, service in services.items()} == before


def test_a_resumed_run_goes_on_in_the_same_tracker_run_without_steps_twice(
    tmp_path: Path, services: dict[str, FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tracked(tmp_path / "run", checkpoint={"every_steps": 2})
    values["dat"]["schedule"] = {"name": "constant", "epochs": 3, "max_steps": 6}
    path = tiny_run.write(tmp_path / "config.json", values)
    real = FakeService.log

    def dies(self: FakeService, data: dict[str, Any], step: int) -> None:
        real(self, data, step)
        if step == 5 and self.__name__ == "trackio":
            raise KeyboardInterrupt

    monkeypatch.setattr(FakeService, "log", dies)
    assert main(["train", "--deepspeed_config", str(path)]) != 0
    for service in services.values():
        service.run = None  # with its process
    monkeypatch.setattr(FakeService, "log", real)
    assert main(["train", "--deepspeed_config", str(path), "--resume", "auto"]) == 0
    # Steps 5 and 6 are trained again after the checkpoint of step 4; wandb has 5 already.
    assert services["wandb"].steps_of("train/loss") == list(range(1, 7))
    assert len({options["id"] for options in services["wandb"].started}) == 1
    assert len({options["name"] for options in services["trackio"].started}) == 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 7))


def test_a_loop_of_ones_own_tells_services(services: dict[str, FakeService]) -> None:
    dat = {
        "logging": {"every_steps": EVERY, "trackers": ["tensorboard", "wandb"]},
        "schedule": {"name": "constant", "max_steps": STEPS},
    }
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=tiny.config(0, dat=dat))
    train(engine, three_lines=True)
    engine.close()
    assert services["wandb"].steps_of("train/loss") == DUE
    assert services["wandb"].run is None
    assert services["trackio"].started == []


def test_a_tracker_that_does_not_start_is_one_line(
    services: dict[str, FakeService], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login")

    services["wandb"].init = refuse
    path = tiny_run.write(tmp_path / "config.json", tracked(tmp_path / "run"))
    assert main(["train", "--deepspeed_config", str(path)]) == 2
    assert (
        "dat.logging.trackers names 'wandb', but it cannot be started: api_key not configured "
        "(no-tty). Call wandb.login. Correct that, or leave it out."
    ) in capsys.readouterr().err
