"""Predictions from records: a record that the model itself made is predicted exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dat_ds.bench.prediction.calibrate import calibrate, held_out, links_of, slowdown_of
from dat_ds.bench.prediction.cost_model import (
    COLLECTIVES,
    Cluster,
    Hardware,
    Link,
    Workload,
    collective_seconds,
    same_link,
    step_time,
)
from dat_ds.bench.prediction.predict import bench_predict
from dat_ds.bench.prediction.target import Target
from dat_ds.cli.main import main
from dat_ds.compression import CODECS
from dat_ds.errors import ConfigError

P, K, B = 3_000_000, 3, 16
MBIT = (100.0, 400.0)
SLOWDOWN = {1: 1.0, 2: 1.1, 4: 2.0}
COSTS = {name: {"encode_ns": 3.0 + i, "decode_ns": 4.0} for i, name in enumerate(CODECS)}
TRUTH = {"overhead": 1.1, "optimizer": 2e-9, "codec": 1.5e-9, "one_bit": 5e-9, "sharded": 0.02}


def hardware_of(ranks: int) -> Hardware:
    return Hardware(
        forward=1e-3,
        overhead=TRUTH["overhead"],
        optimizer=TRUTH["optimizer"],
        encode={name: TRUTH["codec"] * c["encode_ns"] for name, c in COSTS.items()},
        decode={name: TRUTH["codec"] * c["decode_ns"] for name, c in COSTS.items()},
        one_bit=TRUTH["one_bit"],
        sharded=TRUTH["sharded"],
        slowdown=SLOWDOWN[ranks],
    )


def link_of(mbit: float) -> Link:
    return Link.of(mbit=mbit, microseconds=100)


def record(ranks: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    """What a machine that follows the model would measure."""
    points, links = [], []
    for count in ranks:
        for mbit in MBIT if count > 1 else (None,):
            link = Link(0, 0) if mbit is None else link_of(mbit)
            for collective in COLLECTIVES if count > 1 else ():
                for size in (2**12, 2**16, 2**20):
                    seconds = collective_seconds(collective, size, count, link)
                    origin = {"ranks": count, "mbit": mbit, "collective": collective}
                    links.append({**origin, "bytes": size, "seconds": [seconds] * 5})
            for stage in (0, 2, 3):
                for codec in ("none", "int8", "one_bit_adam"):
                    if (codec == "one_bit_adam" and stage) or (codec == "int8" and count == 1):
                        continue
                    sides: Any = "single" if stage == 3 else "double"
                    work = Workload(P, K, B, zero_stage=stage, codec=codec, sides=sides)
                    cluster = Cluster(count, 1, same_link(link), same_link(link))
                    seconds = step_time(work, hardware_of(count), cluster).total
                    points.append(
                        {
                            "mode": "weak",
                            "ranks": count,
                            "zero_stage": stage,
                            "codec": codec,
                            "micro_batch": B,
                            "mbit": mbit,
                            "attack_steps": K,
                            "gradient_accumulation_steps": 1,
                            "seconds": [seconds] * 5,
                            "seconds_forward": [SLOWDOWN[count] * B * 1e-3] * 5,
                            "seconds_attack": 0.1,
                            "seconds_update": 0.1,
                            "bytes_sent": {},
                            "collectives": {},
                        }
                    )
    return {
        "bench": "scaling",
        "points": points,
        "links": links,
        "num_parameters": P,
        "clock_drift": 1.0,
        "cores": 2,
        "launched": False,
        "config": {"dat": {"model": {"name": "vit"}, "attack": {"name": "pgd"}}},
    }


def write(path: Path, values: Any) -> str:
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def test_links_and_slowdowns_are_read_from_the_record() -> None:
    values = record()
    found = links_of(values, 4, 400.0)
    assert found["all_to_all"].mbit == pytest.approx(400)
    assert found["all_reduce"].alpha == pytest.approx(1e-4)
    points = values["points"]
    one, four = (next(p for p in points if p["ranks"] == n) for n in (1, 4))
    assert slowdown_of(one, points) == 1
    assert slowdown_of(four, points) == pytest.approx(2)
    half = {**four, "micro_batch": B // 2, "seconds_forward": [0.001] * 5}
    assert slowdown_of(half, points) == pytest.approx(2), "as others of four ranks"
    assert slowdown_of(four, [four]) == 1, "nothing is known of one rank"


def test_coefficients_are_recovered() -> None:
    values = record()
    found = calibrate(values["points"], values, COSTS)
    expected = {**TRUTH, "codec": TRUTH["codec"]}
    assert found == pytest.approx(expected, rel=1e-6)


def test_held_out_points_are_predicted_and_their_own_steps_play_no_part() -> None:
    values = record()
    rows = held_out(values, COSTS)
    assert len(rows) == len(values["points"])
    assert max(abs(row["error"]) for row in rows) < 1e-6
    for point in values["points"]:
        if point["ranks"] == 4:
            point["seconds"] = [2 * s for s in point["seconds"]]
    errors = [row["error"] for row in held_out(values, COSTS) if row["ranks"] == 4]
    assert errors == pytest.approx([-0.5] * len(errors)), "a prediction that knew would be closer"


def test_the_report_shows_the_check_and_calls_the_rest_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = write(tmp_path / "s.json", record())
    compression = write(tmp_path / "c.json", {"codecs": COSTS})
    attack = write(tmp_path / "a.json", {"over_floor": 1.25})
    output, plot = tmp_path / "p.json", tmp_path / "p.png"
    command = ["bench", "predict", "--scaling", scaling, "--compression", compression]
    command += ["--attack", attack, "--output", str(output), "--plot", str(plot)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "Median error: 0.0 %" in said
    assert said.count("Predicted, not measured") == 3
    assert "| none | " in said
    assert "| 4096 | 3 | int8 |" in said
    numbers = json.loads(output.read_text())
    assert numbers["overhead"] == 1.25
    shapes = {(r["codec"], r["machines"], r["gpus"]): r for r in numbers["shapes"]}
    assert shapes["none", 1, 6]["speedup"] == 1
    assert shapes["none", 6, 1]["speedup"] < 1, "the same GPUs behind slow links"
    assert shapes["one_bit_adam", 6, 6]["speedup"] > shapes["none", 6, 6]["speedup"]
    # F for 85 images on each of 6 GPUs, 11 forwards and 25.6M entries to update: nothing else.
    target = Target()
    alone = step_time(target.work("none"), target.hardware(1.25), target.cluster(1, 1)).total
    assert shapes["none", 1, 6]["seconds"] == pytest.approx(alone, rel=0.03)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_codec_newer_than_the_record_is_missed_only_where_it_is_asked_for(
    tmp_path: Path,
) -> None:
    scaling = write(tmp_path / "s.json", record())
    compression = write(tmp_path / "c.json", {"codecs": {**COSTS, "of a later release": {}}})
    output = tmp_path / "p.json"
    bench_predict([scaling], Target(), compression=compression, output=str(output))
    before = json.loads(output.read_text())
    older = {name: COSTS[name] for name in ("int8", "sign")}
    compression = write(tmp_path / "c.json", {"codecs": older})
    bench_predict([scaling], Target(), compression=compression, output=str(output))
    numbers = json.loads(output.read_text())
    assert numbers["held_out"] == before["held_out"]
    assert numbers["crossings"] == before["crossings"]
    assert list(dict.fromkeys(row["codec"] for row in numbers["shapes"])) == [
        "none",
        "int8",
        "sign",
        "one_bit_adam",
    ]
    with pytest.raises(ConfigError, match=r"no codec 'natural', which --codecs natural needs"):
        bench_predict([scaling], Target(), compression=compression, codecs=("none", "natural"))


def test_a_codec_that_the_scaling_record_was_measured_with_has_to_have_its_costs(
    tmp_path: Path,
) -> None:
    scaling = write(tmp_path / "s.json", record())
    compression = write(tmp_path / "c.json", {"codecs": {"sign": COSTS["sign"]}})
    with pytest.raises(ConfigError, match="bench compression") as caught:
        bench_predict([scaling], Target(), compression=compression, codecs=("none",))
    said = str(caught.value)
    assert "no codec 'int8', which the scaling record's int8 needs" in said
    assert "--codecs" not in said
    compression = write(tmp_path / "c.json", {"codecs": {"int8": COSTS["int8"]}})
    with pytest.raises(ConfigError, match="no codec 'sign', which --codecs one_bit_adam needs"):
        bench_predict([scaling], Target(), compression=compression)


def test_flags_say_what_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = write(tmp_path / "s.json", record())
    output = tmp_path / "p.json"
    command = ["bench", "predict", "--scaling", scaling, "--output", str(output)]
    command += ["--ranks", "16", "--gpus", "8", "--stages", "0", "--codecs", "none"]
    command += ["--num_parameters", "1000000", "--attack_steps", "1", "--micro_batch", "1"]
    command += ["--forward_ms", "1", "--mbit", "1000", "--latency_us", "1"]
    assert main(command) == 0
    numbers = json.loads(output.read_text())
    (row,) = numbers["steps"]
    # Two machines all-reduce 4 MB at 1 Gbit/s: 32 ms, beside 5 forwards.
    assert row["parts"]["gradients"] == pytest.approx(0.032, rel=0.05)
    computed = row["parts"]["attack"] + row["parts"]["update"]
    assert computed == pytest.approx(numbers["overhead"] * 0.005)
    assert numbers["crossings"][0]["ranks"] == 16, "eight are one machine, with no link between"


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {k: v for k, v in values.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("bench"), "is not a record of 'bench scaling'"),
        (without("links"), "lacks links"),
        (lambda v: {**v, "links": []}, "holds no timed all_reduce of 2 ranks at 100 Mbit/s"),
        (lambda v: {**v, "points": [{"ranks": 1}]}, r"lacks points\.mode, .*points\.attack_steps"),
        (lambda v: {**v, **record((4,))}, r"Too few points: 14, on 4 rank\(s\)"),
        (lambda v: {**v, "points": v["points"][:8]}, r"--ranks 1 2 4 --stages 0 2 3"),
    ],
)
def test_a_record_that_does_not_do_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    path = write(tmp_path / "s.json", change(record()))
    with pytest.raises(ConfigError, match=message) as caught:
        bench_predict([path], Target())
    assert "dat-ds bench scaling" in str(caught.value), "it says what to run"


def test_other_files_and_flags_that_do_not_do_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", record())
    wrong = write(tmp_path / "w.json", {"codecs": {"int8": {"encode_ns": 1.0}}})
    with pytest.raises(ConfigError, match=r"lacks codecs\.int8\.decode_ns.*bench compression"):
        bench_predict([path], Target(), compression=wrong)
    with pytest.raises(ConfigError, match=r"has no 'over_floor'.*bench attack"):
        bench_predict([path], Target(), attack=wrong)
    with pytest.raises(ConfigError, match=r"Cannot read.*bench attack"):
        bench_predict([path], Target(), attack=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError) as caught:
        bench_predict(
            [path],
            Target(mbit=0, attack_steps=-1),
            ranks=(12,),
            gpus=8,
            stages=(4,),
            codecs=("int9",),
        )
    for said in ("--mbit 0", "--attack_steps -1", "--ranks 12", "--stages 4", "--codecs int9"):
        assert said in str(caught.value)
