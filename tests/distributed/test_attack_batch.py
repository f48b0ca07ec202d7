"""Several micro-batches attacked as one batch train the model that single ones train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dat_ds.errors import ConfigError, DataError
from tests.distributed import tiny
from tests.distributed.harness import allow_fp16, run_ranks

RANKS, ACCUMULATION, MICRO_BATCH, ATTACK_STEPS = 2, 4, 2, 3
NUM_IMAGES = 21  # the second step of an epoch has 5 for 8 micro-batches: of one image, or none
PGD = {"steps": ATTACK_STEPS, "step_size": 0.04}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **{f"ZeRO-{stage}": (stage, {}, {}) for stage in range(4)},
    "gathered on every pass": (3, {"engine": {"resident_parameters_gib": 0}}, {}),
    "autocast": (1, {}, tiny.PRECISIONS["autocast"]),
    "bf16": (2, {}, tiny.PRECISIONS["bf16"]),
    "fp16": (1, {}, tiny.PRECISIONS["fp16"]),
    "trades": (2, {"objective": {"name": "trades"}}, {}),
    "rotation": (2, {"objective": {"name": "rotation"}}, {}),
    "apgd": (0, {"attack": {"name": "apgd", "steps": 3}}, {}),
    "fat": (0, {"attack": {"name": "fat", **PGD}}, {}),
    "half the tokens": (0, {"attack": {**PGD, "keep_tokens": 0.5}}, {}),
    "average over balls": (
        0,
        {
            "attack": {
                "name": "multi_norm",
                **PGD,
                "other_norms": {"l2": 0.5},
                "combine": "average",
            }
        },
        {},
    ),
    "grad_align": (0, {"attack": {"name": "fgsm"}, "objective": {"grad_align": 0.2}}, {}),
    "awp": (2, {"weight_perturbation": {"name": "awp"}}, {}),
    "int8 gradients": (2, {"compression": {"name": "int8"}}, {}),
}
SHORT_FLOATS = ("autocast", "bf16", "fp16")


def train(
    stage: int, dat: dict[str, Any], sections: dict[str, Any], together: int
) -> tuple[dict[str, Tensor], list[int], list[dict[str, Any]]]:
    """Weights after two epochs, sizes of the batches that the model saw, metrics of each step."""
    import dat_ds
    from dat_ds.engine import hooks

    dat = {"attack": PGD, **dat, "data": {"name": "synthetic"}}
    dat["engine"] = {**dat.get("engine", {}), "attack_micro_batches": together}
    sizes = {"train_micro_batch_size_per_gpu": MICRO_BATCH}
    sizes["gradient_accumulation_steps"] = ACCUMULATION
    engine, _, loader, _ = dat_ds.initialize(
        model=tiny.vit(),
        config=tiny.config(stage, dat=dat, **sizes, **sections),
        training_data=TensorDataset(*tiny.images(NUM_IMAGES)),
    )
    seen: list[int] = []
    engine.module.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    metrics = []
    for _ in range(2):
        for batches in loader.steps():
            engine.train_step(batches)
            metrics.append(engine.metrics)
    weights = {k: v.clone() for k, v in hooks.full_state_dict(engine.deepspeed).items()}
    engine.close()
    return weights, seen, metrics


def every_case() -> dict[Any, Any]:
    allow_fp16()
    outcomes: dict[Any, Any] = {}
    for name, case in CASES.items():
        for together in (1, 2, 4) if name.startswith("ZeRO") else (1, 4):
            outcomes[name, together] = train(*case, together)
    outcomes["of one's own"] = batches_of_ones_own()
    outcomes["ways to call"] = {(w, n): call(w, n) for w in WAYS for n in (1, 4)}
    outcomes["natural"] = natural_training()
    return outcomes


WAYS = ("steps of the loader", "without plans", "moved, with plans", "one by one", "half a step")


def call(way: str, together: int) -> Any:
    """Losses of an epoch of the engine's own loader, or what is refused."""
    import dat_ds

    sizes = {"train_micro_batch_size_per_gpu": MICRO_BATCH}
    sizes["gradient_accumulation_steps"] = ACCUMULATION
    dat = {"attack": PGD, "engine": {"attack_micro_batches": together}}
    engine, _, loader, _ = dat_ds.initialize(
        model=tiny.vit(),
        config=tiny.config(0, dat=dat, **sizes),
        training_data=TensorDataset(*tiny.images(NUM_IMAGES)),
    )
    losses = []
    try:
        for step in loader.steps():
            if way == "one by one":
                mean = torch.zeros(())
                for x, y, plan in step:
                    loss = engine(x, y, plan=plan)
                    engine.backward(loss)
                    engine.step()
                    mean += loss.detach() / ACCUMULATION
            else:
                given = {
                    "steps of the loader": step,
                    "without plans": [(x, y) for x, y, _ in step],
                    "moved, with plans": [(x + 0.0, y, plan) for x, y, plan in step],
                    "half a step": step[: ACCUMULATION // 2],
                }[way]
                mean = engine.train_step(given)
            losses.append(mean.item())
    except (ConfigError, DataError) as error:
        return str(error)
    finally:
        engine.close()
    return losses


def natural_training() -> list[str]:
    """A run without an attack ignores the key; one that gets another attack is asked again."""
    import dat_ds
    from dat_ds.attacks import build_attack

    config = tiny.config(
        0,
        gradient_accumulation_steps=3,
        dat={"attack": {"name": "none"}, "engine": {"attack_micro_batches": 2}},
    )
    data = TensorDataset(*tiny.images(NUM_IMAGES))
    engine, _, loader, _ = dat_ds.initialize(model=tiny.vit(), config=config, training_data=data)
    for x, y in loader:
        engine.backward(engine(x, y))
        engine.step()
    problems = []
    threat = {"norm": "linf", "eps": 0.1}
    for attack in ({"name": "pgd", **PGD}, {"name": "free"}):
        try:
            engine.use_attack(build_attack({**attack, "threat_model": threat}))
        except ConfigError as error:
            problems += str(error).split("\n")
    engine.close()
    return problems


def batches_of_ones_own() -> dict[int, Any]:
    """Weights after training without a loader."""
    import dat_ds

    found: dict[int, Any] = {}
    for together in (1, 4):
        config = tiny.config(
            0,
            gradient_accumulation_steps=ACCUMULATION,
            dat={"attack": PGD, "engine": {"attack_micro_batches": together}},
        )
        engine, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
        for step in range(3):
            seeds = [10 * step + 2 * i + engine.ranks.rank for i in range(ACCUMULATION)]
            engine.train_step([tiny.images(4, seed=seed) for seed in seeds])
        found[together] = {k: v.clone() for k, v in engine.module.state_dict().items()}
        engine.close()
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[Any, Any]:
    return run_ranks(every_case, RANKS)[0]


def differences(outcomes: dict[Any, Any], name: str, together: int) -> float:
    weights, _, _ = outcomes[name, together]
    expected, _, _ = outcomes[name, 1]
    start = tiny.vit().state_dict()
    moved = max(float((expected[k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3
    return max(float((weights[k] - expected[k]).abs().max()) for k in start) / moved


@pytest.mark.parametrize("name", CASES)
def test_it_trains_the_same_model(outcomes: dict[Any, Any], name: str) -> None:
    # A product of more rows may round in another way, which turns the sign of a tiny gradient.
    allowed = 0.05 if name in SHORT_FLOATS else 2e-3
    for key in outcomes:
        if key[0] == name and key[1] > 1:
            assert differences(outcomes, *key) < allowed
            _, _, metrics = outcomes[key]
            _, _, expected = outcomes[name, 1]
            for here, there in zip(metrics, expected, strict=True):
                assert here["loss"] == pytest.approx(there["loss"], rel=0.02)
                assert here["robust_acc"] == pytest.approx(there["robust_acc"], abs=0.13)


@pytest.mark.parametrize("together", [1, 2, 4])
def test_the_attack_sees_larger_batches_and_nothing_else_does(
    outcomes: dict[Any, Any], together: int
) -> None:
    _, seen, _ = outcomes["ZeRO-0", together]
    group = [*[MICRO_BATCH * together] * ATTACK_STEPS, *[MICRO_BATCH] * together]
    first_step = group * (ACCUMULATION // together)
    # Of five images, this rank has three in its first three micro-batches, and fills in a fourth.
    group = [*[together] * ATTACK_STEPS, *[1] * together]
    second_step = group * (ACCUMULATION // together)
    assert seen == 2 * (first_step + second_step)


@pytest.mark.parametrize("together", [1, 2, 4])
def test_zero_3_gathers_once_for_all_of_them(outcomes: dict[Any, Any], together: int) -> None:
    gathers = [m["attack_parameter_gathers"] for m in outcomes["ZeRO-3", together][2]]
    alone = [m["attack_parameter_gathers"] for m in outcomes["ZeRO-3", 1][2]]
    assert alone[-1] > 0
    assert gathers[-1] * together == alone[-1]


def test_batches_without_a_loader(outcomes: dict[Any, Any]) -> None:
    found = outcomes["of one's own"]
    for key, value in found[1].items():
        torch.testing.assert_close(found[4][key], value, rtol=0, atol=2e-4)


def test_a_step_may_be_given_in_several_ways(outcomes: dict[Any, Any]) -> None:
    found = outcomes["ways to call"]
    expected = found["one by one", 1]
    assert len(expected) == 2
    for way in ("steps of the loader", "without plans", "moved, with plans"):
        assert found[way, 1] == pytest.approx(expected, rel=1e-6)
        assert found[way, 4] == pytest.approx(expected, rel=1e-4)
    assert "engine.train_step([(x, y), ...])" in found["one by one", 4]
    for together in (1, 4):
        assert found["half a step", together].startswith("train_step got 2 micro-batches after 0")


def test_without_an_attack_there_is_nothing_to_group(outcomes: dict[Any, Any]) -> None:
    of_pgd, *of_free = outcomes["natural"]
    words = "dat.engine.attack_micro_batches=2"
    assert of_pgd.startswith(f"{words} does not divide gradient_accumulation_steps=3: write 1, 3,")
    free = (
        f"{words} attacks several micro-batches as one, but dat.attack.name='free' goes on with "
        "the perturbation of earlier steps. Remove one of them."
    )
    assert of_free == [free, of_pgd]
