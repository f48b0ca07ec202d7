"""Claims about sections of DeepSpeed's part: monitors, what it logs, what it would pass over."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dat_ds.cli.main import main
from dat_ds.config import load_config
from dat_ds.config.deepspeed.keys import OPTIMIZER_KEYS
from dat_ds.config.deepspeed.sections import MONITORS, SECTIONS, Comet
from dat_ds.training.twin import natural_twin_of
from tests.unit.config_helpers import ADAMW, deepspeed_config_module, problems
from tests.unit.test_config_deepspeed import Recorder

pytestmark = pytest.mark.fast


def notes(**keys: Any) -> tuple[str, ...]:
    return load_config({**ADAMW, **keys}).notes


# ---- the tables agree with the installed DeepSpeed


@pytest.mark.parametrize("key", MONITORS)
def test_the_keys_and_defaults_of_a_monitor_are_deepspeeds(key):
    pytest.importorskip("deepspeed")
    from deepspeed.monitor.config import get_monitor_config

    assert MONITORS[key]().to_dict() == getattr(get_monitor_config({}), key).model_dump()


@pytest.mark.parametrize("key", sorted(SECTIONS.keys() - MONITORS.keys()))
def test_the_keys_of_a_section_are_those_that_deepspeed_reads(key, monkeypatch):
    module = deepspeed_config_module()
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 1)
    given = Recorder()
    module.DeepSpeedConfig({"train_batch_size": 1, key: given})
    assert given.asked == SECTIONS[key].known_keys().keys()


def test_the_keys_of_the_optimizers_section_are_those_that_deepspeed_reads(monkeypatch):
    module = deepspeed_config_module()
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 1)
    given = Recorder({"type": "AdamW", "params": {}})
    module.DeepSpeedConfig({"train_batch_size": 1, "optimizer": given})
    assert given.asked == set(OPTIMIZER_KEYS)


# ---- mistakes


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"csv_monitor": {"enabled": True, "output_pth": "x"}},
            "Unknown key in the run config: csv_monitor.output_pth (did you mean 'output_path'?). "
            "Valid keys of 'csv_monitor': enabled, output_path, job_name.",
        ),
        ({"tensorboard": {"enabled": "yes"}}, "tensorboard.enabled='yes' must be true or false."),
        ({"wandb": {"project": 3}}, "wandb.project=3 must be a string."),
        (
            {"comet": True},
            "comet=True must be an object with the keys enabled, samples_log_interval, project, "
            "workspace, api_key, experiment_name, experiment_key, online, mode.",
        ),
        (
            {"comet": {"samples_log_interval": 0}},
            "comet.samples_log_interval=0 is not valid: write a number above 0.",
        ),
        (
            {"flops_profiler": {"profile_step": "5"}},
            "flops_profiler.profile_step='5' must be an integer.",
        ),
        (
            {"torch_autocast": {"enable": True}},
            "Unknown key in the run config: torch_autocast.enable (did you mean 'enabled'?). "
            "Valid keys of 'torch_autocast': enabled, dtype, lower_precision_safe_modules.",
        ),
        (
            {"data_types": {"bufer_dtype": "bf16"}},
            "Unknown key in the run config: data_types.bufer_dtype (did you mean 'buffer_dtype'?)."
            " Valid keys of 'data_types': grad_accum_dtype, param_dtype, buffer_dtype, "
            "keep_in_fp32_modules.",
        ),
        (
            {"optimizer": {"type": "AdamW", "lr": 0.1}},
            "Unknown key in the run config: optimizer.lr. Valid keys of 'optimizer': type, params, "
            "legacy_fusion; those of the optimizer itself stand in params.",
        ),
        (
            {"checkpoint": {"load_universal": True}},
            "checkpoint.load_universal=True is refused: checkpoints of dat_ds are read as they "
            "were written. Remove it.",
        ),
        (
            {"checkpoint": {"use_node_local_storage": True}},
            "checkpoint.use_node_local_storage=True is refused: a checkpoint lies in one folder "
            "that all machines share. Remove it.",
        ),
        (
            {"checkpoint": {"writer": {"type": "fast"}}},
            "checkpoint.writer={'type': 'fast'} is refused: a checkpoint is published when it is "
            "complete, and this one writes on. Remove it.",
        ),
        (
            {"log_level": "warn"},
            "log_level='warn' is not valid (did you mean 'warning'?). Write one of 'debug', "
            "'info', 'warning', 'error', 'critical'.",
        ),
        (
            {"steps_per_print": 0},
            "steps_per_print=0 is not valid: write an integer of at least 1.",
        ),
        ({"wall_clock_breakdown": "true"}, "wall_clock_breakdown='true' must be true or false."),
        (
            {"timers": {"throughput": {"enabled": True}}},
            "timers.throughput.enabled=true is refused: DeepSpeed's throughput leaves out the "
            "attack, and waits for the device in every pass of it. Remove it: the metrics hold "
            "seconds_attack and seconds_update.",
        ),
        (
            {"autotuning": {"enabled": True}},
            "autotuning.enabled=true is refused: it ends the process in the middle of a run, and "
            "times no attack. Remove it; dat-ds bench attack times a step.",
        ),
        (
            {"compile": {"deepcompile": True}},
            "compile.deepcompile=true is refused: the attack's passes would reduce and gather as "
            "the update's do. Remove it, or write dat.engine.compile='attack' or 'all'.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_mistake_is_one_message(section, message):
    assert problems({**ADAMW, **section}) == [message]


@pytest.mark.parametrize(
    ("key", "pip"),
    [("wandb", "wandb"), ("comet", "'comet_ml>=3.41.0'"), ("tensorboard", "tensorboard")],
)
def test_a_monitor_whose_package_is_missing_says_what_to_install(key, pip, monkeypatch):
    module = MONITORS[key].package[1]
    monkeypatch.setitem(sys.modules, module, None)
    message = (
        f"{key}.enabled=true, but the package {module!r} is not installed: "
        f"pip install {pip}, or write {key}.enabled=false."
    )
    assert problems({**ADAMW, key: {"enabled": True}}) == [message]
    load_config({**ADAMW, key: {"enabled": False}})
    load_config({**ADAMW, key: {"enabled": True}}, here=False)


def test_a_folder_of_a_packages_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # where wandb writes its runs
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (message,) = problems({**ADAMW, "wandb": {"enabled": True}})
    assert "'wandb' is not installed" in message


@pytest.mark.parametrize(
    ("key", "name"),
    [("csv_monitor", "output_path"), ("tensorboard", "output_path"), ("flops_profiler", "file")],
)
def test_a_place_that_cannot_be_written_to_is_named(key, name, tmp_path):
    (tmp_path / "file").write_text("")
    place, name = str(tmp_path / "file" / "deeper"), name.replace("file", "output_file")
    if key == "flops_profiler":
        place += "/profile.txt"
    assert problems({**ADAMW, key: {"enabled": True, name: place}}) == [
        f"{key}.{name}={place!r} cannot be written to (Not a directory): name another place, or "
        f"write {key}.enabled=false."
    ]


def test_a_place_that_has_to_be_made_is_fine_and_is_not_made(tmp_path):
    load_config(
        {**ADAMW, "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "a" / "b")}}
    )
    assert list(tmp_path.iterdir()) == []


def test_monitors_are_reported_with_all_other_problems_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = {
        **ADAMW,
        "gradiant_clipping": 1,
        "wandb": {"enabled": True},
        "csv_monitor": {"enabled": True, "output_path": "/proc/x"},
        "dat": {"threat_model": {"eps": 8}},
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config))
    for command in ("train", "config"):
        assert main([command, "--deepspeed_config", str(path)]) == 2
        message = capsys.readouterr().err
        parts = ("gradiant_clipping", "wandb.enabled", "csv_monitor.output_path='/proc/x'", "dat.t")
        assert all(part in message for part in parts)
        assert "Traceback" not in message


# ---- what is asked for and not seen


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"steps_per_print": 10}, "steps_per_print: DeepSpeed logs this at level info"),
        ({"steps_per_print": 10, "dump_state": True}, "steps_per_print and dump_state: DeepSpeed"),
        ({"comms_logger": {"enabled": True}}, "comms_logger.enabled=true: DeepSpeed waits"),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            "activation_checkpointing is read by deepspeed.checkpointing.configure alone",
        ),
    ],
)
def test_what_deepspeed_does_not_show_by_itself_is_noted(keys, start):
    (note,) = notes(**keys)
    assert note.startswith(start)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"steps_per_print": 10, "log_level": "info"},
        {"steps_per_print": None, "dump_state": False},
        {"comms_logger": {"enabled": False, "verbose": True}},
        {"wall_clock_breakdown": True, "memory_breakdown": True},
        {"timers": {"throughput": {"enabled": False}}},
        {"flops_profiler": {"enabled": True}},
    ],
)
def test_nothing_is_noted_where_nothing_is_hidden(keys):
    assert notes(**keys) == ()


# ---- the natural twin


def test_the_natural_twin_writes_into_folders_of_its_own(monkeypatch):
    monkeypatch.setattr("dat_ds.config.deepspeed.sections.is_installed", lambda module: True)
    config = {
        "csv_monitor": {"enabled": True, "job_name": "job"},
        "tensorboard": {"enabled": False},
        "wandb": {"enabled": True},
    }
    run = load_config({**ADAMW, **config})
    twin = natural_twin_of(run).deepspeed
    assert twin["csv_monitor"] == {"enabled": True, "job_name": "job/natural_twin"}
    assert twin["tensorboard"] == {"enabled": False}
    assert "wandb" not in twin
    assert run.deepspeed["csv_monitor"]["job_name"] == "job"


def test_comets_interval_is_in_samples():
    assert Comet().samples_log_interval == 100
