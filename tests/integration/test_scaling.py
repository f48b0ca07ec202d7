"""Scaling: what is refused, what the table is made of, and ranks over loopback and shaped links."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dat_ds.bench.scaling.measure import bench_scaling, drift_of
from dat_ds.bench.scaling.network import ShapedNetwork
from dat_ds.bench.scaling.plan import Plan, Point, config_of, points_of
from dat_ds.bench.scaling.report import describe, read_scaling, rows_of
from dat_ds.cli.main import main
from dat_ds.config import RunConfig, load_config
from dat_ds.errors import ConfigError
from tests.integration import tiny_run

CAN_MAKE_HOSTS = os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))


def run_of(tmp_path: Path, **overrides: Any) -> RunConfig:
    return load_config({**tiny_run.config(tmp_path / "run"), **overrides})


def point(ranks: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """A point as a record holds it: a batch of 8, ZeRO-0, no codec, weak scaling."""
    forward = {1: 0.01, 2: 0.015, 4: 0.03}[ranks]
    values = {
        "mode": "weak",
        "ranks": ranks,
        "zero_stage": 0,
        "codec": "none",
        "micro_batch": 8,
        "mbit": None if ranks == 1 else 100.0,
        "gradient_accumulation_steps": 1,
        "attack_steps": 2,
        "seconds": [seconds] * 5,
        "seconds_forward": [forward] * 5,
        "seconds_alone": [0.01] * 5,
        "seconds_attack": 0.1,
        "seconds_update": 0.2,
        "bytes_sent": {"gradients": 1_000_000},
        "collectives": {"gradients": 1},
    }
    return {**values, **changes}


def record(points: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    links = [
        {"ranks": 2, "mbit": 100.0, "collective": "all_reduce", "bytes": size, "seconds": [t] * 5}
        # 2 ranks: 2 alpha + size beta, of 100 us and 8e-8 s a byte
        for size, t in ((size, 2e-4 + 8e-8 * size) for size in (2**12, 2**16, 2**22))
    ]
    values = {
        "bench": "scaling",
        "points": points,
        "links": links,
        "num_parameters": 250_000,
        "clock_drift": 1.0,
        "cores": 2,
        "launched": False,
        "config": {"dat": {"model": {"name": "vit"}, "attack": {"name": "pgd", "steps": 2}}},
    }
    return {**values, **changes}


def write(path: Path, values: Mapping[str, Any]) -> str:
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def test_missing_tools_and_rights_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="ip and tc not found: apt install iproute2"):
        ShapedNetwork(2, 100)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="--mbit: Network namespaces take root"):
        points_of(run_of(tmp_path), Plan(mbit=(100.0,)))
    assert points_of(run_of(tmp_path), Plan(ranks=(1,), mbit=(100.0,))), "one rank has no link"
    assert points_of(run_of(tmp_path), Plan()), "loopback takes no rights"


def test_every_problem_is_told_at_once_and_before_anything_runs(tmp_path: Path) -> None:
    plan = Plan(
        ranks=(0, 3),
        stages=(2, 5),
        codecs=("int9", "OneBitAdam", "zero_one_adam"),
        modes=("strong", "both"),
        mbit=(-1.0,),
        repetitions=4,
    )
    with pytest.raises(ConfigError) as caught:
        bench_scaling(run_of(tmp_path), plan)
    for said in (
        "at least 5",
        "--ranks 0",
        "--stages 5",
        "int9: no codec of that name (did you mean 'int8'?)",
        "--codecs zero_one_adam: its steps",
        "add stage 0",
        "--mode both",
        "a global batch of 8 images cannot be divided into 3",
        "--mbit -1.0",
    ):
        assert said in str(caught.value)


def test_what_the_config_forbids_is_told_with_its_point(tmp_path: Path) -> None:
    optimizer = {"type": "Lamb", "params": {"lr": 1e-3}}
    run = run_of(tmp_path, optimizer=optimizer, zero_optimization={"stage": 0})
    with pytest.raises(ConfigError, match=r"--stages 2 with --codecs int8: optimizer\.type='lamb'"):
        points_of(run, Plan(stages=(0, 2), codecs=("none", "int8")))
    assert points_of(run, Plan(stages=(0,), codecs=("none", "int8")))


def test_a_run_with_a_1_bit_optimizer_does_not_pass_for_one_without(tmp_path: Path) -> None:
    optimizer = {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 5}}
    run = run_of(tmp_path, optimizer=optimizer, zero_optimization={"stage": 0})
    with pytest.raises(ConfigError, match="sends no gradients: name AdamW"):
        points_of(run, Plan())
    assert points_of(run, Plan(codecs=("one_bit_lamb",), stages=(0,)))


def test_points_are_all_combinations_that_differ(tmp_path: Path) -> None:
    plan = Plan(
        ranks=(1, 2, 4),
        stages=(0, 3),
        modes=("weak", "strong"),
        codecs=("none", "int8", "OneBitAdam"),
    )
    points = points_of(run_of(tmp_path), plan)
    assert len(points) == len(set(points))
    one = [p for p in points if p.ranks == 1]
    assert {(p.zero_stage, p.codec) for p in one} == {(0, "none"), (0, "one_bit_adam"), (3, "none")}
    assert {(p.mode, p.micro_batch) for p in one} == {("both", 8)}
    four = [p for p in points if p.ranks == 4]
    assert {(p.mode, p.micro_batch) for p in four} == {("weak", 8), ("strong", 2)}
    assert {p.zero_stage for p in four if p.codec == "one_bit_adam"} == {0}
    assert len(four) == 2 * (3 + 2)


def test_under_a_launcher_the_ranks_are_those_that_there_are(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert {p.ranks for p in points_of(run, Plan(), launched=16)} == {16}
    with pytest.raises(ConfigError, match=r"(?s)started 16.*--merge.*--mbit under a launcher"):
        points_of(run, Plan(ranks=(1, 2), mbit=(100.0,)), launched=16)


def test_the_config_of_a_point_is_the_run_but_for_what_the_point_says(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    config = load_config(config_of(run, Point("weak", 2, 3, "int8", 4, None)))
    assert config.zero_stage == 3
    assert config.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert config.deepspeed["train_micro_batch_size_per_gpu"] == 4
    assert config.dat.compression.name == "int8"
    assert config.dat.attack == run.dat.attack
    frozen = load_config(config_of(run, Point("weak", 2, 0, "one_bit_adam", 8, None)))
    assert frozen.deepspeed["optimizer"]["type"] == "OneBitAdam"
    assert frozen.dat.compression.name == "none"
    assert run == run_of(tmp_path), "the run is left alone"


def test_speedup_and_efficiency_are_those_of_images_per_second() -> None:
    points = [
        point(1, 0.4),
        point(4, 0.8),
        point(4, 0.5, codec="int8"),
        point(4, 0.4, mode="strong", micro_batch=2),
        point(2, 0.4, zero_stage=3),
        point(4, 0.4, zero_stage=3),
    ]
    one, weak, int8, strong, base, without_one = rows_of(record(points))
    assert (one["speedup"], one["efficiency"], one["ms_communication"]) == (1, 1, 0)
    assert (weak["speedup"], weak["efficiency"]) == pytest.approx((2, 0.5))
    assert int8["speedup"] == pytest.approx(3.2), "over the rank without a codec"
    assert (strong["speedup"], strong["efficiency"]) == pytest.approx((1, 0.25))
    assert (base["speedup"], base["efficiency"]) == (1, 1), "the fewest ranks that there are"
    assert without_one["efficiency"] == pytest.approx(1)
    # Forwards on 4 ranks at once take 3 times as long: 3 * 400 ms explain more than the step.
    assert weak["ms_communication"] == 0
    assert rows_of(record([point(1, 0.1), point(4, 0.8)]))[1]["ms_communication"] == (
        pytest.approx(500)
    )
    assert base["ms_communication"] is None


def test_the_table_tells_of_shared_cores_and_fits_the_links() -> None:
    table = describe(record([point(1, 0.4), point(4, 0.8)]))
    assert "More ranks than 2 cores share them" in table
    assert "| weak | 4 | 8 | 0 | none | 100 | 800.0 | 40.00 | 2.00 | 50 |" in table
    assert "| 2 | 100 | 100 | 100 | 0 |" in table
    assert "share them" not in describe(record([point(1, 0.4), point(4, 0.8)], cores=4))


def test_drift_is_the_furthest_from_one_that_is_seen() -> None:
    points = [point(1, 0.4), point(1, 0.5, zero_stage=3), point(4, 0.8)]
    assert drift_of(points, [0.2] * 5) == pytest.approx(0.5)
    assert drift_of(points, [0.44] * 5) == pytest.approx(1.1)
    slower = point(4, 0.8, seconds_alone=[0.03, 0.04, 0.05, 0.06, 0.07])
    assert drift_of([*points[:2], slower], [0.44] * 5) == pytest.approx(3)
    assert drift_of([*points[:2], {**slower, "micro_batch": 9}], [0.44] * 5) == pytest.approx(1.1)


def test_points_of_a_slow_moment_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {(1, 0): [0.01], (2, 0): [0.013, 0.0131, 0.01], (2, 3): [0.0119]}
    measured: list[tuple[int, int]] = []

    def run_ranks(_module: str, files: list[str], *, ranks: int, mbit: float | None) -> None:
        found = []
        for planned in json.loads(Path(files[0]).read_text())["points"]:
            kind = planned["ranks"], planned["zero_stage"]
            measured.append(kind)
            forward = alone[kind].pop(0) if len(alone[kind]) > 1 else alone[kind][0]
            found.append({**point(*kind[:1], 0.4), **planned, "seconds_alone": [forward] * 5})
        result = {"points": found, "links": [], "num_parameters": 10}
        Path(files[1]).write_text(json.dumps(result))

    monkeypatch.delenv("RANK", raising=False)  # of a run in this process
    monkeypatch.setattr("dat_ds.bench.scaling.measure.run_ranks", run_ranks)
    plan = Plan(ranks=(1, 2), stages=(0, 3), codecs=("none",))
    alone[1, 3] = [0.01]
    bench_scaling(run_of(tmp_path), plan, output=str(tmp_path / "found.json"))
    assert measured == [(1, 0), (1, 3), (2, 0), (2, 3), (2, 0), (2, 0), (1, 0)]
    values = read_scaling([str(tmp_path / "found.json")])
    assert values["clock_drift"] == pytest.approx(1.19)
    assert [p["ranks"] for p in values["points"]] == [1, 1, 2, 2]


def test_files_of_one_run_make_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "1.json", record([point(1, 0.4)]))
    four = write(tmp_path / "4.json", record([point(4, 0.8)]))
    files = [str(tmp_path / name) for name in ("all.json", "all.csv", "all.png")]
    options = ["--output", files[0], "--csv", files[1], "--plot", files[2]]
    assert main(["bench", "scaling", "--merge", one, four, *options]) == 0
    assert "| 2.00 | 50 |" in capsys.readouterr().out
    with open(files[1], newline="", encoding="utf-8") as file:
        assert [float(row["speedup"]) for row in csv.DictReader(file)] == pytest.approx([1, 2])
    assert read_scaling([files[0]])["points"] == [point(1, 0.4), point(4, 0.8)]
    assert Path(files[2]).read_bytes().startswith(b"\x89PNG")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "1.json", record([point(1, 0.4)]))
    with pytest.raises(ConfigError, match=r"both hold .*'ranks': 1"):
        read_scaling([one, one])
    config = {"dat": {"model": {"name": "cnn"}, "attack": {"name": "pgd", "steps": 2}}}
    with pytest.raises(ConfigError, match=r"differ in dat\.model"):
        read_scaling([one, write(tmp_path / "2.json", record([point(2, 0.4)], config=config))])
    with pytest.raises(ConfigError, match="is not a record of 'bench scaling'"):
        read_scaling([write(tmp_path / "3.json", {"codecs": {}})])
    with pytest.raises(ConfigError, match=r"Cannot read.*dat-ds bench scaling"):
        read_scaling([str(tmp_path / "none.json")])
    broken = record([point(2, 0.4)])
    del broken["points"][0]["seconds"], broken["links"]
    with pytest.raises(ConfigError, match=r"lacks links, points\.seconds: measure it again"):
        read_scaling([write(tmp_path / "4.json", broken)])
    with pytest.raises(ConfigError, match=r"changed by a factor 1\.50"):
        read_scaling([write(tmp_path / "5.json", record([point(1, 0.4)], clock_drift=1.5))])


def test_a_run_or_files_have_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling"]) == 2
    assert "Name a run: --deepspeed_config" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_on_loopback_are_counted_and_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.bench.timing.MAX_DRIFT", 100.0)  # a busy machine may drift
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    output = tmp_path / "scaling.json"
    command = ["bench", "scaling", "--deepspeed_config", str(config), "--ranks", "1", "2"]
    assert main([*command, "--stages", "0", "3", "--output", str(output)]) == 0
    assert "| weak | 2 | 8 | 0 | one_bit_adam | - |" in capsys.readouterr().out
    values = read_scaling([str(output)])
    numel = values["num_parameters"]
    sent = {(p["ranks"], p["zero_stage"], p["codec"]): p["bytes_sent"] for p in values["points"]}
    assert sent[1, 0, "none"].get("gradients", 0) == 0
    assert sent[2, 0, "none"]["gradients"] == 4 * numel
    assert 2 * numel <= sent[2, 3, "none"]["gradients"] <= 2.1 * numel
    assert sent[2, 0, "one_bit_adam"]["momentum"] < 0.06 * 4 * numel, "its variance is frozen"
    assert all(len(p["seconds"]) >= 5 and min(p["seconds"]) > 0 for p in values["points"])
    for forwards in ("seconds_forward", "seconds_alone"):
        assert all(len(p[forwards]) == len(p["seconds"]) for p in values["points"])
    assert {timed["collective"] for timed in values["links"]} == {
        *("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
    }
    assert math.isfinite(values["clock_drift"])


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root and iproute2")
def test_fewer_bytes_take_less_time_on_slow_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.bench.timing.MAX_DRIFT", 100.0)
    dat = {**tiny_run.config(tmp_path / "run")["dat"]}
    dat["model"] = {**tiny_run.VIT, "embed_dim": 192}
    output = tmp_path / "scaling.json"
    plan = Plan(ranks=(2,), stages=(0,), codecs=("none", "int8"), mbit=(20.0,))
    table = bench_scaling(run_of(tmp_path, dat=dat), plan, output=str(output))
    plain, int8 = rows_of(json.loads(output.read_text()))
    assert plain["ms_per_step"] > 2 * int8["ms_per_step"]
    *_, links = table.splitlines()
    assert 10 < float(links.split("|")[3]) < 22
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"dat{os.getpid() % 100_000}" not in left


@pytest.mark.slow
def test_a_rank_that_fails_is_told_of(tmp_path: Path) -> None:
    dat = {**tiny_run.config(tmp_path / "run")["dat"]}
    dat["data"] = {"name": "npz", "path": str(tmp_path / "missing.npz")}
    with pytest.raises(ConfigError, match=r"Rank \d failed: .*missing\.npz"):
        bench_scaling(run_of(tmp_path, dat=dat), Plan(ranks=(1,), stages=(0,), codecs=("none",)))


@pytest.mark.slow
def test_under_a_launcher_rank_0_writes_what_can_be_merged(tmp_path: Path) -> None:
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    script = tmp_path / "command.py"
    script.write_text(
        "import dat_ds.bench.timing as timing\n"
        "from dat_ds.cli.main import run_script\n"
        "timing.MAX_DRIFT = 100.0\n"
        "run_script(['bench', 'scaling'])\n"
    )
    output = tmp_path / "2.json"
    options = ["--stages", "0", "--codecs", "none", "--mode", "weak", "strong"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    port = str(29900 + os.getpid() % 90)
    command = [*launcher, "--master_port", port, str(script), "--deepspeed_config", str(config)]
    done = subprocess.run(
        [*command, *options, "--output", str(output)],
        env={**os.environ, "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| mode | ranks |") == 1
    points = json.loads(output.read_text())["points"]
    assert [(p["mode"], p["ranks"], p["micro_batch"]) for p in points] == [
        ("weak", 2, 8),
        ("strong", 2, 4),
    ]
