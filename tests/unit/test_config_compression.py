"""Claims about the section ``dat.compression`` of run configs."""

from __future__ import annotations

import copy

import pytest

from dat_ds.compression import COMPRESSIONS
from dat_ds.config import load_config
from tests.unit.config_helpers import ours, problems

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        (
            {"name": "int9"},
            "dat.compression.name='int9' is not valid (did you mean 'int8'?). Write one of ",
        ),
        (
            {"sides": "single"},
            "dat.compression.sides='single' is not a setting of the codec 'none': remove it. It "
            "takes no keys.",
        ),
        (
            {"name": "int8", "levels": 7},
            "dat.compression.levels=7 is not a setting of the codec 'int8', but of qsgd: remove "
            "it. It takes sides, error_feedback, bucket_mb, block_size.",
        ),
        (
            {"name": "natural", "block_size": 64},
            "dat.compression.block_size=64 is not a setting of the codec 'natural': remove it. It "
            "takes sides, error_feedback, bucket_mb.",
        ),
        ({"name": "qsgd", "levels": 128}, "dat.compression.levels=128 is not valid: "),
        ({"name": "topk", "ratio": 0}, "dat.compression.ratio=0.0 is not valid: "),
        (
            {"name": "sign", "error_feedback": False},
            "dat.compression.error_feedback=false: 'sign' is biased, and training with ",
        ),
        (
            {"name": "qsgd", "levels": 1, "error_feedback": True},
            "dat.compression.error_feedback=true: what 'qsgd' loses may be longer than the "
            "gradient (squared, up to 8 times) and would grow from step to step. ",
        ),
    ],
)
def test_compression_without_sense_is_refused_with_the_reason(compression, message):
    (problem,) = problems(ours(compression=compression))
    assert problem.startswith(message), problem


@pytest.mark.parametrize(
    ("stage", "keys", "named"),
    [
        (0, {"communication_data_type": "bf16"}, "communication_data_type"),
        (0, {"prescale_gradients": True}, "prescale_gradients"),
        (1, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        (1, {"zero_optimization": {"reduce_scatter": True}}, "zero_optimization.reduce_scatter"),
        (3, {"zero_optimization": {"reduce_scatter": False}}, "zero_optimization.reduce_scatter"),
        (
            2,
            {"zero_optimization": {"contiguous_gradients": False}},
            "zero_optimization.contiguous_gradients",
        ),
        (
            3,
            {"zero_optimization": {"zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients",
        ),
        (
            2,
            {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
            "zero_optimization.zenflow",
        ),
    ],
)
def test_deepspeed_keys_that_compression_would_ignore_are_refused(stage, keys, named):
    config = {**ours(compression={"name": "int8"}), **copy.deepcopy(keys)}
    config["zero_optimization"] = {"stage": stage, **keys.get("zero_optimization", {})}
    (problem,) = problems(config)
    assert problem.startswith(f"{named} with dat.compression.name='int8', which averages ")
    del config["dat"]["compression"]
    load_config(config)


def test_what_parameters_that_travel_as_int8_would_spoil_is_refused():
    sections = {"compression": {"name": "int8", "sides": "double"}}
    config = {**ours(**sections, weight_perturbation={"name": "awp"})}
    zero = {"zero_quantized_weights": True, "zero_hpz_partition_size": 2}
    for stage in (0, 3):
        config["zero_optimization"] = {"stage": stage, **zero}
        if stage == 0:
            load_config(config)
    weights, shards, perturbation = problems(config)
    assert weights.startswith("zero_optimization.zero_quantized_weights with dat.compression.sides")
    assert shards.startswith("zero_optimization.zero_hpz_partition_size with dat.compression.sides")
    assert perturbation.startswith("dat.weight_perturbation.name='awp' with dat.compression.sides")
    config["dat"]["compression"]["sides"] = "single"
    load_config(config)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compression_is_written_out_with_the_codec_s_defaults(name, stage):
    config = {**ours(compression={"name": name}), "zero_optimization": {"stage": stage}}
    run = load_config(config)
    written = run.to_dict()
    assert load_config(written) == run
    section = {k: v for k, v in written["dat"]["compression"].items() if v is not None}
    assert ("reduce_scatter" in written["zero_optimization"]) == (
        name != "none" and stage in (1, 2)
    )
    if name == "none":
        assert section == {"name": "none"}
    else:
        biased = name in ("topk", "sign")
        general = {"name": name, "error_feedback": biased, "bucket_mb": 8.0}
        own = COMPRESSIONS[name]().to_dict()
        assert section == {k: v for k, v in (own | general).items() if v is not None}
        assert general.items() <= section.items()
