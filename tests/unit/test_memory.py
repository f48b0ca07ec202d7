"""Memory of a step: closed forms of ZeRO's terms, traces of known models, the command's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dat_ds.bench.memory.moments import (
    ATTACK,
    MOMENTS,
    REDUCTION,
    STEP,
    UPDATE,
    Ledger,
    Setting,
    memory_of,
)
from dat_ds.bench.memory.predict import StepMemory, bench_memory
from dat_ds.bench.memory.state import OptimizerBytes, optimizer_bytes
from dat_ds.bench.memory.trace import LiveBytes, Passes, Precisions, TracedModel
from dat_ds.cli.main import main
from dat_ds.config import adapt_to_device, load_config
from dat_ds.errors import ConfigError, ModelError

P, N = 4_000_000, 4
ADAMW = OptimizerBytes(8.0, 0.0, whole=False)
NOTHING = Passes(0, ((0, 0),))
SIZES = (P // 2, P // 4, P // 4)
MODEL = {
    "name": "vit_tiny_patch16_224",
    "patch_size": 8,
    "depth": 4,
    "embed_dim": 48,
    "num_heads": 3,
}


def ledger(stage: int, **options: Any) -> Ledger:
    values = {"trainable": SIZES, "ranks": N, "optimizer": ADAMW, "persistence": 0}
    setting = Setting(stage=stage, **{**values, **options})
    return memory_of(setting, NOTHING, NOTHING, 0)


def config(stage: int = 0, **sections: Any) -> dict[str, Any]:
    dat = {
        "data": {"name": "synthetic", "num_train": 16, "num_test": 16},
        "model": MODEL,
        "attack": {"name": "pgd", "steps": 1},
        **sections.pop("dat", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "zero_optimization": {"stage": stage},
        "dat": dat,
        **sections,
    }


# ---- terms


def test_adamw_in_float32_takes_16_bytes_a_parameter() -> None:
    terms = ledger(0).device[STEP]
    assert terms == {"parameters": 4 * P, "optimizer": 8 * P, "gradients": 4 * P}
    assert sum(terms.values()) == 16 * P


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, 2 + 12), (1, 2 + 12 / N), (2, 2 + 12 / N), (3, (2 + 12) / N)],
)
def test_states_in_16_bits_are_those_of_the_zero_paper(stage: int, expected: float) -> None:
    # Rajbhandari et al., sec. 3: 2 bytes of parameters, K = 12 of masters and Adam's moments.
    terms = ledger(stage, width=2, gradient_width=2).device[ATTACK]
    states = ("parameters", "master weights", "optimizer")
    assert sum(terms[name] for name in states) == expected * P


@pytest.mark.parametrize("stage", range(4))
def test_more_ranks_never_take_more_states(stage: int) -> None:
    few, many = (ledger(stage, ranks=n).device[ATTACK] for n in (2, 8))
    assert many["optimizer"] * (1 if stage == 0 else 4) == few["optimizer"]
    assert many["parameters"] * (4 if stage == 3 else 1) == few["parameters"]


def test_offload_moves_states_to_the_host_but_for_a_cpu() -> None:
    device, host = (
        getattr(ledger(3, offloads_optimizer=True, offloads_parameters=True), place)[ATTACK]
        for place in ("device", "host")
    )
    assert host["optimizer"] == 8 * P / N
    assert host["parameters"] == 4 * P / N
    assert host["gradients"] == 8 * P / N  # float32 ones, and those that are accumulated
    assert not {"optimizer", "parameters", "master weights", "gradients"} & set(device)
    on_cpu = ledger(3, offloads_optimizer=True, on_cpu=True)
    assert on_cpu.host == {}
    assert on_cpu.device[ATTACK]["optimizer"] == 8 * P / N


def test_buckets_count_as_they_are_set_aside_on_a_gpu_and_as_written_on_a_cpu() -> None:
    assert ledger(3, reduce_bucket=10 * P).device[ATTACK]["bucket"] == 40 * P
    assert ledger(3, reduce_bucket=10 * P, on_cpu=True).device[ATTACK]["bucket"] == 4 * P
    small = ledger(2, reduce_bucket=P // 10)
    assert small.device[REDUCTION]["bucket"] == small.device[REDUCTION]["staging"] == 4 * P // 10


def test_zero3_gathers_all_parameters_for_the_attack_where_they_may_stay() -> None:
    gathered = [
        ledger(3, max_live=P // 8, resident_bytes=size).device[ATTACK]["gathered parameters"]
        for size in (4 * P, 4 * P - 1)
    ]
    assert gathered == [4 * P, 4 * P // 8]
    assert "gathered parameters" not in ledger(3, ranks=1).device[ATTACK]


def test_the_peak_of_a_backward_is_that_of_activations_and_gradients_together() -> None:
    passes = Passes(700, ((0, 1000), (50, 900), (100, 10)))
    setting = Setting(trainable=(50, 50), stage=0, ranks=1, optimizer=ADAMW)
    terms = memory_of(setting, None, passes, 0).device[UPDATE]
    assert terms["gradients"] == 4 * 50
    assert terms["activations"] + terms["transient"] == 900
    accumulated = Setting(trainable=(50, 50), stage=0, ranks=1, optimizer=ADAMW, accumulation=2)
    assert memory_of(accumulated, None, passes, 0).device[UPDATE]["gradients"] == 400


@pytest.mark.parametrize(("stage", "expected"), [(0, P), (1, P), (2, P // N)])
def test_the_attacks_of_later_micro_steps_find_gradients(stage: int, expected: int) -> None:
    assert ledger(stage, accumulation=2).device[ATTACK]["gradients"] == 4 * expected
    assert "gradients" not in ledger(stage).device[ATTACK]


def test_natural_training_keeps_no_activations_of_an_attack() -> None:
    setting = Setting(trainable=(10,), stage=0, ranks=1, optimizer=ADAMW)
    assert "activations" not in memory_of(setting, None, NOTHING, 0).device[ATTACK]


# ---- passes


class Mlp(nn.Module):
    """Two layers, whose saved tensors are known."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)).relu())


def traced(model: Any, shape: tuple[int, int, int], **options: Any) -> TracedModel:
    with torch.device("meta"):
        return TracedModel(model(), shape, Precisions(**options))


@pytest.fixture(autouse=True)
def _own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own linear layer: ZeRO-3 leaves one of its own in a process, which keeps more."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def test_saved_activations_of_two_layers_are_the_closed_form() -> None:
    hidden, images = 40, 3
    model = traced(lambda: Mlp(75, hidden), (3, 5, 5))
    # The update keeps each layer's input; the attack what a gradient to the pixels needs: ReLU's.
    assert model.update(images).saved == 4 * images * (75 + hidden)
    assert model.attack(images).saved == 4 * images * hidden
    assert model.update(images).timeline[-1][0] == sum(model.trainable) == 76 * hidden + 82
    half = traced(lambda: Mlp(75, hidden), (3, 5, 5), dtype=torch.float64)
    assert half.attack(images).saved == 8 * images * hidden


def test_a_trace_counts_what_a_real_pass_allocates() -> None:
    torch.manual_seed(0)
    model, x = Mlp(75, 40), torch.rand(3, 3, 5, 5)
    live, peaks = LiveBytes(), []
    live.leave_out(iter([*model.parameters(), x]))
    live.watch(peaks.append)
    with live:
        outputs = model(x)
        for_backward = live.now
        torch.autograd.backward(outputs.square().mean())
    found = traced(lambda: Mlp(75, 40), (3, 5, 5)).update(3)
    x_bytes = x.numel() * 4
    assert for_backward == found.saved - x_bytes + outputs.numel() * 4
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert found.peak - x_bytes <= live.peak <= found.peak - x_bytes + gradients
    del outputs
    assert live.now == gradients


def test_passes_of_any_batch_lie_on_a_line() -> None:
    run = load_config(config())
    memory = StepMemory(run, "cuda")
    once, double, triple = (memory.passes(n)[1] for n in (2, 4, 6))
    found = once.between(double, 2.0)
    assert abs(found.saved - triple.saved) <= 0.01 * triple.saved
    assert abs(found.peak - triple.peak) <= 0.01 * triple.peak


@pytest.mark.parametrize("kind", ["non_reentrant", "reentrant"])
def test_recomputation_and_shorter_floats_take_less(kind: str) -> None:
    plain = StepMemory(load_config(config()), "cuda").passes(8)
    model = {**MODEL, "activation_checkpointing": kind}
    recomputed = StepMemory(load_config(config(dat={"model": model})), "cuda").passes(8)
    half = StepMemory(load_config(config(bf16={"enabled": True})), "cuda").passes(8)
    for before, checkpointed, short in zip(plain, recomputed, half, strict=True):
        assert before is not None
        assert checkpointed is not None
        assert short is not None
        assert checkpointed.peak < 0.7 * before.peak
        assert 0.4 * before.saved < short.saved < 0.6 * before.saved


def test_a_hugging_face_model_is_traced_without_its_weights(tmp_path: Path) -> None:
    import transformers

    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = transformers.ViTConfig(**options, intermediate_size=48, image_size=32, patch_size=8)
    model = transformers.ViTForImageClassification(vit)
    model.save_pretrained(tmp_path)
    run = load_config(config(dat={"model": {"name": f"hf:{tmp_path}"}}))
    memory = StepMemory(run, "cpu")
    classes = model.classifier.out_features
    ten = sum(p.numel() for p in model.parameters()) + 25 * (10 - classes)
    assert memory.num_parameters == ten
    assert memory.passes(4)[1].saved > 0


def test_a_model_that_looks_at_its_numbers_is_refused() -> None:
    class Looks(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(ModelError, match="Looks cannot be traced without data"):
        traced(lambda: Looks(75, 4), (3, 5, 5)).update(2)


# ---- optimizers


@pytest.mark.parametrize(
    ("section", "state"),
    [
        ({"type": "AdamW", "params": {"lr": 0.1}}, 8.0),
        ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, 4.0),
        ({"type": "SGD", "params": {"lr": 0.1}}, 0.0),
    ],
)
def test_states_of_optimizers(section: dict[str, Any], state: float) -> None:
    run = adapt_to_device(load_config(config(optimizer=section)), "cpu")
    assert optimizer_bytes(run, "cpu").state == state


def test_our_optimizers_are_probed_and_1_bit_ones_refused() -> None:
    values = config(dat={"optimizer": {"name": "lamb"}})
    del values["optimizer"]
    assert optimizer_bytes(load_config(values), "cpu").state == 8.0
    one_bit = config(optimizer={"type": "OneBitAdam", "params": {"lr": 0.001}})
    with pytest.raises(ConfigError, match="'OneBitAdam' is not known without its ranks"):
        optimizer_bytes(load_config(one_bit), "cpu")


# ---- the command


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    memory = StepMemory(load_config(config(2)), "cuda")
    gib = 8.0
    found = memory.prediction(2, gib)
    assert found.largest is not None
    setting = memory.setting(2, 1)
    peaks = [memory.ledger(setting, n).peak() for n in (found.largest, found.largest + 1)]
    limit = (gib - 1) * 2**30
    assert peaks[0] <= 1.001 * limit
    assert peaks[1] >= 0.999 * limit
    assert memory.prediction(2, 1.5).largest == 0  # the bucket of 5e8 elements alone is larger


def test_the_command_predicts_in_the_spelling_of_either_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "run.json", tmp_path / "memory.json"
    file.write_text(json.dumps(config(3)), encoding="utf-8")
    common = ["--deepspeed_config", str(file), "--ranks", "2", "4", "--gpu_gib", "80"]
    assert main(["bench", "memory", *common, "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert "| 2 ranks, micro-batch 4, cuda |" in table
    assert "It fits 80 GiB" in table
    assert main(["bench", "predict", "--memory", *common]) == 0
    assert capsys.readouterr().out == table
    record = json.loads(output.read_text(encoding="utf-8"))
    assert list(record["predicted"][0]["ledger"]["device"]) == ["start", *MOMENTS[1:]]
    assert [each["ranks"] for each in record["predicted"]] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "--memory"], "--memory needs a run"),
        (["predict"], "Name records of 'dat-ds bench scaling'"),
        (["memory", "--deepspeed_config", "FILE", "--ranks", "0"], "--ranks 0: give at least 1."),
        (
            ["memory", "--deepspeed_config", "FILE", "--gpu_gib", "0.5"],
            "--gpu_gib 0.5: give more than 1.",
        ),
        (
            ["memory", "--deepspeed_config", "FILE", "--measure", "--ranks", "1", "2"],
            "--measure with --ranks 1 2: give one number.",
        ),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config()), encoding="utf-8")
    given = [str(file) if word == "FILE" else word for word in arguments]
    assert main(["bench", *given]) == 2
    assert words in capsys.readouterr().err


def test_what_the_prediction_does_not_know_is_said() -> None:
    values = config(dat={"compression": {"name": "int8"}})
    text = bench_memory(load_config(values), ranks=[2])
    assert "Not in the prediction: dat.compression.name='int8'" in text
