"""What ``dat_ds.engine.hooks`` and the traffic counter assume of DeepSpeed and torch.

Each test fails when an upgrade moves the attribute or the behaviour that it names.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.distributed.hooks_on_ranks import (
    LAYERS,
    MODELS,
    NUMEL,
    PREFETCHES,
    SMALL,
    STAGES,
    Tied,
    look,
)


@pytest.fixture(scope="module")
def by_rank() -> list[dict[Any, Any]]:
    return run_ranks(look, 2)


@pytest.fixture(scope="module")
def reports(by_rank: list[dict[Any, Any]]) -> dict[Any, Any]:
    return by_rank[0]


def test_skip_shared_memory_op_replaces_what_deepspeed_calls(reports: dict[Any, Any]) -> None:
    assert reports["shm"] == {"exists": True, "is looked up": True, "is skipped": True}


def test_use_current_collectives_replaces_what_deepspeed_calls(reports: dict[Any, Any]) -> None:
    names = ("all_gather_single", "reduce_scatter_single")
    if not hasattr(torch.distributed, names[0]):  # before torch 2.14
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
    assert [*reports["collectives"].values()] == [(True, name) for name in names]


def test_supports_fp16_says_what_deepspeed_accepts(reports: dict[Any, Any]) -> None:
    report = reports["fp16"]
    assert (report["unsupported"], report["supported"]) == (False, True)


def test_deepspeed_leaves_out_the_loss_scale_at_stage_0_and_we_put_it_in(
    reports: dict[Any, Any],
) -> None:
    report, begin = reports["fp16"], tiny.vit().state_dict()
    torch.testing.assert_close(report["ours"] / 2**10, report["theirs"], rtol=0.01, atol=1e-4)
    assert (report["scale", 0], report["scale", 1]) == (2**10, 1)
    ends = (report["end", 0], report["end", 1])
    assert max(float((ends[0][k] - begin[k]).abs().max()) for k in begin) > 0.01
    # Half a step of float16 near 1, where stage 1 averages in another order.
    assert max(float((ends[0][k] - ends[1][k]).abs().max()) for k in begin) < 1e-3


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_reduce_in_backward_says_whether_gradients_are_averaged(
    by_rank: list[dict[Any, Any]], precision: str
) -> None:
    mine, other = (reports["reduction", precision] for reports in by_rank)
    assert torch.equal(mine[True], other[True])
    assert not torch.allclose(mine[False], other[False])
    assert (mine["sent", False], mine["sent", True]) == (False, True)
    # DeepSpeed looks for overflow in 16 bits alone, and then asks all ranks.
    assert mine["skipped"] == other["skipped"] == (precision == "bf16")


def test_copy_master_weights_makes_the_model_follow_them(reports: dict[Any, Any]) -> None:
    pairs = list(zip(reports["masters"]["halves"], reports["masters"]["masters"], strict=True))
    assert all(half.dtype == torch.bfloat16 for half, _ in pairs)
    assert all(master.dtype == torch.float32 for _, master in pairs)
    assert all(torch.equal(half, master.to(torch.bfloat16)) for half, master in pairs)


def test_accelerator_device_is_the_engines(reports: dict[Any, Any]) -> None:
    device, engine_device = reports["vit", 0]["devices"]
    assert device == torch.device("cpu")
    assert device.type == torch.device(engine_device).type


@pytest.mark.parametrize("stage", STAGES)
def test_is_partitioned_is_true_at_stage_3_only(reports: dict[Any, Any], stage: int) -> None:
    assert set(reports["vit", stage]["partitioned"]) == {stage == 3}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MODELS)
def test_full_state_dict_is_the_unpartitioned_state(
    by_rank: list[dict[Any, Any]], name: str, stage: int
) -> None:
    reference = MODELS[name]().state_dict()
    state = by_rank[0][name, stage]["state"]
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[key], reference[key]) for key in reference)
    assert by_rank[1][name, stage]["state"] == {}


@pytest.mark.parametrize("stage", STAGES)
def test_held_weights_of_all_ranks_make_up_the_weights(
    by_rank: list[dict[Any, Any]], stage: int
) -> None:
    for i, parameter in enumerate(tiny.vit().parameters()):
        pieces = [reports["vit", stage]["held"][i] for reports in by_rank]
        if stage == 3:
            assert all(piece.numel() == -(-parameter.numel() // 2) for piece in pieces)
            whole = torch.cat(pieces)[: parameter.numel()].view_as(parameter)
            assert torch.equal(whole, parameter)
        else:
            assert all(torch.equal(piece, parameter) for piece in pieces)


@pytest.mark.parametrize("stage", STAGES)
def test_gathered_numel_and_bytes_count_whole_parameters(
    reports: dict[Any, Any], stage: int
) -> None:
    assert reports["vit", stage]["numel"] == NUMEL
    assert reports["vit", stage]["bytes"] == 4 * NUMEL
    assert reports["bf16"]["bytes"] == 2 * NUMEL


def test_resident_parameters_stay_gathered_inside_only(reports: dict[Any, Any]) -> None:
    report = reports["resident", 0]
    assert set(report["before"]) == {("NOT_AVAILABLE", False)}
    for inside in report["inside"]:
        assert set(inside) == {("AVAILABLE", False)}
    assert report["after"] == report["before"]


def test_resident_parameters_are_gathered_once(reports: dict[Any, Any]) -> None:
    # Also in the first pass of a run, and across passes that break DeepSpeed's recorded order.
    first, *later = reports["resident", 0]["gathers"][:3]
    assert first > 0
    assert later == [0, 0]
    first, *later = reports["resident", 0]["gathers"][3:]
    assert first > 0
    assert later == [0, 0]


def test_resident_parameters_leave_persistent_ones_alone(reports: dict[Any, Any]) -> None:
    report = reports["resident", SMALL]
    small = [size < SMALL for size in report["sizes"]]
    assert len(set(small)) == 2
    assert [persists for _, persists in report["after"]] == small
    assert [status == "AVAILABLE" for status, _ in report["after"]] == small
    assert {status for status, _ in report["inside"][-1]} == {"AVAILABLE"}


@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_resident_attack_does_not_make_training_hold_parameters(
    reports: dict[Any, Any], prefetch: int
) -> None:
    # DeepSpeed caches what to release per module; a resident attack must not fill that cache.
    attacked, natural = (reports["gathered", flag, prefetch][-1] for flag in (True, False))
    assert attacked == natural
    assert natural[0] < len(list(tiny.vit().parameters()))
    assert natural[1] == 0


@pytest.mark.parametrize("resident_gib", [4.0, 0.0])
def test_training_goes_on_exactly_after_an_attack_that_failed(
    reports: dict[Any, Any], resident_gib: float
) -> None:
    report, reference = reports["attack fails", resident_gib], reports["undisturbed"]
    assert set(report["after"]) == {("NOT_AVAILABLE", False)}
    assert report["trains"]
    assert all(torch.equal(report["state"][k], v) for k, v in reference["state"].items())


def test_release_parameters_partitions_what_a_forward_left_gathered(
    reports: dict[Any, Any],
) -> None:
    report, reference = reports["released"], reports["undisturbed"]
    assert ("AVAILABLE", False) in report["before"]
    assert set(report["after"]) == {("NOT_AVAILABLE", False)}
    assert all(torch.equal(report["state"][k], v) for k, v in reference["state"].items())


@pytest.mark.parametrize("stage", STAGES)
def test_replaced_averaging_is_all_that_reduces_gradients(
    reports: dict[Any, Any], stage: int
) -> None:
    ours, theirs = (reports["averaging", stage, own] for own in (True, False))
    assert all(
        torch.allclose(ours["state"][k], v, rtol=0, atol=1e-6) for k, v in theirs["state"].items()
    )
    # One name per bucket, the same names in every step, and no reduction besides.
    first, *later = ours["names"]
    assert len(set(first)) == len(first) >= (1 if stage == 0 else 2)
    assert later == [first, first]
    per_step = len(list(tiny.vit().parameters())) if stage == 3 else len(first)
    assert ours["reductions"] == [per_step] * 3


def test_replaced_gathers_are_what_the_passes_of_stage_3_see(reports: dict[Any, Any]) -> None:
    ours, theirs = (reports["gathers", own] for own in (True, False))
    assert all(torch.equal(ours["state"][k], v) for k, v in theirs["state"].items())
    # Two of three steps; in each at least one forward and one backward of the update.
    assert ours["entries"] >= 2 * 2 * NUMEL / 2
    assert theirs["entries"] == 0


def test_a_method_that_moved_is_an_error_with_its_name() -> None:
    from dat_ds.engine import hooks
    from dat_ds.errors import UserError

    with pytest.raises(UserError, match=r"has no Tied\.allreduce_bucket, in whose place"):
        hooks._replace(Tied(), "allreduce_bucket", lambda: None)


def test_gradient_scale_is_deepspeeds(reports: dict[Any, Any]) -> None:
    scale = reports["scale"]
    assert scale["fp16"] == 64
    assert scale["bf16"] == scale["float32"] == 1
    assert scale["autocast 0"] == scale["autocast 1"] == scale["autocast 3"] == 2.0**16
    assert scale["scaler 1"] == scale["scaler 3"] == 2.0**16


@pytest.mark.parametrize("name", LAYERS)
def test_attach_layers_finds_every_layer_in_the_master_weights(
    by_rank: list[dict[Any, Any]], name: str
) -> None:
    # After a step: every group of master weights has reached the model, the earlier ones too.
    first, second = (reports["layers", name] for reports in by_rank)
    parameters = dict(tiny.vit().named_parameters())
    assert first["names"] == second["names"]
    assert sorted(first["names"]) == sorted(parameters)
    for layer in parameters:
        pieces = [r["pieces"][layer].flatten() for r in (first, second) if layer in r["pieces"]]
        whole = pieces[0] if name.startswith("0") else torch.cat(pieces)
        state = first["state"][layer]
        assert torch.equal(whole.to(state.dtype).view_as(state), state), layer
        assert not torch.equal(first["start"][layer], state), layer


def test_the_cases_of_attach_layers_cut_layers_and_have_several_groups(
    by_rank: list[dict[Any, Any]],
) -> None:
    for name in LAYERS:
        first, second = (reports["layers", name] for reports in by_rank)
        if not name.startswith("0"):
            assert first["pieces"].keys() & second["pieces"].keys(), name
            assert first["groups"] > 1, name
    assert by_rank[0]["layers", "3, sub-groups, bf16"]["groups"] > 4


@pytest.mark.parametrize("name", LAYERS)
def test_deepspeeds_own_first_step_moves_nothing(reports: dict[Any, Any], name: str) -> None:
    for key, value in tiny.vit().state_dict().items():
        state = reports["layers", name]["start"][key]
        assert torch.equal(state, value.to(state.dtype)), key


def test_torch_routes_collectives_through_the_process_group(reports: dict[Any, Any]) -> None:
    # Two ranks and 24 bytes: see the formulas of Traffic.
    assert reports["traffic"]["counts"] == {
        "all_reduce": ({"gradients": 24}, {"gradients": 1}),
        "all_gather_into_tensor": ({"parameters": 24}, {"parameters": 1}),
        "reduce_scatter_tensor": ({"gradients": 12}, {"gradients": 1}),
        "all_gather": ({"parameters": 24}, {"parameters": 1}),
        "broadcast": ({"parameters": 24}, {"parameters": 1}),
        "all_to_all_single": ({"gradients": 12}, {"gradients": 1}),
    }


def test_last_traffic_listener_restores_the_process_group(reports: dict[Any, Any]) -> None:
    assert reports["traffic"]["after stopping"] == ({}, {})
    assert reports["traffic"]["restored"]
