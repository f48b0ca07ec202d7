"""What each rank sees of ``dat_ds.engine.hooks``: one spawn serves all of ``test_hooks.py``."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.harness import allow_fp16
from tests.distributed.test_collectives import GATHERS, REDUCTIONS, Collectives

STAGES, BATCH, SMALL = (0, 1, 2, 3), 4, 100
PREFETCHES = (0, 50)


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, tiny.CLASSES)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)[:, :6]) * self.scale))


MODELS = {"vit": tiny.vit, "cnn": tiny.cnn, "tied": Tied}
NUMEL = sum(p.numel() for p in tiny.vit().parameters())


def start(model: nn.Module, stage: int, **sections: Any) -> Any:
    import dat_ds

    return dat_ds.initialize(model=model, config=tiny.config(stage, **sections))[0]


def look_at_weights(name: str, stage: int, **sections: Any) -> dict[str, Any]:
    from dat_ds.engine import hooks

    engine = start(MODELS[name](), stage, **sections)
    engine_ = engine.deepspeed
    report = {
        "state": hooks.full_state_dict(engine_),
        "held": [w.detach().clone() for w in hooks.held_weights(engine_)],
        "numel": hooks.gathered_numel(engine_),
        "bytes": hooks.gathered_bytes(engine_),
        "partitioned": [hooks.is_partitioned(p) for p in engine.module.parameters()],
        "devices": (hooks.accelerator_device(), engine_.device),
    }
    engine.close()
    return report


def statuses(engine: Any) -> list[tuple[str, bool]]:
    return [(p.ds_status.name, p.ds_persist) for p in engine.module.parameters()]


def look_at_residency(threshold: int) -> dict[str, Any]:
    from dat_ds.engine import hooks

    zero = {"stage3_param_persistence_threshold": threshold}
    engine = start(tiny.vit(), 3, zero_optimization=zero)
    x, y = tiny.images(BATCH)
    report = {
        "sizes": [p.ds_numel for p in engine.module.parameters()],
        "before": statuses(engine),
        "inside": [],
        "gathers": [],
    }
    # Before DeepSpeed has recorded the order of modules, and after.
    for _ in range(2):
        with hooks.resident_parameters(engine.deepspeed):
            for grad in (True, False, True):
                with Collectives() as seen, torch.set_grad_enabled(grad):
                    engine.module(x)
                report["inside"].append(statuses(engine))
                report["gathers"].append(seen.count("attack", GATHERS))
        report["after"] = statuses(engine)
        for _ in range(3):
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
    engine.close()
    return report


def count_gathered_in_training(attacked: bool, prefetch: int) -> list[tuple[int, int]]:
    """Gathered parameters at the head's forward and after backward, where ZeRO-3 frees eagerly."""
    zero = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": prefetch}
    engine = start(tiny.vit(), 3, zero_optimization=zero)
    if not attacked:
        engine.use_attack(None)
    x, y = tiny.images(BATCH)

    def gathered() -> int:
        return sum(status == "AVAILABLE" for status, _ in statuses(engine))

    at_head: list[int] = []
    engine.module.head.register_forward_hook(lambda *args: at_head.append(gathered()))
    counts = []
    for _ in range(3):
        loss = engine(x, y)
        engine.backward(loss)
        counts.append((at_head[-1], gathered()))
        engine.step()
    engine.close()
    return counts


class Interrupted(Exception):
    """Raised by a layer in the middle of a forward."""


def train_with(disturbance: str, resident_gib: float = 4.0) -> dict[str, Any]:
    """Three steps at stage 3; between two of them, something goes wrong."""
    from dat_ds.engine import hooks

    engine = start(tiny.vit(), 3, dat={"engine": {"resident_parameters_gib": resident_gib}})
    x, y = tiny.images(BATCH, seed=engine.ranks.rank)
    report: dict[str, Any] = {}
    for step in range(3):
        if step == 1 and disturbance == "attack fails":

            def fail(module: nn.Module, args: Any) -> None:
                raise Interrupted

            handle = engine.module.blocks[1].mlp.fc1.register_forward_pre_hook(fail)
            with pytest.raises(Interrupted):
                engine.attack(x, y)
            handle.remove()
            report["after"] = statuses(engine)
        elif step == 1 and disturbance == "forward without backward":
            engine.module(x)
            report["before"] = statuses(engine)
            hooks.release_parameters(engine.deepspeed)
            report["after"] = statuses(engine)
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
    report["trains"] = all(p.requires_grad for p in engine.module.parameters())
    report["state"] = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return report


def look_at_averaging(stage: int, own: bool) -> dict[str, Any]:
    """Three steps, averaged by DeepSpeed or, in its place, by plain collectives."""
    from dat_ds.engine import hooks

    zero = {} if stage in (0, 3) else {"reduce_scatter": not own}
    engine = start(tiny.vit(), stage, zero_optimization={**zero, "reduce_bucket_size": 1500})
    names: list[list[str]] = []

    def average(name: str, flat: Tensor) -> Tensor:
        names[-1].append(name)
        mean = flat.to(torch.float32)
        dist.all_reduce(mean)
        return mean / 2

    def scatter(name: str, gradients: Any) -> list[Tensor]:
        names[-1].append(name)
        shares = []
        for gradient in gradients:
            mean = gradient.flatten().clone()
            dist.all_reduce(mean)
            share = -(-mean.numel() // 2)
            shares.append((mean / 2)[engine.ranks.rank * share :][:share])
        return shares

    if own:
        hooks.replace_gradient_averaging(engine.deepspeed, average, scatter)
    calls = []
    x, y = tiny.images(BATCH, seed=engine.ranks.rank)
    for _ in range(3):
        names.append([])
        loss = engine(x, y)
        with Collectives() as seen:
            engine.backward(loss)
        calls.append(seen.count("attack", REDUCTIONS))
        engine.step()
    state = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return {"names": names, "reductions": calls, "state": state}


def look_at_gathers(own: bool) -> dict[str, Any]:
    """Three steps at stage 3, parameters gathered by DeepSpeed or exactly in its place."""
    from dat_ds.engine import hooks

    engine = start(tiny.vit(), 3, dat={"engine": {"resident_parameters_gib": 0.0}})
    gathered: list[int] = []
    outside = [False]

    def gather(shards: Any, sizes: Any) -> list[Tensor] | None:
        if outside[0]:
            return None
        whole = []
        for shard, size in zip(shards, sizes, strict=True):
            padded = nn.functional.pad(shard, (0, size - shard.numel()))
            whole.append(padded.new_empty(2 * size))
            dist.all_gather_into_tensor(whole[-1], padded)
            gathered.append(size)
        return whole

    if own:
        hooks.replace_parameter_gathers(engine.deepspeed, gather)
    x, y = tiny.images(BATCH, seed=engine.ranks.rank)
    for outside[0] in (False, True, False):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
    state = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return {"state": state, "entries": sum(gathered)}


def look_at_scale() -> dict[str, Any]:
    """The scale of gradients against what an unscaled backward gives."""
    from dat_ds.engine import hooks

    report = {}
    float16 = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    fp16 = {"fp16": {"enabled": True, "loss_scale": 64}}
    cases = {"fp16": (1, fp16), "bf16": (1, tiny.PRECISIONS["bf16"]), "float32": (0, {})}
    for name, (stage, sections) in {**cases, "autocast 0": (0, float16)}.items():
        engine = start(tiny.vit(), stage, **sections)
        report[name] = hooks.gradient_scale(engine.deepspeed)
        engine.close()
    for stage in (1, 3):
        engine = start(tiny.vit(), stage, **float16)
        report[f"autocast {stage}"] = hooks.gradient_scale(engine.deepspeed)
        scale = float(engine.deepspeed.optimizer.torch_autocast_gradscaler.get_scale())
        report[f"scaler {stage}"] = scale
        engine.close()
    return report


def look_at_traffic() -> dict[str, Any]:
    from dat_ds.engine import traffic

    before = dict(vars(dist.ProcessGroup))
    counter = traffic.Traffic()
    traffic.listen(counter)
    ones = torch.ones(6)  # 24 bytes
    collectives = {
        "all_reduce": lambda: dist.all_reduce(ones.clone()),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(12), ones),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(3), ones),
        "all_gather": lambda: dist.all_gather([torch.empty(6), torch.empty(6)], ones),
        "broadcast": lambda: dist.broadcast(ones.clone(), src=0),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(6), ones),
    }
    counts = {}
    for name, call in collectives.items():
        with counter.counting("backward"):
            call()
        call()  # outside: not counted
        counts[name] = counter.take()
    traffic.stop_listening(counter)
    with counter.counting("backward"):
        dist.all_reduce(ones.clone())
    return {
        "counts": counts,
        "after stopping": counter.take(),
        "restored": all(vars(dist.ProcessGroup)[m] is before[m] for m in before),
    }


def look_at_reduction(precision: str) -> dict[str, Any]:
    """One step with gradients of each rank's own, one without; then a NaN on one rank alone."""
    from dat_ds.engine import hooks

    engine = start(tiny.vit(), 0, **tiny.PRECISIONS[precision])
    x, y = tiny.images(BATCH, seed=engine.ranks.rank)
    report: dict[Any, Any] = {}
    for enabled in (False, True):
        hooks.reduce_in_backward(engine.deepspeed, enabled)
        engine.backward(engine(x, y))
        gradients = [p.grad.flatten() for p in engine.module.parameters()]
        report[enabled] = torch.cat(gradients).clone()
        engine.step()
        report["sent", enabled] = "gradients" in engine.metrics["bytes_sent"]
    hooks.reduce_in_backward(engine.deepspeed, False)
    engine.backward(engine(x, y) * (float("nan") if engine.ranks.rank else 1.0))
    engine.step()
    report["skipped"] = engine.deepspeed.skipped_steps
    engine.close()
    return report


def look_at_master_weights() -> dict[str, Any]:
    from dat_ds.engine import hooks

    engine = start(tiny.vit(), 0, **tiny.PRECISIONS["bf16"])
    masters = [p for group in engine.deepspeed.optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        torch._foreach_add_(masters, 0.5)
    hooks.copy_master_weights(engine.deepspeed)
    report = {
        "halves": [p.detach().clone() for p in engine.module.parameters()],
        "masters": [p.detach().clone() for p in masters],
    }
    engine.close()
    return report


LAYERS: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "0, bf16": (0, tiny.PRECISIONS["bf16"]),
    "1": (1, {}),
    "2, bf16": (2, tiny.PRECISIONS["bf16"]),
    "2, round robin, bf16": (
        2,
        {**tiny.PRECISIONS["bf16"], "zero_optimization": {"round_robin_gradients": True}},
    ),
    "2, aligned": (2, {"zero_optimization": {"parameter_alignment": True}}),
    "3, bf16": (3, tiny.PRECISIONS["bf16"]),
    "3, sub-groups, bf16": (
        3,
        {**tiny.PRECISIONS["bf16"], "zero_optimization": {"sub_group_size": SMALL}},
    ),
    "1, BF16_Optimizer": (
        1,
        {**tiny.PRECISIONS["bf16"], "data_types": {"grad_accum_dtype": "fp32"}},
    ),
}


def look_at_layers(stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Pieces of layers in this rank's master weights after a step, and the model's weights."""
    from dat_ds.engine import hooks

    sections = {**sections, "dat": {"optimizer": {"name": "lamb"}}}
    config = tiny.config(stage, **sections)
    del config["optimizer"]
    import dat_ds

    engine = dat_ds.initialize(model=tiny.vit(), config=config)[0]
    report: dict[str, Any] = {"start": hooks.full_state_dict(engine.deepspeed)}
    loss = engine(*tiny.images(BATCH, seed=engine.ranks.rank))
    engine.backward(loss)
    engine.step()
    layout = engine.deepspeed.basic_optimizer.layout
    report["pieces"] = {
        layout.names[layer]: piece.detach().clone()
        for flat, segments in layout.segments.items()
        for layer, piece in zip(segments.layers, segments.cut(flat), strict=True)
        if layer >= 0
    }
    report["names"] = layout.names
    report["groups"] = len(layout.segments)
    report["state"] = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return report


def look_at_fp16() -> dict[str, Any]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from dat_ds.engine import hooks

    report = {}
    config = tiny.config(1, zero_allow_untested_optimizer=True, **tiny.PRECISIONS["fp16"])
    del config["dat"]
    get_accelerator().is_fp16_supported = lambda: False
    report["unsupported"] = hooks.supports_fp16()
    model = tiny.vit()
    with pytest.raises(ValueError, match="fp16 is not supported"):
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    allow_fp16()
    report["supported"] = hooks.supports_fp16()
    for stage in (0, 1):
        section = {"enabled": True, "initial_scale_power": 10}
        engine = start(tiny.vit(), stage, fp16=section)
        report["scale", stage] = hooks.missing_loss_scale(engine.deepspeed)
        x, y = tiny.images(BATCH, seed=engine.ranks.rank)
        if stage == 0:
            bias = engine.module.head.bias
            hooks.reduce_in_backward(engine.deepspeed, False)
            engine.deepspeed.backward(engine(x, y))  # not ours, which scales
            report["theirs"] = bias.grad.float()
            engine.module.zero_grad()
            engine.backward(engine(x, y))
            report["ours"] = bias.grad.float()
            engine.close()
            engine = start(tiny.vit(), stage, fp16=section)
        for _ in range(3):
            engine.backward(engine(x, y))
            engine.step()
        report["end", stage] = hooks.full_state_dict(engine.deepspeed)
        engine.close()
    return report


def look() -> dict[Any, Any]:
    import deepspeed
    import deepspeed.comm.comm as comm

    from dat_ds.engine.launch import setup_ranks

    backend = sys.modules["deepspeed.comm.torch"]
    shm = {
        "exists": callable(getattr(backend, "build_shm_op", None)),
        "is looked up": "build_shm_op" in backend.TorchBackend.__init__.__code__.co_names,
    }
    setup_ranks()
    reports: dict[Any, Any] = {
        "shm": shm | {"is skipped": comm.cdb.shm_comm_op is None},
        "deepspeed": deepspeed.__version__,
        "collectives": {
            attribute: (
                attribute in backend.TorchBackend.__init__.__code__.co_names,
                getattr(comm.cdb, attribute).__name__,
            )
            for attribute in ("all_gather_function", "reduce_scatter_function")
        },
        "traffic": look_at_traffic(),
    }
    for name in MODELS:
        for stage in STAGES:
            reports[name, stage] = look_at_weights(name, stage)
    reports["bf16"] = look_at_weights("vit", 3, **tiny.PRECISIONS["bf16"])
    reports["resident", 0] = look_at_residency(0)
    reports["resident", SMALL] = look_at_residency(SMALL)
    for attacked, prefetch in itertools.product((True, False), PREFETCHES):
        reports["gathered", attacked, prefetch] = count_gathered_in_training(attacked, prefetch)
    reports["undisturbed"] = train_with("nothing")
    for gib in (4.0, 0.0):
        reports["attack fails", gib] = train_with("attack fails", gib)
    reports["released"] = train_with("forward without backward")
    for precision in ("float32", "bf16"):
        reports["reduction", precision] = look_at_reduction(precision)
    reports["masters"] = look_at_master_weights()
    for stage, own in itertools.product(STAGES, (True, False)):
        reports["averaging", stage, own] = look_at_averaging(stage, own)
    for own in (True, False):
        reports["gathers", own] = look_at_gathers(own)
    for name, case in LAYERS.items():
        reports["layers", name] = look_at_layers(*case)
    reports["fp16"] = look_at_fp16()
    reports["scale"] = look_at_scale()
    return reports
