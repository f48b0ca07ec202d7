"""Fine-tuning: rates by name and depth, frozen parameters, adapters; closed forms and refusals."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from dat_ds.attacks import attack_mode, pgd
from dat_ds.attacks.threat import ThreatModel
from dat_ds.config import load_config
from dat_ds.errors import ConfigError
from dat_ds.finetuning import FinetuningConfig
from dat_ds.finetuning.layers import classifier_of, network_of, rates_by_depth
from dat_ds.finetuning.lora import merged
from dat_ds.finetuning.plan import prepare
from dat_ds.method import parse_section
from dat_ds.minmax.reference import frozen_copy, settle
from dat_ds.models import build_model
from dat_ds.optim import ParameterOptions, build_optimizer, split_groups
from tests.distributed import tiny
from tests.unit.config_helpers import ADAMW, ours, problems
from tests.unit.model_helpers import TINY_VIT, pixels, write_hf_vit

pytest.importorskip("peft")


def finetuning(**values: Any) -> FinetuningConfig:
    found: list[str] = []
    config = parse_section(FinetuningConfig, values, "dat.finetuning", found)
    assert not found
    return config


def named(model: nn.Module, options: Any) -> dict[str, ParameterOptions]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: own for p, own in options.items()}


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


# ---- keys


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"parameters": [{"match": "(", "lr": 2}]},
            "dat.finetuning.parameters[0].match='(' is not a regular expression (missing )",
        ),
        ({"parameters": [{"lr": 2}]}, "dat.finetuning.parameters[0].match is missing"),
        (
            {"parameters": [{"match": "x"}]},
            "dat.finetuning.parameters[0].match='x' says nothing: write lr, weight_decay or freeze",
        ),
        (
            {"parameters": [{"match": "x", "lr": 2, "freeze": True}]},
            "dat.finetuning.parameters[0].lr=2.0 with freeze=true",
        ),
        (
            {"parameters": [{"match": "x", "lr": 0}]},
            "dat.finetuning.parameters[0].lr=0.0 is not valid: write a number above 0.",
        ),
        (
            {"parameters": [{"match": "x", "rate": 1}]},
            "Unknown key in the run config: dat.finetuning.parameters[0].rate",
        ),
        ({"layer_decay": 1.5}, "dat.finetuning.layer_decay=1.5 is not valid"),
        (
            {"linear_probe": True, "lora": {}},
            "dat.finetuning.linear_probe=true trains the classifier alone, without lora",
        ),
        (
            {"linear_probe": True, "layer_decay": 0.5},
            "dat.finetuning.layer_decay=0.5 with linear_probe=true",
        ),
        ({"lora": {"rank": 0}}, "dat.finetuning.lora.rank=0 is not valid"),
        ({"lora": {"targets": []}}, "dat.finetuning.lora.targets=[] names no layer"),
    ],
)
def test_what_no_fine_tuning_is_is_refused_by_its_key(values: Any, message: str) -> None:
    found = problems(ours(finetuning=values))
    assert found[0].startswith(message)


def test_combinations_that_cannot_work_are_refused_by_key() -> None:
    section = {"finetuning": {"linear_probe": True}, "optimizer": {"name": "sgd"}}
    model = {"activation_checkpointing": "reentrant"}
    (found,) = problems({"dat": {**section, "model": model, "attack": {"name": "none"}}})
    assert "dat.model.activation_checkpointing='reentrant' loses the gradients" in found
    assert "dat.finetuning.linear_probe=true freezes parameters" in found
    with pytest.raises(ConfigError, match=r"dat\.finetuning\.layer_decay with initialize\(optim"):
        load_config({"dat": {"finetuning": {"layer_decay": 0.5}}}, client_optimizer=True)
    section = {"type": "Muon", "params": {"lr": 0.1, "muon_lr": 0.2}}
    found = problems({"optimizer": section, "dat": {"finetuning": {"layer_decay": 0.5}}})
    assert any("multiplies optimizer.params.lr" in problem for problem in found)


def test_a_resolved_section_is_read_again() -> None:
    tuned = {"layer_decay": 0.7, "lora": {"rank": 3}, "parameters": [{"match": "a", "lr": 2}]}
    run = load_config(ours(finetuning=tuned))
    assert load_config(run.to_dict()) == run
    assert run.dat.finetuning.lora is not None
    assert run.dat.finetuning.lora.scale == 16 / 3
    assert not load_config(ADAMW).dat.finetuning.is_on


# ---- rules by name


def test_the_first_rule_that_matches_holds() -> None:
    model = tiny.vit()
    rules = [
        {"match": "^head", "lr": 10},
        {"match": r"blocks\.0\.", "freeze": True},
        {"match": "bias$", "lr": 2, "weight_decay": 0.3},
    ]
    options = named(model, prepare(model, finetuning(parameters=rules)))
    assert options["head.bias"] == ParameterOptions(10.0)
    assert options["blocks.1.attn.qkv.bias"] == ParameterOptions(2.0, 0.3)
    assert options["cls_token"] == ParameterOptions()
    assert not any(name.startswith("blocks.0.") for name in trained(model))
    assert set(options) == set(trained(model))


def test_names_are_those_of_the_network_inside() -> None:
    rules = finetuning(parameters=[{"match": "^blocks", "lr": 2}])
    bare, wrapped = tiny.vit(), build_model(**TINY_VIT)
    both = nn.Sequential(nn.Identity(), tiny.vit())
    for model in (bare, wrapped, both):
        options = named(model, prepare(model, rules))
        fast = {name for name, own in options.items() if own.rate == 2}
        assert fast == {name for name in options if "blocks." in name}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "blok.1", "lr": 2}], r"\[0\].match='blok.1' matches no parameter.*Near: "),
        (
            [{"match": "blocks", "lr": 2}, {"match": "blocks.0", "lr": 3}],
            r"\[1\].match='blocks.0': all parameters that it matches follow an earlier rule",
        ),
        ([{"match": ".", "freeze": True}], "freezes all 32 parameters"),
    ],
)
def test_rules_that_decide_about_nothing_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"dat\.finetuning.*{message}"):
        prepare(tiny.vit(), finetuning(parameters=rules))


def test_a_rate_of_what_is_frozen_is_refused() -> None:
    rules = [{"match": "blocks", "lr": 2}]
    with pytest.raises(ConfigError, match=r"parameters\[0\].match='blocks' matches frozen param"):
        prepare(tiny.vit(), finetuning(linear_probe=True, parameters=rules))


def test_no_wish_changes_nothing() -> None:
    model = tiny.vit()
    assert prepare(model, FinetuningConfig()) == {}
    assert len(trained(model)) == 32


def test_groups_are_split_by_options_the_fastest_first() -> None:
    a, b, c = (nn.Parameter(torch.zeros(n)) for n in (1, 2, 3))
    options = {a: ParameterOptions(0.5), c: ParameterOptions(2.0, 0.7)}
    groups = [{"params": [a, b], "weight_decay": 0.1, "adapt": False}, {"params": [c], "lr": 3.0}]
    parts = split_groups(groups, options, lambda group: group.get("lr", 1.0))
    assert [(len(g["params"]), g["lr"], g.get("weight_decay"), g.get("adapt")) for g in parts] == [
        (1, 1.0, 0.1, False),
        (1, 0.5, 0.1, False),
        (1, 6.0, 0.7, None),
    ]


def test_muons_two_kinds_of_groups_keep_their_own_rates() -> None:
    model = tiny.vit()
    options = prepare(model, finetuning(layer_decay=0.5))
    from dat_ds.optim import OPTIMIZERS

    method = OPTIMIZERS["muon"](lr=0.1, adam_lr_ratio=0.2)
    rates: dict[bool, set[float]] = {True: set(), False: set()}
    for group in method.build(model, options).param_groups:
        rates[group["muon"]].add(round(group["lr"], 6))
    assert rates[True] == {0.05, 0.025}  # blocks 1 and 0
    assert rates[False] == {0.02, 0.01, 0.005, 0.0025}


# ---- depth


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 4}),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg", "class_token": False}),
        ("beit_base_patch16_224", {"depth": 2, "embed_dim": 16, "num_heads": 2}),
        ("resnet18", {"channels": (8, 8, 8, 8)}),
        ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 8)}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1), "embed_dim": 8}),
    ],
)
def test_layers_of_timms_networks_are_timms(name: str, arguments: Any) -> None:
    model = timm.create_model(name, **arguments)
    names = {p: key for key, p in model.named_parameters()}
    theirs = {
        names[p]: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.7)
        for p in group["params"]
    }
    ours_of = rates_by_depth(network_of(model), 0.7)
    assert ours_of == pytest.approx(theirs)
    assert len(set(theirs.values())) > 3


def test_blocks_of_a_hugging_face_encoder_are_counted(tmp_path: Path) -> None:
    write_hf_vit(tmp_path)
    model = build_model(f"hf:{tmp_path}", num_classes=4, img_size=8)
    options = named(model, prepare(model, finetuning(layer_decay=0.5)))
    for name, own in options.items():
        layer = 0 if "embeddings" in name else 3
        for block in range(2):
            layer = block + 1 if f"layers.{block}." in name else layer
        assert own.rate == 0.5 ** (3 - layer), name
    assert {own.rate for own in options.values()} == {1, 0.5, 0.25, 0.125}


def test_depth_and_rules_multiply() -> None:
    model = tiny.vit()
    rules = [{"match": "mlp", "lr": 3}]
    options = named(model, prepare(model, finetuning(layer_decay=0.5, parameters=rules)))
    assert options["blocks.0.mlp.fc1.weight"].rate == 3 * 0.25
    assert options["blocks.0.attn.qkv.weight"].rate == 0.25
    assert options["patch_embed.proj.weight"].rate == 0.125


def test_networks_whose_depth_is_not_known_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer_decay: Sequential is neither a network of timm"):
        prepare(tiny.cnn(), finetuning(layer_decay=0.5))
    config = transformers.SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1],
                                     num_heads=[1, 1], window_size=2)  # fmt: skip
    with pytest.raises(ConfigError, match=r"nor a Hugging Face encoder of one chain"):
        prepare(transformers.SwinForImageClassification(config), finetuning(layer_decay=0.5))


# ---- freezing


def test_a_linear_probe_trains_the_classifier_alone(tmp_path: Path) -> None:
    write_hf_vit(tmp_path)
    models = {
        "head": tiny.vit(),
        "fc": timm.create_model("resnet18", channels=(8, 8, 8, 8)),
        "body.head": build_model(**TINY_VIT),
        "body.model.classifier": build_model(f"hf:{tmp_path}", num_classes=4, img_size=8),
    }
    for head, model in models.items():
        prepare(model, finetuning(linear_probe=True))
        assert trained(model) == [f"{head}.weight", f"{head}.bias"]
    with pytest.raises(ConfigError, match=r"linear_probe=true: which part of Sequential is its"):
        prepare(tiny.cnn(), finetuning(linear_probe=True))
    rules = [{"match": "norm", "freeze": False}]
    model = tiny.vit()
    prepare(model, finetuning(linear_probe=True, parameters=rules))
    assert set(trained(model)) > {"norm.weight", "blocks.0.norm1.bias", "head.bias"}


def test_frozen_parameters_of_the_users_stay_frozen() -> None:
    model = tiny.vit()
    model.pos_embed.requires_grad_(False)
    prepare(model, finetuning(layer_decay=0.5))
    assert "pos_embed" not in trained(model)
    prepare(model, finetuning(parameters=[{"match": "pos_embed", "freeze": False}]))
    assert "pos_embed" in trained(model)


def test_statistics_of_frozen_batch_norm_are_fixed() -> None:
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=4)
    frozen = finetuning(parameters=[{"match": "^(conv1|bn1|layer1)", "freeze": True}])
    prepare(model.train(), frozen)
    before = copy.deepcopy(dict(model.named_buffers()))
    model.train()
    model(torch.rand(4, 3, 32, 32))
    changed = {k for k, b in model.named_buffers() if not torch.equal(b, before[k])}
    assert not any(k.startswith(("bn1", "layer1")) for k in changed)
    assert any(k.startswith("layer2") for k in changed)
    with attack_mode(model, "train"):
        assert not model.bn1.training
        assert model.layer2[0].bn1.training
    assert copy.deepcopy(model).train().bn1.training is False


def test_an_attack_goes_through_frozen_layers() -> None:
    x, y = tiny.images(4)
    threat = ThreatModel("linf", 0.1)

    def attacked(model: nn.Module) -> Tensor:
        return pgd(model.eval(), x, y, threat=threat, steps=3, step_size=0.05, random_start=False)

    model = tiny.vit()
    expected = attacked(model)
    prepare(model, finetuning(linear_probe=True))
    assert torch.equal(attacked(model), expected)
    assert not torch.equal(expected, x)


# ---- adapters


LORA = {"rank": 2, "alpha": 6.0}


def randomised(model: nn.Module) -> nn.Module:
    """Let adapters differ from zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def test_adapters_change_nothing_at_first_and_leave_the_random_state() -> None:
    x, _ = tiny.images(2)
    model = tiny.vit().eval()
    expected, state = model(x), torch.get_rng_state()
    prepare(model, finetuning(lora=LORA), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(x), expected)
    assert not any(m.training for m in model.modules())
    names = {n.replace(".default", "") for n in trained(model)}
    assert names == {"head.weight", "head.bias"} | {
        f"blocks.{i}.attn.{layer}.lora_{kind}.weight"
        for i in range(2)
        for layer in ("qkv", "proj")
        for kind in "AB"
    }
    same, other = (tiny.vit() for _ in range(2))
    prepare(same, finetuning(lora=LORA), seed=3)
    prepare(other, finetuning(lora=LORA), seed=4)
    key = "blocks.0.attn.qkv.lora_A.default.weight"
    assert torch.equal(same.get_parameter(key), model.get_parameter(key))
    assert not torch.equal(other.get_parameter(key), model.get_parameter(key))


def test_merged_weights_compute_the_same() -> None:
    x, _ = tiny.images(2)
    plain = tiny.vit()
    model = tiny.vit()
    prepare(model, finetuning(lora=LORA))
    model = randomised(model).eval()
    state = merged(model.state_dict(), 3.0)
    layer = model.blocks[0].attn.qkv
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    by_hand = plain.blocks[0].attn.qkv.weight + 3.0 * low_rank
    torch.testing.assert_close(state["blocks.0.attn.qkv.weight"], by_hand)
    plain.load_state_dict(state)  # no key more, none less
    torch.testing.assert_close(plain.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tiny.vit().eval()(x), model(x), atol=1e-3)


def test_adapters_of_a_hugging_face_encoder(tmp_path: Path) -> None:
    write_hf_vit(tmp_path)
    model = build_model(f"hf:{tmp_path}", num_classes=4, img_size=8, seed=0)
    fresh = build_model(f"hf:{tmp_path}", num_classes=4, img_size=8, seed=0).eval()
    prepare(model, finetuning(lora=LORA, layer_decay=0.5))
    randomised(model).eval()
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n in trained(model) if "lora" in n}
    assert adapted == {"q_proj", "v_proj"}
    fresh.load_state_dict(merged(model.state_dict(), 3.0))
    x = pixels(8, 3)
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-5)


def test_adapters_have_the_rate_of_their_block() -> None:
    model = tiny.vit()
    options = named(model, prepare(model, finetuning(lora=LORA, layer_decay=0.5)))
    assert options["blocks.0.attn.qkv.lora_A.default.weight"].rate == 0.25
    assert options["blocks.1.attn.qkv.lora_A.default.weight"].rate == 0.5
    assert options["head.weight"].rate == 1


def test_adapters_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"targets\[0\]='mlp.fc3' is not a linear layer.*fc1"):
        prepare(tiny.vit(), finetuning(lora={"targets": ["mlp.fc3"]}))
    with pytest.raises(ConfigError, match=r"'patch_embed.proj' is not .* \(patch_embed.proj is a "):
        prepare(tiny.vit(), finetuning(lora={"targets": ["patch_embed.proj"]}))
    with pytest.raises(ConfigError, match=r"lora.targets is missing: the network has no attention"):
        prepare(tiny.cnn(), finetuning(lora={}))


def test_an_adapter_that_the_network_passes_by_is_refused_in_the_first_forward() -> None:
    sizes = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32}
    model = timm.create_model("beit_base_patch16_224", **sizes).eval()
    prepare(model, finetuning(lora={}))
    with pytest.raises(ConfigError, match=r"reads the weights of blocks.0.attn.qkv without call"):
        model(torch.rand(1, 3, 32, 32))
    model = timm.create_model("beit_base_patch16_224", **sizes).eval()
    prepare(model, finetuning(lora={"targets": ["attn.proj"]}))
    for _ in range(2):
        model(torch.rand(1, 3, 32, 32))
    assert not model._forward_hooks


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r'lora needs peft .*pip install "dat-ds\[finetune\]"'):
        prepare(tiny.vit(), finetuning(lora={}))


def test_the_classifier_of_a_network_is_known() -> None:
    assert classifier_of(network_of(timm.create_model("resnet18", channels=(8,) * 4))) == ("fc",)
    assert classifier_of(network_of(tiny.cnn())) == ()


def test_a_step_of_adamw_is_scaled_by_the_rate() -> None:
    """The first step of Adam without decay is ``lr * sign(g)``, whatever the gradient's size."""
    model = tiny.vit()
    options = prepare(model, finetuning(layer_decay=0.5))
    from dat_ds.optim import OPTIMIZERS

    optimizer = OPTIMIZERS["adamw"](lr=0.01, weight_decay=0.0, eps=1e-12).build(model, options)
    assert len(optimizer.param_groups) == 8
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = tiny.images(4)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name])[p.grad.abs() > 1e-7]
        expected = torch.full_like(moved, 0.01 * options[p].rate)
        torch.testing.assert_close(moved.abs(), expected, rtol=1e-3, atol=2e-7)


def test_an_optimizer_by_itself_has_todays_groups() -> None:
    assert len(build_optimizer(tiny.vit(), {"name": "adamw"}).param_groups) == 2


def test_a_reference_from_before_the_adapters_follows_the_models_dtypes() -> None:
    model = tiny.vit()
    reference = frozen_copy(model, "fare", remedy="")
    prepare(model, finetuning(lora=LORA))
    settle(reference, model.bfloat16(), torch.device("cpu"))
    assert reference.state_dict().keys() == tiny.vit().state_dict().keys()
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}


def test_a_compiled_network_passes_through_its_adapters() -> None:
    model = tiny.vit().eval()
    prepare(model, finetuning(lora=LORA))
    x, _ = tiny.images(2)
    expected = randomised(copy.deepcopy(model))(x)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    randomised(model)
    torch.testing.assert_close(compiled(x), expected)
