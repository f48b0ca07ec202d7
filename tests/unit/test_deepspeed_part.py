"""DeepSpeed's own checks, before anything is built: one line for each problem, by dotted key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dat_ds
from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.engine.deepspeed_part import check_deepspeed
from dat_ds.errors import ConfigError, DataError, UserError
from tests.distributed import tiny
from tests.integration import tiny_run


def problems(**sections: Any) -> list[str]:
    """The lines of a refusal of the tiny run with other sections; none where it is valid."""
    config = {**tiny_run.config(Path("run")), **sections}
    try:
        check_deepspeed(load_config(config).deepspeed)
    except ConfigError as error:
        return str(error).removeprefix("DeepSpeed refuses its part of the config:\n").split("\n")
    return []


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"zero_optimization": {"stage": 2, "stag": 1}},
        "Unknown key in the run config: zero_optimization.stag (did you mean 'stage'?). Valid keys "
        "of 'zero_optimization': allgather_bucket_size, ",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin": True}}},
        "Unknown key in the run config: zero_optimization.offload_optimizer.pin. Valid keys of "
        "'zero_optimization.offload_optimizer': buffer_count, ",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        "zero_optimization.offload_optimizer.device='gpu' is not valid: Input should be 'none', "
        "'cpu' or 'nvme'.",
    ),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
        "zero_optimization.reduce_bucket_size=-1 is not valid: Input should be greater than 0.",
    ),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": True}},
        "zero_optimization.reduce_bucket_size=True is not valid: write a number.",
    ),
    (
        {"zero_optimization": {"stage": 1, "zenflow": {}}},
        "zero_optimization.zenflow={} needs zero_optimization.offload_optimizer.device='cpu', and",
    ),
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads=true needs zero_optimization.offload_optimizer.device=",
    ),
    (
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "super_offload": True},
            }
        },
        "zero_optimization.offload_optimizer.super_offload=true needs NVIDIA's GPUs, and there is",
    ),
    (
        {"prescale_gradients": True},
        "prescale_gradients=true goes with zero_optimization.stage=2 only where zero_optimization.",
    ),
    ({"bf16": {"enable": True}}, "Unknown key in the run config: bf16.enable (did you mean 'en"),
    (
        {
            "bf16": {"enabled": True, "bf16_optimizer_states": True},
            "zero_optimization": {"stage": 0},
        },
        "bf16.bf16_optimizer_states=True is not valid: ",
    ),
    ({"comms_logger": 3}, "comms_logger=3 must be an object."),
    ({"timers": 3}, "timers=3 is not valid: "),
    ({"gradient_clipping": -1}, "gradient_clipping=-1.0 is not valid: write a number of at least"),
    ({"prescale_gradients": "no"}, "prescale_gradients='no' must be true or false."),
    ({"communication_data_type": "int7"}, "communication_data_type='int7' is not valid: "),
    ({"data_types": {"grad_accum_dtype": "fp7"}}, "data_types.grad_accum_dtype='fp7' is not valid"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0 is not valid: write"),
    ({"gradient_accumulation_steps": 2**31}, "gradient_accumulation_steps=2147483648, or what "),
    ({"train_micro_batch_size_per_gpu": None}, "No batch size: write train_micro_batch_size_per_"),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": []}}},
        "optimizer.params.betas=[] is not valid: ",
    ),
    ({"optimizer": {"type": "MuAdam", "params": {}}}, "optimizer.type='MuAdam', but the package "),
    ({"optimizer": {"type": "Adagrad", "params": {"x": 1}}}, "optimizer.params.x is not a "),
    (
        {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["antigravity.X"]}},
        "torch_autocast.lower_precision_safe_modules[0]='antigravity.X' is not a class of ",
    ),
]


@pytest.mark.parametrize(("sections", "message"), MISTAKES)
def test_each_mistake_is_one_line_with_key_value_and_remedy(
    sections: dict[str, Any], message: str
) -> None:
    (line,) = problems(**sections)
    assert line.startswith(message)


def test_all_are_told_together() -> None:
    zero = {"stage": 2, "reduce_bucket_size": -1, "overlap_comm": "maybe"}
    lines = problems(zero_optimization=zero, comms_logger={"enabled": True, "verbos": True})
    assert [line.split("=")[0].split(" (")[0] for line in lines] == [
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.overlap_comm",
        "Unknown key in the run config: comms_logger.verbos",
    ]


@pytest.mark.parametrize("raised", [ValueError("no such kernel"), DataError("a file is bad")])
def test_what_only_the_start_shows_is_told_with_its_sections(
    monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fails(**arguments: Any) -> None:
        raise raised

    monkeypatch.setattr("dat_ds.engine.build.deepspeed.initialize", fails)
    with pytest.raises(UserError) as caught:
        dat_ds.initialize(model=tiny.cnn(), config=tiny.config(0))
    if isinstance(raised, DataError):
        assert caught.value is raised
    else:
        assert str(caught.value).startswith("DeepSpeed does not start with this model, on this ")
        assert "{'optimizer': {'type': 'SGD'" in str(caught.value)
        assert str(caught.value).endswith("ValueError: no such kernel.")


def test_batch_sizes_that_fit_other_numbers_of_ranks_are_left_to_the_run() -> None:
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}
    assert not problems(**sizes, gradient_accumulation_steps=2)


@pytest.mark.parametrize("command", ["config", "train"])
def test_config_refuses_what_training_refuses_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    values = tiny_run.config(tmp_path / "run")
    values["zero_optimization"]["stag"] = 1
    values["dat"]["data"] = {"name": "npz", "path": "/no/such.npz"}  # not reached
    path = tiny_run.write(tmp_path / "config.json", values)
    assert main([command, "--deepspeed_config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "zero_optimization.stag (did you mean 'stage'?)" in message
    assert "such.npz" not in message
    assert not (tmp_path / "run").exists()
