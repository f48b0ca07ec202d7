"""The tables of step time and of compression."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from dat_ds.bench.compression import codec_properties
from dat_ds.bench.timing import check_alone, check_drift, clock_drift, peak_bytes
from dat_ds.cli.main import main
from dat_ds.compression import CODECS, build_codec
from dat_ds.errors import ConfigError
from tests.integration import tiny_run


def test_the_table_compares_the_step_with_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.bench.timing.MAX_DRIFT", 100.0)  # a busy machine may drift
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    output = tmp_path / "numbers.json"
    command = ["bench", "attack", "--deepspeed_config", str(config), "--repetitions", "5"]
    assert main([*command, "--output", str(output)]) == 0
    table = capsys.readouterr().out
    for part in ("engine step", "input gradients", "training step", "(2K+3) forwards", "data"):
        assert part in table
    numbers = json.loads(output.read_text())
    assert all(len(values) == 5 for values in numbers["seconds"].values())
    assert numbers["over_parts"] > 0.5
    shares = numbers["shares"]
    assert shares["attack"] + shares["update"] == pytest.approx(1)
    assert shares["communication"] == 0
    peaks = numbers["peak_bytes"]
    assert 0 < peaks["forward"] < peaks["training step"]
    others = {"backward through DDP", "torchattacks + DDP"}
    assert set(numbers["over_others"]) == others & set(numbers["median_seconds"])


def test_micro_batches_of_a_step_count_in_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.bench.timing.MAX_DRIFT", 100.0)  # a busy machine may drift
    values = tiny_run.config(tmp_path / "run", engine={"attack_micro_batches": 2})
    values |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    config, output = tiny_run.write(tmp_path / "config.json", values), tmp_path / "step.json"
    command = ["bench", "attack", "--deepspeed_config", str(config), "--repetitions", "5"]
    assert main([*command, "--output", str(output)]) == 0
    assert "4 x 4 (2 attacked as one) images each" in capsys.readouterr().out
    numbers = json.loads(output.read_text())
    assert numbers["images"] == 16
    assert 0.3 < numbers["over_parts"] < 3
    assert 0.3 < numbers["over_floor"] < 3


def test_peak_memory_is_what_a_call_holds_at_most() -> None:
    def call() -> None:
        first = torch.ones(1000)
        second = torch.ones(2000)
        del first
        torch.ones(500)
        del second

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(4 * 3000, abs=256)


def test_a_machine_that_changes_its_speed_is_refused() -> None:
    check_drift(clock_drift([1.0, 1.0, 1.1, 1.1]))
    with pytest.raises(ConfigError, match=r"speed changed by a factor 1\.50"):
        check_drift(clock_drift([1.0, 1.0, 1.5, 1.5]))


def test_a_shared_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        uuid = "abc"

    def answer(*_arguments: object, **_options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, stdout=f"{os.getpid()}\n{others}", stderr="")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: Found)
    monkeypatch.setattr(subprocess, "run", answer)
    others = ""
    check_alone(torch.device("cuda"))
    others = "123456789\n"
    with pytest.raises(ConfigError, match=r"shared with the processes 123456789"):
        check_alone(torch.device("cuda"))


def test_decoders_are_compared_and_waiting_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.bench.timing.MAX_DRIFT", 100.0)  # a busy machine may drift
    monkeypatch.setattr("dat_ds.bench.data._PICTURES", 2)
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    output = tmp_path / "numbers.json"
    command = ["bench", "data", "--deepspeed_config", str(config), "--repetitions", "5"]
    assert main([*command, "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert "| torchvision.io.decode_jpeg | " in table
    assert "of the time is waiting, with 0 worker(s)." in table
    numbers = json.loads(output.read_text())
    assert set(numbers["over_torchvision"]) == {"224x224", "375x500"}
    assert all(ratio > 0 for ratio in numbers["over_torchvision"].values())
    assert 0 < numbers["waiting_share"] < 1
    assert all(len(values) == 5 for values in numbers["seconds"].values())


def test_few_repetitions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    command = ["bench", "attack", "--deepspeed_config", str(config), "--repetitions", "4"]
    assert main(command) == 2
    assert "at least 5" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["attack", "compression", "data", "memory", "trust-ratios"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", table, "--preset", "zero0", "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path} is a folder: name a file." in capsys.readouterr().err


@pytest.mark.parametrize("name", CODECS)
def test_measured_properties_of_a_codec_are_those_it_states(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dat_ds.bench.compression._SAMPLE", 2**16)
    codec = build_codec(name)
    properties = codec_properties(codec)
    assert properties["bits"] == 8 * codec.bytes_of(2**16) / 2**16
    assert 0 < properties["error_gaussian"] <= properties["bound"]
    assert 0 < properties["error_student"] <= properties["bound"]
    if codec.unbiased:
        assert abs(properties["bias_z"]) < 4
        assert abs(properties["bias"]) < 1e-3
    else:
        assert properties["bias"] < -0.1


@pytest.mark.slow
def test_the_compression_tables_hold_every_codec_and_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.write(tmp_path / "c.json", tiny_run.config(tmp_path / "run"))
    output = tmp_path / "numbers.json"
    command = ["bench", "compression", "--deepspeed_config", str(config), "--repetitions", "5"]
    assert main([*command, "--output", str(output)]) == 0
    table = capsys.readouterr().out
    numbers = json.loads(output.read_text())
    for stage, by_codec in numbers["bytes_sent"].items():
        plain = by_codec["none"]["gradients"]
        assert list(by_codec) == ["none", *CODECS]
        for name, kinds in by_codec.items():
            assert f"| {stage} | {name} | {kinds['gradients']} |" in table
            assert kinds["gradients"] <= 0.3 * plain or name == "none"
    assert all(codec["share_of_update"] > 0 for codec in numbers["codecs"].values())


def test_the_trust_ratio_table_has_a_row_for_every_way_to_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_run.config(tmp_path / "run")
    values["dat"]["optimizer"] = {"name": "lars", "preset": "paper"}
    del values["optimizer"]
    config = tiny_run.write(tmp_path / "c.json", values)
    output = tmp_path / "numbers.json"
    command = ["bench", "trust-ratios", "--deepspeed_config", str(config)]
    assert main([*command, "--output", str(output)]) == 0
    assert "| 3, sub-groups, offload |" in capsys.readouterr().out
    rows = json.loads(output.read_text())["shardings"]
    assert len(rows) == 12
    for row in rows.values():
        assert row["ratios"] <= 1e-6
        assert row["weights"] <= 1e-4


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "adamw"}, "write dat.optimizer.name, one of lamb, lars"),
        ({"name": "lamb"}, "remove bf16, fp16 or torch_autocast"),
    ],
)
def test_trust_ratios_need_a_layer_wise_optimizer_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: dict[str, str], message: str
) -> None:
    values = tiny_run.config(tmp_path / "run")
    values["dat"]["optimizer"] = section
    values["bf16"] = {"enabled": section["name"] == "lamb"}
    del values["optimizer"]
    config = tiny_run.write(tmp_path / "c.json", values)
    assert main(["bench", "trust-ratios", "--deepspeed_config", str(config)]) == 2
    assert message in capsys.readouterr().err
