"""What only a CUDA device can show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dat_ds.attacks import (
    AttackGraphs,
    InputGradient,
    SampleGenerator,
    ThreatModel,
    attack_mode,
    pgd,
)
from dat_ds.compression import CODECS, Payload, build_codec
from dat_ds.errors import ConfigError
from dat_ds.objectives import random_view
from tests.distributed import tiny
from tests.unit.test_attack_graphs import ATTACKS, Behind, attack_of, images, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_random_starts_are_the_same_on_cpu_and_gpu() -> None:
    x, _ = tiny.images(4)
    threat = ThreatModel("linf", 0.1)
    on_cpu = threat.random_start(x, SampleGenerator(0, 1, 2))
    on_gpu = threat.random_start(x.cuda(), SampleGenerator(0, 1, 2))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-6)


def test_views_are_the_same_on_cpu_and_gpu() -> None:
    x, _ = tiny.images(8)
    options = {"crop_area": 0.2, "color_jitter": 0.5, "flip": 0.5}
    on_cpu = random_view(x, SampleGenerator(0, 1, 2), **options)
    on_gpu = random_view(x.cuda(), SampleGenerator(0, 1, 2), **options)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-5)


def test_the_attack_is_the_same_on_cpu_and_gpu() -> None:
    x, y = tiny.images(8)
    model = tiny.vit().double()
    options = {"threat": ThreatModel("l2", 0.5), "steps": 5, "step_size": 0.2}
    on_cpu = pgd(model, x.double(), y, generator=SampleGenerator(0, 0), **options)
    on_gpu = pgd(
        model.cuda(), x.double().cuda(), y.cuda(), generator=SampleGenerator(0, 0), **options
    )
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_codecs_encode_and_decode_on_the_gpu(name: str) -> None:
    codec, tensor = build_codec(name), torch.randn(10_007, device="cuda")
    draws = []
    for seed in (0, 0, 1):
        payload = codec.encode(tensor, torch.Generator("cuda").manual_seed(seed))
        assert payload.data.device.type == "cuda"
        assert codec.num_bytes(payload) == codec.bytes_of(10_007)
        draws.append(codec.decode(payload))
    assert torch.equal(draws[0], draws[1])
    on_cpu = codec.decode(Payload(payload.data.cpu(), payload.shape))
    torch.testing.assert_close(draws[2].cpu(), on_cpu)
    loss = (draws[2] - tensor).square().sum() / tensor.square().sum()
    assert loss <= 1.1 * codec.variance_bound(10_007)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "torch_autocast"])
def test_training_in_16_bits_lowers_the_loss(stage: int, precision: str) -> None:
    import dat_ds

    config = tiny.config(stage, **{precision: {"enabled": True}})
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}}
    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
    x, y = tiny.images(4)
    losses = []
    for _ in range(40):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert engine.metrics["seconds_attack"] > 0
    engine.close()


SPEEDUPS: dict[str, dict[str, Any]] = {
    "compiled": {"engine": {"compile": "all"}},
    "graphed": {"engine": {"cuda_graphs": True}},
    "compiled and graphed": {"engine": {"compile": "attack", "cuda_graphs": True}},
    "graphed APGD": {
        "engine": {"cuda_graphs": True},
        "attack": {"name": "apgd", "steps": 3},
    },
    "channels last": {"engine": {"channels_last": True}},
    "folded": {"attack": {"steps": 3, "fold_batch_norm": True}},
}


@pytest.mark.parametrize("name", SPEEDUPS)
def test_cheaper_attack_passes_train_the_same_model(name: str) -> None:
    attack = SPEEDUPS[name].get("attack", {"steps": 3})
    plain = {k: v for k, v in attack.items() if k != "fold_batch_norm"}
    expected = trained({"attack": plain})
    graphs = int("graphed" in name)
    for key, value in trained({"attack": attack, **SPEEDUPS[name]}, graphs).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_recorded_is_named_and_leaves_the_stream_as_it_was() -> None:
    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4] * float(x.mean())

    model, attack = Asks().cuda(), attack_of(ATTACKS["pgd"])
    graphs, stream = AttackGraphs(model), torch.cuda.current_stream()
    x, y = (tensor.cuda() for tensor in images())

    def once(step: int) -> None:
        graphs(attack, lambda: contextlib.nullcontext(model), x, y, *source(step))

    def source(step: int) -> tuple[SampleGenerator, InputGradient]:
        return SampleGenerator(0, step), InputGradient()

    once(0)
    with pytest.raises(ConfigError, match=r"cuda_graphs=true: the attack on this model cannot"):
        once(1)
    assert torch.cuda.current_stream() == stream


@pytest.mark.parametrize("name", ATTACKS)
def test_a_graph_is_the_attack(name: str) -> None:
    model, attack = model_of(name).cuda(), attack_of(ATTACKS[name])
    graphs = AttackGraphs(model)

    @contextlib.contextmanager
    def frozen() -> Iterator[Behind]:
        with attack_mode(model):
            yield Behind(model)

    for step in range(4):
        x, y = (tensor.cuda() for tensor in images(32, seed=step))
        counts = InputGradient(), InputGradient()
        found = graphs(attack, frozen, x, y, SampleGenerator(0, step), counts[0])
        with frozen() as seen:
            expected = attack(seen, x, y, SampleGenerator(0, step), gradient=counts[1])
        # Kernels may add up in another order, which turns few signs of gradients.
        assert float(((found - expected).abs() > 1e-6).float().mean()) < 0.05
        assert counts[0].num_samples == counts[1].num_samples
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    assert graphs.num_recorded == 1


def trained(dat: dict[str, Any], graphs: int = 0) -> dict[str, torch.Tensor]:
    """Weights after four steps of one process, which made that many graphs."""
    import dat_ds

    engine, *_ = dat_ds.initialize(model=tiny.cnn(), config=tiny.config(0, dat=dat))
    for step in range(4):
        engine.backward(engine(*tiny.images(4, seed=step)))
        engine.step()
    weights = {key: value.clone() for key, value in engine.module.state_dict().items()}
    assert (0 if engine.inner.graphs is None else engine.inner.graphs.num_recorded) == graphs
    engine.close()
    return weights
