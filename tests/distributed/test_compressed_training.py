"""Compressed training under every ZeRO stage: a lossless codec changes nothing."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks

STAGES, STEPS, RANKS = (0, 1, 2, 3), 4, 2
NUMEL = sum(p.numel() for p in tiny.vit().parameters())
CODECS = ("int8", "int4", "qsgd", "natural", "topk", "sign")
LOSSLESS = {"name": "topk", "ratio": 1.0, "block_size": 16}
ZERO = "zero_optimization"


def start(
    stage: int, compression: dict[str, Any] | None, resident_gib: float = 4.0, **sections: Any
) -> Any:
    import dat_ds

    dat: dict[str, Any] = {
        "attack": {"steps": 1, "step_size": 0.04},
        "engine": {"resident_parameters_gib": resident_gib},
    }
    if compression is not None:
        dat["compression"] = compression
    config = tiny.config(stage, dat=dat, **sections)
    return dat_ds.initialize(model=tiny.vit(), config=config)[0]


def advance(engine: Any, steps: int) -> None:
    for _ in range(steps * engine.accumulation):
        count = engine.global_steps * engine.accumulation + engine.micro_step
        x, y = tiny.images(4, seed=10 * count + engine.ranks.rank)
        engine.backward(engine(x, y))
        engine.step()


def weights(engine: Any) -> Tensor:
    """This rank's, as it holds them: whole, or a ZeRO-3 shard."""
    from dat_ds.engine import hooks

    return torch.cat([w.detach().float().flatten() for w in hooks.held_weights(engine.deepspeed)])


def train(stage: int, compression: dict[str, Any] | None, **sections: Any) -> dict[str, Any]:
    engine = start(stage, compression, **sections)
    advance(engine, STEPS)
    report = {
        "weights": weights(engine),
        "bytes": engine.metrics["bytes_sent"],
        "skipped": engine.metrics["skipped_steps"],
    }
    engine.close()
    return report


def compress_parameters(resident_gib: float) -> dict[str, Any]:
    """Double-sided under ZeRO-3: what the passes of one step see, and what remains exact."""
    from dat_ds.compression import NearestInt8
    from dat_ds.engine import hooks
    from dat_ds.engine.reductions import GradientCompression

    seen: dict[int, list[Tensor]] = {}
    gather = GradientCompression._gather

    def recorded(self: Any, shards: Any, sizes: Any) -> Any:
        whole = gather(self, shards, sizes)
        for shard, flat in zip(shards, whole or [], strict=False):
            seen.setdefault(shard.data_ptr(), []).append(flat)
        return whole

    GradientCompression._gather = recorded  # type: ignore[method-assign]
    engine = start(3, {"name": "int8", "sides": "double"}, resident_gib=resident_gib)
    codec, x = NearestInt8(), tiny.images(4)[0]
    exact = [p.ds_tensor.clone() for p in engine.module.parameters()]
    places = [p.ds_tensor.data_ptr() for p in engine.module.parameters()]
    engine.backward(engine(*tiny.images(4, seed=engine.ranks.rank)))
    passes = [seen[place] for place in places]
    rank = engine.ranks.rank
    report = {
        "passes": [len(values) for values in passes],
        "same": all(torch.equal(v, values[0]) for values in passes for v in values),
        "errors": [],
    }
    for shard, parameter, values in zip(exact, engine.module.parameters(), passes, strict=True):
        own = shard[: max(0, parameter.ds_numel - rank * len(shard))]
        own_seen = values[0][rank * len(shard) :][: len(own)]
        report["errors"].append(float((codec.decode(codec.encode(own)) - own_seen).abs().sum()))
    engine.step()
    with engine.frozen() as model:
        logits = model(x)
    state = hooks.full_state_dict(engine.deepspeed)
    if state:
        reference = tiny.vit()
        reference.load_state_dict(state)
        report["exact outside"] = (reference.eval()(x) - logits).abs().max().item()
    engine.close()
    GradientCompression._gather = gather  # type: ignore[method-assign]
    return report


FP16 = tiny.PRECISIONS["fp16"]
SECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small buckets": {ZERO: {"reduce_bucket_size": 1500}},
    "accumulation": {"gradient_accumulation_steps": 2, "gradient_clipping": 0.1},
    "bf16": tiny.PRECISIONS["bf16"],
    "autocast": tiny.PRECISIONS["autocast"],
    "fp16": FP16,
    "overlap": {ZERO: {"overlap_comm": True, "reduce_bucket_size": 1500}},
    "offload": {
        ZERO: {"offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
}
CASES = [
    (stage, section)
    for stage in STAGES
    for section in SECTIONS
    if not (stage == 0 and section in ("fp16", "overlap", "offload", "small buckets"))
]


def resume(stage: int, **sections: Any) -> dict[str, bool]:
    """Two steps, a checkpoint, two more; and two more from the checkpoint in another engine."""
    compression = {"name": "sign", "block_size": 64}
    engine = start(stage, compression, **sections)
    folder = str(engine.ranks.gather(tempfile.mkdtemp() if engine.ranks.is_main else "")[0])
    advance(engine, 2)
    engine.save_checkpoint(folder)
    advance(engine, 2)
    finished = weights(engine)
    engine.close()
    results = {}
    for with_errors in (True, False):
        engine = start(stage, compression, **sections)
        engine.load_checkpoint(folder)
        if not with_errors:
            engine.compression.load_state_dict({"scale": 1.0, "buckets": {}})
        advance(engine, 2)
        results["exact" if with_errors else "without errors"] = torch.equal(
            weights(engine), finished
        )
        engine.close()
    return results


def messages_of(function: Any) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dat_ds")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        function()
    finally:
        logger.removeHandler(handler)
    return messages


def change_buckets() -> None:
    engine = start(0, {"name": "sign"})
    advance(engine, 1)
    next(engine.module.parameters()).requires_grad_(False)
    advance(engine, 2)
    engine.close()


def move_hook(stage: int) -> str:
    """What one reads where DeepSpeed reduces gradients by itself after all."""
    from dat_ds.errors import UserError

    engine = start(stage, {"name": "int8"})
    names = ("allreduce_bucket", "gradient_reduction_w_predivide")
    owner = engine.deepspeed if stage == 0 else engine.deepspeed.optimizer
    delattr(owner, names[stage > 0])  # uncovers the class's own
    with pytest.raises(UserError, match="averaged gradients without it") as caught:
        advance(engine, 1)
    engine.close()
    return str(caught.value)


def disagree() -> str:
    from dat_ds.engine.launch import setup_ranks
    from dat_ds.errors import ConfigError

    with pytest.raises(ConfigError, match="Ranks disagree on dat") as caught:
        start(0, {"name": "int8"} if setup_ranks().rank else None)
    return str(caught.value)


def everything() -> dict[Any, Any]:
    from dat_ds.engine.launch import setup_ranks

    setup_ranks()
    allow_fp16()
    reports: dict[Any, Any] = {}
    for stage, section in CASES:
        for compression in (None, LOSSLESS):
            reports[stage, section, bool(compression)] = train(
                stage, compression, **SECTIONS[section]
            )
    for stage in STAGES:
        for name in CODECS:
            reports[stage, name] = train(stage, {"name": name})
        reports["resume", stage] = resume(stage)
    reports["pieces"] = train(0, {"name": "int8", "bucket_mb": 0.002})
    reports["single"] = train(1, {"name": "int8", "sides": "single"})
    reports["double"] = train(3, {"name": "int8", "sides": "double"})
    reports["double fp16"] = train(3, {"name": "int8", "sides": "double"}, **FP16)
    for gib in (4.0, 0.0):
        reports["parameters", gib] = compress_parameters(gib)
    reports["sign fp16"] = train(1, {"name": "sign"}, **FP16)
    loss_scaling = {"fp16": {"enabled": True, "initial_scale_power": 7, "loss_scale_window": 1}}
    reports["resume fp16"] = resume(1, **loss_scaling)
    reports["buckets"] = messages_of(change_buckets)
    reports["accumulates"] = [
        messages_of(lambda s=s: start(s, LOSSLESS, gradient_accumulation_steps=2).close())
        for s in (1, 2)
    ]
    reports["disagree"] = disagree()
    reports["moved"] = [move_hook(stage) for stage in (0, 1, 2)]
    return reports


def alone() -> dict[str, Any]:
    said = messages_of(lambda: start(2, {"name": "int8"}).close())
    return {"said": said, "plain": train(2, None), "int8": train(2, {"name": "int8"})}


@pytest.fixture(scope="module")
def by_rank() -> list[dict[Any, Any]]:
    return run_ranks(everything, RANKS)


@pytest.fixture(scope="module")
def reports(by_rank: list[dict[Any, Any]]) -> dict[Any, Any]:
    return by_rank[0]


def moved(report: dict[str, Any], reference: dict[str, Any]) -> float:
    """Distance of the weights over the way that training moved them."""
    start = torch.cat([p.detach().flatten() for p in tiny.vit().parameters()])
    way = (reference["weights"] - start).norm()
    return float((report["weights"] - reference["weights"]).norm() / way)


@pytest.mark.parametrize(("stage", "section"), CASES)
def test_a_lossless_codec_changes_nothing_but_roundings(
    by_rank: list[dict[Any, Any]], stage: int, section: str
) -> None:
    # Half precision rounds each reduced gradient once more; plain float32 only sums in one order.
    tolerance = {"float32": 1e-6, "half": 3e-3}[
        "half" if section in ("bf16", "fp16", "autocast") else "float32"
    ]
    for report in by_rank:
        plain, compressed = (report[stage, section, flag]["weights"] for flag in (False, True))
        assert (plain - compressed).abs().max() <= tolerance
        assert plain.abs().max() > 0.1
        assert report[stage, section, False]["skipped"] == report[stage, section, True]["skipped"]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", CODECS)
def test_replicas_stay_bit_identical(by_rank: list[dict[Any, Any]], name: str, stage: int) -> None:
    first, second = (report[stage, name]["weights"] for report in by_rank)
    assert torch.equal(first, second)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "most"), [("int8", 0.03), ("qsgd", 0.06), ("int4", 0.4), ("natural", 0.5)]
)
def test_unbiased_codecs_stay_near_the_uncompressed_run(
    reports: dict[Any, Any], name: str, most: float, stage: int
) -> None:
    distance = moved(reports[stage, name], reports[stage, "plain", False])
    assert 0 < distance <= most


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CODECS)
def test_bytes_of_gradients_are_those_of_the_payloads(
    reports: dict[Any, Any], name: str, stage: int
) -> None:
    from dat_ds.compression import build_codec

    sent = reports[stage, name]["bytes"]
    plain = reports[stage, "plain", False]["bytes"]
    codec = build_codec(name)
    if stage < 3:
        assert sent["gradients"] == 2 * codec.bytes_of(NUMEL // 2)
    else:  # one way, and each parameter's share is padded
        shares = sum(-(-p.numel() // RANKS) for p in tiny.vit().parameters())
        assert sent["gradients"] == codec.bytes_of(shares)
    assert {k: v for k, v in sent.items() if k != "gradients"} == {
        k: v for k, v in plain.items() if k != "gradients"
    }


def test_int8_and_sign_send_what_was_promised(reports: dict[Any, Any]) -> None:
    for stage in (0, 1, 2):
        full = reports[stage, "plain", False]["bytes"]["gradients"]
        assert reports[stage, "int8"]["bytes"]["gradients"] <= 0.27 * full
        assert reports[stage, "sign"]["bytes"]["gradients"] <= 0.035 * full


def test_accumulation_is_compressed_once_where_the_stage_allows_it(
    reports: dict[Any, Any],
) -> None:
    once = {s: reports[s, "plain", True]["bytes"]["gradients"] for s in STAGES}
    twice = {s: reports[s, "accumulation", True]["bytes"]["gradients"] for s in STAGES}
    assert [twice[s] / once[s] for s in STAGES] == [1, 1, 2, 2]
    silent, said = reports["accumulates"]
    assert not [line for line in silent if "micro-steps" in line]
    assert [line for line in said if "each of the 2 micro-steps" in line]


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_exact_and_needs_the_errors(
    by_rank: list[dict[Any, Any]], stage: int
) -> None:
    for report in by_rank:
        assert report["resume", stage] == {"exact": True, "without errors": False}


def test_resume_is_bit_exact_while_the_loss_scale_changes(by_rank: list[dict[Any, Any]]) -> None:
    for report in by_rank:
        assert report["resume fp16"]["exact"]


def test_single_sided_sends_the_mean_in_float32(reports: dict[Any, Any]) -> None:
    from dat_ds.compression import build_codec

    payload = build_codec("int8").bytes_of(NUMEL // 2)
    assert reports["single"]["bytes"]["gradients"] == payload + 4 * NUMEL // 2
    assert moved(reports["single"], reports[1, "plain", False]) <= 0.03


@pytest.mark.parametrize("resident_gib", [4.0, 0.0])
def test_under_zero_3_all_passes_of_a_step_see_the_same_rounded_parameters(
    by_rank: list[dict[Any, Any]], resident_gib: float
) -> None:
    for report in by_rank:
        parameters = report["parameters", resident_gib]
        assert min(parameters["passes"]) >= 2
        assert parameters["same"]
        assert parameters["errors"] == [0.0] * len(parameters["errors"])
    assert by_rank[0]["parameters", resident_gib]["exact outside"] < 1e-5


def test_under_zero_3_double_sided_compresses_parameters_too(reports: dict[Any, Any]) -> None:
    plain = reports[3, "plain", False]
    shares = [-(-p.numel() // RANKS) for p in tiny.vit().parameters()]
    gathers = plain["bytes"]["parameters"] / (4 * sum(shares))
    payload = sum(-(-share // 64) * (64 + 4) for share in shares)
    for report in (reports["double"], reports["double fp16"]):
        assert report["bytes"]["parameters"] == gathers * payload
        assert report["bytes"]["gradients"] == reports[3, "int8"]["bytes"]["gradients"]
    assert (reports["double"]["weights"] - plain["weights"]).norm() < 0.1 * plain["weights"].norm()
    assert reports["double fp16"]["skipped"] == reports[3, "fp16", False]["skipped"]


def test_a_bucket_may_be_encoded_in_pieces(reports: dict[Any, Any]) -> None:
    assert moved(reports["pieces"], reports[0, "plain", False]) <= 0.03


def test_overflowing_gradients_are_skipped_on_all_ranks_together(
    by_rank: list[dict[Any, Any]],
) -> None:
    # The first loss scale, 2^16, overflows at stage 1 here.
    first, second = (report["sign fp16"] for report in by_rank)
    assert first["skipped"] == second["skipped"] == by_rank[0][1, "fp16", False]["skipped"] > 0
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"].isfinite().all()


def test_other_buckets_start_without_error_feedback_and_say_so(reports: dict[Any, Any]) -> None:
    said = [line for line in reports["buckets"] if "bucket of other parameters" in line]
    assert len(said) == 1


def test_ranks_that_disagree_all_say_so(by_rank: list[dict[Any, Any]]) -> None:
    for report in by_rank:
        assert "rank 0: NoCompression(" in report["disagree"]
        assert "rank 1: Int8(" in report["disagree"]


def test_a_reduction_that_goes_another_way_is_an_error_on_every_rank(
    by_rank: list[dict[Any, Any]],
) -> None:
    for report in by_rank:
        assert len(report["moved"]) == 3
        assert all("install deepspeed>=0.19.8,<0.20" in text for text in report["moved"])


def test_one_rank_compresses_nothing_and_says_so() -> None:
    (report,) = run_ranks(alone, 1)
    assert [line for line in report["said"] if "with one rank no gradient travels" in line]
    assert torch.equal(report["plain"]["weights"], report["int8"]["weights"])
