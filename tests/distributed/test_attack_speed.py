"""What makes the attack's passes cheaper trains the same model under every ZeRO stage."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dat_ds.attacks import AttackGraphs
from dat_ds.errors import ConfigError
from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.unit.test_attack_graphs import recorded

RANKS, STEPS = 2, 4
THREAT = {"norm": "linf", "eps": 0.1}
STAGES = [0, 1, 2, 3]
SPEEDUPS: dict[str, dict[str, Any]] = {
    "compiled attack": {"engine": {"compile": "attack"}},
    "replayed": {"engine": {"cuda_graphs": True}},
    "folded and replayed": {
        "attack": {"steps": 2, "fold_batch_norm": True},
        "engine": {"cuda_graphs": True},
    },
    "compiled": {"engine": {"compile": "all"}},
    "compiled attack in bf16": {
        "engine": {"compile": "attack"},
        "attack": {"steps": 2, "precision": "bf16"},
    },
    "channels last": {"engine": {"channels_last": True}},
    "folded": {"attack": {"steps": 2, "fold_batch_norm": True}},
    "int8": {"model": "vit", "attack": {"steps": 2, "precision": "int8"}},
    "int8, gathered on every pass": {
        "model": "vit",
        "attack": {"steps": 2, "precision": "int8"},
        "engine": {"resident_parameters_gib": 0},
    },
    "fp8": {"model": "vit", "attack": {"steps": 2, "precision": "fp8"}},
    "folded, bf16": {"attack": {"steps": 2, "fold_batch_norm": True, "precision": "bf16"}},
}
REPLAYED = ["replayed", "folded and replayed"]
EXACT = ["compiled attack", *REPLAYED, "compiled", "channels last", "folded"]
CASES = [
    (name, stage)
    for name, stage in itertools.product(SPEEDUPS, STAGES)
    if stage < 3 or not name.startswith(("folded", *REPLAYED))  # refused, see below
]


def with_quick_compiler() -> None:
    """Trace as ever, but leave out the slow generation of C++."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    compiler = torch.compile

    def quick(*modules: Any, mode: str | None = None, **options: Any) -> Any:
        return compiler(*modules, **{**options, "backend": "aot_eager"})

    torch.compile = quick
    DeepSpeedEngine.compile = functools.partialmethod(DeepSpeedEngine.compile, backend="aot_eager")


def train(stage: int, dat: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import dat_ds
    from dat_ds.engine import hooks

    dat = {"attack": {"steps": 2}, **dat}
    model = tiny.MODELS[dat.pop("model", "cnn")]()
    engine, *_ = dat_ds.initialize(model=model, config=tiny.config(stage, dat=dat))
    if engine.run.dat.engine.cuda_graphs:  # which need a GPU; see tests/gpu
        engine.inner.graphs = AttackGraphs(engine.module, record=recorded)
    for step in range(STEPS):
        x, y = tiny.images(8, seed=step)
        part = slice(4 * engine.ranks.rank, 4 * engine.ranks.rank + 4)
        engine.backward(engine(x[part], y[part]))
        engine.step()
    weights = {k: v.clone() for k, v in hooks.full_state_dict(engine.deepspeed).items()}
    metrics = engine.metrics
    if engine.inner.graphs is not None:
        metrics["num_recorded"] = engine.inner.graphs.num_recorded
    engine.close()
    return weights, metrics


def every_case() -> dict[Any, Any]:
    with_quick_compiler()
    outcomes: dict[Any, Any] = {
        (model, stage): train(stage, {"model": model}) for model in tiny.MODELS for stage in STAGES
    }
    for name, stage in CASES:
        outcomes[name, stage] = train(stage, SPEEDUPS[name])
    outcomes["auto"] = {
        speedups: chosen_precision(*speedups) for speedups in ((2.0, 2.0), (2.0, 1.0), (0.1, 2.0))
    }
    outcomes["resumed"] = chosen_after_resume()
    return outcomes


def chosen_precision(of_products: float, of_gradients: float) -> Any:
    """What ``auto`` takes where rank 1 measures these speedups, and rank 0 ones of 2."""
    import dat_ds
    from dat_ds.minmax import inner

    seen: list[str] = []

    def probe(name: str, speedup: float) -> Any:
        def measured(*_arguments: Any) -> float:
            seen.append(name)
            return speedup if torch.distributed.get_rank() else 2.0

        return measured

    originals = inner.product_speedup, inner.gradient_speedup
    inner.product_speedup = probe("products", of_products)
    inner.gradient_speedup = probe("gradients", of_gradients)
    config = tiny.config(0, dat={"attack": {"steps": 2, "precision": "auto"}})
    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
    for _ in range(2):
        engine.backward(engine(*tiny.images(4)))
        engine.step()
    inner.product_speedup, inner.gradient_speedup = originals
    engine.close()
    return engine.attack_precision, seen


def chosen_after_resume() -> Any:
    """A choice comes back with the checkpoint: another timing might fall out differently."""
    import dat_ds
    from dat_ds.engine.rank_state import rank_state, restore_rank_state

    config = tiny.config(0, dat={"attack": {"steps": 2, "precision": "auto"}})
    found = []
    for choice in ("bf16", None, "auto"):
        engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
        engine.inner.precision = choice
        state = rank_state(engine)
        engine.close()
        again, *_ = dat_ds.initialize(model=tiny.cnn(), config=config)
        restore_rank_state(state, again)
        found.append(again.attack_precision)
        again.close()
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[Any, Any]]:
    return run_ranks(every_case, RANKS)


@pytest.mark.parametrize(("name", "stage"), [case for case in CASES if case[0] in EXACT])
def test_it_trains_the_same_model(outcomes: list[dict[Any, Any]], name: str, stage: int) -> None:
    weights, _ = outcomes[0][name, stage]
    for key, expected in outcomes[0]["cnn", stage][0].items():
        torch.testing.assert_close(weights[key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "stage"), [case for case in CASES if case[0] in REPLAYED])
def test_attacks_are_recorded_once(outcomes: list[dict[Any, Any]], name: str, stage: int) -> None:
    _, metrics = outcomes[0][name, stage]
    _, expected = outcomes[0]["cnn", stage]
    assert metrics["num_recorded"] == 1
    assert metrics["attack_zero_share"] == pytest.approx(expected["attack_zero_share"], abs=1e-3)


@pytest.mark.parametrize(("name", "stage"), [case for case in CASES if case[0] not in EXACT])
def test_shorter_floats_train_a_model_close_by(
    outcomes: list[dict[Any, Any]], name: str, stage: int
) -> None:
    weights, metrics = outcomes[0][name, stage]
    plain, plain_metrics = outcomes[0][SPEEDUPS[name].get("model", "cnn"), stage]
    assert all(value.isfinite().all() for value in weights.values())
    assert metrics["loss"] == pytest.approx(plain_metrics["loss"], rel=0.02)
    assert any(not torch.equal(weights[key], plain[key]) for key in plain)


def test_a_slow_probe_on_one_rank_decides_for_all(outcomes: list[dict[Any, Any]]) -> None:
    for rank in outcomes:
        assert rank["auto"] == {
            (2.0, 2.0): ("bf16", ["products", "gradients"]),
            (2.0, 1.0): (None, ["products", "gradients"]),
            (0.1, 2.0): (None, ["products"]),
        }


def test_the_choice_is_kept_by_checkpoints(outcomes: list[dict[Any, Any]]) -> None:
    assert outcomes[0]["resumed"] == ["bf16", None, "auto"]


def test_folding_is_refused_where_it_cannot_be() -> None:
    from dat_ds.config import load_config

    attack = {"steps": 2, "fold_batch_norm": True}
    with pytest.raises(
        ConfigError, match=r"fold_batch_norm=True .* but zero_optimization\.stage=3"
    ):
        load_config(tiny.config(3, dat={"attack": attack}))


@pytest.mark.parametrize(
    ("attack", "sections", "message"),
    [
        ({"fold_batch_norm": True}, {"stage": 3}, r"fold_batch_norm=True .* but zero_optimization"),
        ({"precision": "bf16"}, {"bf16": {"enabled": True}}, r"'bf16' .* but bf16\.enabled"),
        (
            {"precision": "int8"},
            {"compile": "attack"},
            r"compile='attack' .* but dat\.attack\.prec",
        ),
        ({}, {"precision": "bf16"}, r"precision='bf16' with an attack given to initialize"),
        ({"name": "fat"}, {"graphs": True}, r"cuda_graphs=True .* but dat\.attack\.name='fat'"),
        ({"name": "free"}, {"micro_batches": 2}, r"attack_micro_batches=2 .* but .*name='free'"),
    ],
)
def test_an_attack_of_the_users_own_is_checked_too(
    attack: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    import dat_ds
    from dat_ds.attacks import build_attack

    steps = {} if attack.get("name") == "free" else {"steps": 2}
    own = build_attack({**steps, "step_size": 0.04, "threat_model": THREAT, **attack})
    of_dat = {"attack": {"steps": 2, "precision": sections.pop("precision", None)}}
    together = sections.pop("micro_batches", 1)
    of_dat["engine"] = {
        "compile": sections.pop("compile", "none"),
        "cuda_graphs": sections.pop("graphs", False),
        "attack_micro_batches": together,
    }
    sections["gradient_accumulation_steps"] = together
    config = tiny.config(sections.pop("stage", 0), dat=of_dat, **sections)
    with pytest.raises(ConfigError, match=message):
        dat_ds.initialize(model=tiny.vit(), config=config, attack=own)


def test_all_that_is_wrong_with_an_own_attack_is_said_at_once() -> None:
    import dat_ds

    of_dat = {"attack": {"steps": 2, "precision": "bf16"}, "engine": {"cuda_graphs": True}}
    with pytest.raises(ConfigError) as caught:
        dat_ds.initialize(
            model=tiny.vit(), config=tiny.config(0, dat=of_dat), attack=lambda _m, x, _y, _g: x
        )
    precision, graphs = str(caught.value).split("\n")
    assert precision.startswith("dat.attack.precision='bf16' with an attack given to initialize")
    assert graphs == (
        "dat.engine.cuda_graphs=True records the attack and replays it, but an attack of your own "
        "leaves decisions to the host. Remove one of them."
    )


def test_an_own_attack_may_be_a_name_or_keys_as_in_json() -> None:
    import dat_ds
    from dat_ds.attacks import build_attack
    from dat_ds.config import threat_of

    for own in ("fgsm", {"name": "pgd", "steps": 3, "step_size": "eps/2"}):
        engine, *_ = dat_ds.initialize(model=tiny.vit(), config=tiny.config(0), attack=own)
        keys = {"name": own} if isinstance(own, str) else own
        threat = threat_of(engine.run.dat)
        assert engine.attack_in_use == build_attack({**keys, "threat_model": threat})
        engine.close()
    with pytest.raises(ConfigError, match=r"attack\.name='fgms' is not valid \(did you mean 'fgsm"):
        dat_ds.initialize(model=tiny.vit(), config=tiny.config(0), attack="fgms")


def test_graphs_are_refused_where_memory_moves() -> None:
    from dat_ds.config import load_config

    for stage, mode in ((3, "eval"), (0, "train")):
        dat = {"engine": {"cuda_graphs": True}, "attack": {"steps": 2, "model_mode": mode}}
        with pytest.raises(
            ConfigError, match=r"cuda_graphs=True .* but (zero_optimization|.*model_mode)"
        ):
            load_config(tiny.config(stage, dat=dat))


def test_8_bits_are_refused_without_layers_for_them() -> None:
    import dat_ds

    config = tiny.config(0, dat={"attack": {"precision": "int8"}})
    with pytest.raises(ConfigError, match=r"dat\.attack\.precision='int8': this model"):
        dat_ds.initialize(model=tiny.cnn(), config=config)


def test_a_precision_the_model_has_anyway_is_refused() -> None:
    from dat_ds.config import load_config

    config = tiny.config(0, bf16={"enabled": True}, dat={"attack": {"precision": "bf16"}})
    with pytest.raises(ConfigError, match=r"dat\.attack\.precision='bf16' .* but bf16\.enabled"):
        load_config(config)
