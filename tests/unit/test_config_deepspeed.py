"""Claims about DeepSpeed's keys in run configs: defaults, precision and batch sizes are its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dat_ds.config import load_config, precision_of, resolve_batch
from dat_ds.config.deepspeed.keys import FP16_DEFAULTS, SCALAR_DEFAULTS, TOP_LEVEL_KEYS
from dat_ds.errors import ConfigError
from tests.unit.config_helpers import ADAMW, deepspeed_config_module, problems

pytestmark = pytest.mark.fast

# ---- defaults


def test_deepspeeds_defaults_that_change_results_are_written_out():
    run = load_config({**ADAMW, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    assert SCALAR_DEFAULTS.items() <= run.deepspeed.items()
    assert run.deepspeed["fp16"] == {"enabled": True, **FP16_DEFAULTS}
    params = run.deepspeed["optimizer"]["params"]
    assert params == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert "zero_allow_untested_optimizer" not in run.deepspeed
    assert "dat" not in run.deepspeed


def test_what_the_user_writes_is_not_overwritten_by_a_default():
    config = {
        "optimizer": {"type": "Adam", "params": {"lr": 3.0, "weight_decay": 0.1}},
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 4,
        "fp16": {"enabled": True, "loss_scale": 128},
        "zero_optimization": {"stage": 3},
    }
    run = load_config(config)
    assert run.deepspeed["gradient_clipping"] == 0.0
    assert run.deepspeed["gradient_accumulation_steps"] == 4
    assert run.deepspeed["fp16"]["loss_scale"] == 128
    assert run.deepspeed["optimizer"]["params"]["lr"] == 3.0
    assert run.deepspeed["optimizer"]["params"]["weight_decay"] == 0.1
    assert run.zero_stage == 3


# ---- precision


@pytest.mark.parametrize(
    ("section", "precision"),
    [
        ({}, "float32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": False}}, "float32"),
        ({"torch_autocast": {"enabled": True}}, "autocast"),
    ],
)
def test_the_precision_is_the_section_that_is_enabled(section, precision):
    config = {**ADAMW, "zero_optimization": {"stage": 1}, **section}
    assert precision_of(load_config(config).deepspeed) == precision


# ---- batch sizes


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, 2, (8, 1)),
        ({"train_batch_size": 32}, 2, (16, 1)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, 2, (4, 4)),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3}, 2, (8, 3)),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, 2, (4, 4)),
    ],
)
def test_batch_sizes_are_resolved_as_deepspeed_does(sizes, ranks, expected, monkeypatch):
    assert resolve_batch(load_config({**ADAMW, **sizes}).deepspeed, ranks) == expected
    config_module = deepspeed_config_module()
    monkeypatch.setattr(config_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(config_module.dist, "get_world_size", lambda: ranks)
    theirs = config_module.DeepSpeedConfig(dict(sizes))
    assert (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "No batch size: write train_micro_batch_size_per_gpu, such as 64."),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
            "train_batch_size=10 is not a multiple of train_micro_batch_size_per_gpu=4: write 8 or "
            "12, or leave train_batch_size out.",
        ),
        (
            {"train_batch_size": 3, "gradient_accumulation_steps": 4},
            "train_batch_size=3 is not a multiple of gradient_accumulation_steps=4: write 4, or "
            "leave train_batch_size out.",
        ),
        (
            {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 4},
            "train_batch_size=12 is not train_micro_batch_size_per_gpu=4 x "
            "gradient_accumulation_steps=1 x 2 ranks = 8: change one of them, or leave one out.",
        ),
        (
            {"train_batch_size": 1},
            "train_batch_size=1 is not train_micro_batch_size_per_gpu=1 x "
            "gradient_accumulation_steps=1 x 2 ranks = 2: change one of them, or leave one out.",
        ),
        (
            {"train_batch_size": 0},
            "train_batch_size=0 is not valid: write an integer of at least 1.",
        ),
        (
            {"train_micro_batch_size_per_gpu": True},
            "train_micro_batch_size_per_gpu=True is not valid: write an integer of at least 1.",
        ),
        (
            {"train_batch_size": 4, "gradient_accumulation_steps": 2.0},
            "gradient_accumulation_steps=2.0 is not valid: write an integer of at least 1.",
        ),
    ],
)
def test_batch_sizes_that_do_not_agree_are_refused(sizes, message):
    with pytest.raises(ConfigError) as caught:
        resolve_batch(load_config({**ADAMW, **sizes}).deepspeed, 2)
    assert str(caught.value) == message


# ---- the tables agree with the installed DeepSpeed


class Recorder(dict):
    """A config that notes every key it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # ``key in config.keys()`` is noted too

    def __copy__(self) -> Recorder:
        twin = Recorder(self)
        twin.asked = self.asked
        return twin


def test_our_top_level_keys_are_exactly_those_that_deepspeed_reads(monkeypatch):
    module = deepspeed_config_module()
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 1)
    config = Recorder(train_batch_size=1)
    module.DeepSpeedConfig(config)
    removed = set(module._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert removed < config.asked, "the recorder sees what is read"
    assert config.asked - removed == TOP_LEVEL_KEYS


def test_every_key_that_deepspeed_removed_is_refused_as_unknown():
    removed = deepspeed_config_module()._REMOVED_TOP_LEVEL_CONFIG_KEYS
    assert removed
    assert not removed.keys() & TOP_LEVEL_KEYS
    found = problems({**ADAMW, **{key: {} for key in removed}})
    assert len(found) == len(removed)
    assert all(problem.startswith("Unknown top-level key ") for problem in found)


def test_our_scalar_and_fp16_defaults_are_deepspeeds():
    config = deepspeed_config_module().DeepSpeedConfig({"train_batch_size": 1})
    assert {key: getattr(config, key) for key in SCALAR_DEFAULTS} == SCALAR_DEFAULTS
    assert {key: getattr(config.float16_config, key) for key in FP16_DEFAULTS} == FP16_DEFAULTS


def test_a_resolved_config_means_to_deepspeed_what_the_bare_one_means():
    module = deepspeed_config_module()
    bare = {**ADAMW, "train_batch_size": 4, "fp16": {"enabled": True}}
    bare["zero_optimization"] = {"stage": 1}
    resolved = load_config(bare).deepspeed
    first, second = (vars(module.DeepSpeedConfig(copy.deepcopy(c))) for c in (bare, resolved))
    plain = (bool, int, float, str, type(None))
    differing = {
        key for key, value in first.items() if isinstance(value, plain) and second[key] != value
    }
    assert differing == {"optimizer_params"}, "the bare config leaves them to the optimizer"
    assert first["float16_config"] == second["float16_config"]
    assert first["zero_config"] == second["zero_config"]
