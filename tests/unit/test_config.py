"""Claims about run configs: strict, complete in one error, the same after a round trip."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import math
import pickle
import typing
from typing import Any, get_args

import pytest
import torch

from dat_ds.attacks import ATTACKS, INNER_LOSSES, NORMS
from dat_ds.compression import CODECS, codec_options
from dat_ds.config import (
    Length,
    adapt_to_device,
    load_config,
    one_bit_name,
    one_bit_options,
    parse_evaluation_attack,
    precision_of,
    resolve_batch,
    scale_learning_rate,
    schema,
)
from dat_ds.config.deepspeed_keys import (
    FP16_DEFAULTS,
    ONE_BIT_OPTIMIZERS,
    OPTIMIZER_DEFAULTS,
    SCALAR_DEFAULTS,
    TOP_LEVEL_KEYS,
    adam_weight_decay,
)
from dat_ds.config.reconcile import _REFUSED_KEYS
from dat_ds.errors import ConfigError, UserError
from dat_ds.objectives import OBJECTIVES
from dat_ds.optim import OPTIMIZERS, PRESETS, optimizer_options

ADAMW = {"optimizer": {"type": "AdamW"}}
NVME = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}


def ours(**sections: Any) -> dict[str, Any]:
    """A valid config but for ``sections`` of ``dat``."""
    return {**copy.deepcopy(ADAMW), "dat": sections}


def one_bit(kind: str, **params: Any) -> dict[str, Any]:
    """DeepSpeed's section for an optimizer that it removed."""
    return {"optimizer": {"type": kind, "params": params}}


def problems(config: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(config, **options)
    return str(caught.value).split("\n")


# ---- every mistake has its message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**ADAMW, "gradiant_clipping": 1},
            "Unknown top-level key 'gradiant_clipping' (did you mean 'gradient_clipping'?). "
            "Neither DeepSpeed nor dat_ds reads it (ours live under 'dat').",
        ),
        (
            {**ADAMW, "dta": {}},
            "Unknown top-level key 'dta' (did you mean 'dat'?). "
            "Neither DeepSpeed nor dat_ds reads it (ours live under 'dat').",
        ),
        (
            ours(atack={}),
            "Unknown key in the run config: dat.atack (did you mean 'attack'?). Valid keys of "
            "'dat': model, data, threat_model, attack, objective, weight_perturbation, guard, "
            "optimizer, schedule, ema, compression, evaluation, checkpoint, logging, engine, "
            "seed, output_dir.",
        ),
        (
            ours(ema={"decya": 0.9}),
            "Unknown key in the run config: dat.ema.decya (did you mean 'decay'?). "
            "Valid keys of 'dat.ema': decay.",
        ),
        (
            ours(threat_model={"eps": 8}),
            "dat.threat_model.eps=8 exceeds the pixel range [0.0, 1.0]. "
            "It looks like 0-255 units: write '8/255'.",
        ),
        (
            ours(threat_model={"lower": 1}),
            "dat.threat_model.lower=1.0 must be below upper=1.0.",
        ),
        (
            ours(threat_model={"norm": "linv"}),
            "dat.threat_model.norm='linv' is not valid (did you mean 'linf'?). "
            "Write one of 'linf', 'l2', 'l1'.",
        ),
        (
            ours(threat_model={"eps": "eight"}),
            "dat.threat_model.eps='eight' is not a length: write 0.03 or '8/255' (pixel units).",
        ),
        (
            ours(threat_model={"eps": "-8/255"}),
            "dat.threat_model.eps=-8/255 is not valid: write a number of at least 0.",
        ),
        (
            ours(attack={"name": "pdg"}),
            "dat.attack.name='pdg' is not valid (did you mean 'pgd'?). "
            "Write one of 'pgd', 'fgsm', 'fgsm_rs', 'n_fgsm', 'mim', 'apgd', "
            "'fat', 'multi_norm', 'free', 'none'.",
        ),
        (ours(attack={"steps": 2.5}), "dat.attack.steps=2.5 must be an integer."),
        (ours(attack={"steps": True}), "dat.attack.steps=True must be an integer."),
        (
            ours(attack={"steps": 0}),
            "dat.attack.steps=0 is not valid: write a number of at least 1.",
        ),
        (ours(attack={"random_start": 1}), "dat.attack.random_start=1 must be true or false."),
        (
            ours(attack={"name": "fgsm", "steps": 3}),
            "dat.attack.steps=3 is no setting of the attack 'fgsm': remove it. It takes step_size, "
            "loss, random_start, restarts, model_mode, precision, fold_batch_norm, resolution, "
            "keep_tokens, eps_warmup, steps_from.",
        ),
        (ours(attack=[]), "dat.attack=[] must be an object with the keys name, steps, step_size, "),
        (ours(seed=None), "dat.seed=None must be an integer."),
        (ours(output_dir=3), "dat.output_dir=3 must be a string."),
        ({"dat": {"optimizer": {"lr": "x"}}}, "dat.optimizer.lr='x' must be a finite number."),
        (
            {"dat": {"optimizer": {"name": "sgd", "betas": [0.9, 0.99]}}},
            "dat.optimizer.betas=[0.9, 0.99] is no setting of the optimizer 'sgd': remove it. It "
            "takes lr, weight_decay, momentum, nesterov.",
        ),
        (
            {"dat": {"optimizer": {"betas": [0.9]}}},
            "dat.optimizer.betas=[0.9] is not valid: write two numbers in [0, 1).",
        ),
        (
            {"dat": {"optimizer": {"name": "adamw", "preset": "paper"}}},
            "dat.optimizer.preset='paper' is no setting of the optimizer 'adamw': remove it. It "
            "takes lr, weight_decay, betas, eps.",
        ),
        (
            {"dat": {"optimizer": {"name": "lamb", "lower": 2, "upper": 1}}},
            "dat.optimizer: upper=1.0 must be above 0 and at least lower=2.0.",
        ),
        (
            {"dat": {"optimizer": {"name": "sgd", "momentum": 0, "nesterov": True}}},
            "dat.optimizer: Nesterov momentum requires a momentum and zero dampening",
        ),
        (
            {"dat": {"optimizer": {"name": "lamb"}}, "zero_optimization": NVME},
            "zero_optimization.offload_optimizer.device='nvme' with a layer-wise optimizer: its "
            "trust ratios need all shards of a step before any is updated, but this moves them "
            "one by one. Instead, write 'cpu'.",
        ),
        (
            {
                "dat": {"optimizer": {"name": "lars"}},
                "zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}},
            },
            "zero_optimization.offload_optimizer.ratio=0.5 with a layer-wise optimizer: ",
        ),
        (
            {"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": 2}},
            "optimizer.type='lamb' needs whole layers, but zero_optimization.stage=2 hands it "
            "slices across them, which silently trains something else: write ours, "
            "dat.optimizer.name='lamb', which knows them.",
        ),
        (
            ours(schedule={"scaling": "sqrt"}),
            "dat.schedule.scaling='sqrt' and dat.schedule.base_batch=None go together: write "
            "'linear' or 'sqrt' and the global batch that the learning rate is for, such as 256, "
            "or neither.",
        ),
        (
            ours(schedule={"base_batch": 256}),
            "dat.schedule.scaling='none' and dat.schedule.base_batch=256 go together: ",
        ),
        (
            {
                "optimizer": {"type": "RMSprop"},
                "dat": {"schedule": {"scaling": "sqrt", "base_batch": 256}},
            },
            "dat.schedule.scaling='sqrt' has no learning rate to scale: write optimizer.params.lr.",
        ),
        (ours(ema={"decay": math.inf}), "dat.ema.decay=inf must be a finite number."),
        (ours(ema={"decay": 1}), "dat.ema.decay=1.0 is not valid: write a number in [0, 1)."),
        (ours(model={"mean": 0.5}), "dat.model.mean=0.5 must be a list."),
        (ours(model={"options": 1}), "dat.model.options=1 must be an object."),
        (
            ours(model={"mean": [0.5, "a"]}),
            "dat.model.mean[1]='a' must be a finite number.",
        ),
        (
            ours(model={"mean": [0.5]}),
            "dat.model.mean and dat.model.std go together: give both or neither.",
        ),
        (
            ours(model={"mean": [0.5], "std": [0]}),
            "dat.model.std=[0.0] must hold positive numbers.",
        ),
        (
            ours(schedule={"epochs": 5, "warmup_epochs": 5}),
            "dat.schedule.warmup_epochs=5 must be below dat.schedule.epochs=5, "
            "of which it is a part.",
        ),
        (
            ours(schedule={"milestones": [0.7, 0.5]}),
            "dat.schedule.milestones=[0.7, 0.5] is not valid: "
            "write increasing fractions of the run in (0, 1).",
        ),
        (
            ours(evaluation={"attacks": ["pgd-20", "pgd20"]}),
            "dat.evaluation.attacks[1]: 'pgd20' is not an evaluation attack: write METHOD-STEPS "
            "or METHOD-STEPS-RESTARTS, such as 'pgd-20' or 'pgd-50-10'; methods are pgd, apgd-ce, "
            "apgd-dlr, apgd-t.",
        ),
        (
            ours(evaluation={"validation_attack": "aa"}),
            "dat.evaluation.validation_attack: 'aa' is not an evaluation attack: ",
        ),
        ({"dat": None, **ADAMW}, "dat=None must be an object with the keys model, data, "),
        (
            {"dat": {}},
            "No optimizer: write DeepSpeed's "
            '"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}, '
            'or ours "dat": {"optimizer": {"name": "adamw", "lr": 0.001}}.',
        ),
        (
            ours(optimizer={}),
            "'optimizer' and 'dat.optimizer' are given together: keep one of them.",
        ),
        (
            {"optimizer": "AdamW"},
            "optimizer='AdamW' must be an object, such as "
            '"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}.',
        ),
        ({"optimizer": {}}, "optimizer.type is missing: write 'AdamW' or 'SGD'."),
        (
            {"optimizer": {"type": "AdamW", "params": [1]}},
            "optimizer.params=[1] must be an object.",
        ),
        (
            {**one_bit("OneBitAdam"), "zero_optimization": {"stage": 1}},
            "zero_optimization.stage=1 with an optimizer that compresses its momentum: every rank "
            "needs its own gradient of the whole model, and the errors of compression are as large "
            "as the shards would save. Write zero_optimization.stage=0, or another optimizer.",
        ),
        (
            {
                "zero_optimization": {"stage": 3},
                "dat": {"optimizer": {"name": "zero_one_adam"}},
            },
            "zero_optimization.stage=3 with an optimizer that compresses its momentum: every rank "
            "needs its own gradient of the whole model, and the errors of compression are as large "
            "as the shards would save. Write zero_optimization.stage=0, or another optimizer.",
        ),
        (
            {
                **one_bit("OneBitLamb"),
                "torch_autocast": {"enabled": True, "dtype": "float16"},
            },
            "torch_autocast.dtype='float16' with an optimizer that compresses its momentum: each "
            "rank's loss scaler would skip steps by itself, and ranks would fall out of step. "
            "Write torch_autocast.dtype='bfloat16'.",
        ),
        (
            {**one_bit("OneBitAdam"), "dat": {"compression": {"name": "int8"}}},
            "dat.compression.name='int8' with an optimizer that compresses its momentum: gradients "
            "travel only while the variance is measured, which a codec's noise would raise. Write "
            "dat.compression.name='none', or another optimizer.",
        ),
        (
            one_bit("OneBitAdam", max_grad_norm=0.5),
            "optimizer.params.max_grad_norm=0.5 is refused, as DeepSpeed does: write "
            '"gradient_clipping": 0.5 at the top level.',
        ),
        (
            one_bit("ZeroOneAdam", amsgrad=True),
            "optimizer.params.amsgrad=True is refused: there is no such variant. Remove it.",
        ),
        (
            one_bit("OneBitAdam", eps_inside_sqrt=True),
            "optimizer.params.eps_inside_sqrt=True is refused: DeepSpeed never read it: eps is "
            "added to the root. Remove it.",
        ),
        (
            one_bit("OneBitAdam", freeze_steps=10),
            "optimizer.params.freeze_steps=10 is no parameter of 'OneBitAdam' (did you mean "
            "'freeze_step'?): remove it. It takes lr, freeze_step, betas, eps, weight_decay, "
            "bias_correction, preconditioned, block_size, scale, stability_threshold, "
            "eps_inside_sqrt, amsgrad, cuda_aware, comm_backend_name.",
        ),
        (
            one_bit("ZeroOneAdam", var_freeze_step=0),
            "optimizer.params.var_freeze_step=0 is not valid: write a number of at least 1.",
        ),
        (
            one_bit("OneBitAdam", lr="0.1"),
            "optimizer.params.lr='0.1' must be a finite number.",
        ),
        (
            one_bit("OneBitLamb", min_coeff=20.0),
            "optimizer.params.min_coeff=20.0 must lie in [0, max_coeff=10.0].",
        ),
        (
            {"dat": {"optimizer": {"name": "one_bit_adam", "var_freeze_step": 5}}},
            "dat.optimizer.var_freeze_step=5 is no setting of the optimizer 'one_bit_adam': remove "
            "it. It takes lr, freeze_step, betas, eps, weight_decay, bias_correction, "
            "preconditioned, block_size, scale, stability_threshold.",
        ),
        (
            {**ADAMW, "fp16": True},
            'fp16=True must be an object, such as "fp16": {"enabled": true}.',
        ),
        (
            {**ADAMW, "bf16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            "bf16 and torch_autocast are enabled together: enable one of them.",
        ),
        (
            {**ADAMW, "train_batch_size": "auto"},
            "train_batch_size='auto' is a value of Hugging Face's Trainer: write a number here.",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            "optimizer.params.lr='auto' is a value of Hugging Face's Trainer: write a number here.",
        ),
        (
            {**ADAMW, "zero_optimization": {"stage": 4}},
            "zero_optimization.stage=4 is not valid: write 0, 1, 2 or 3.",
        ),
        (
            {**ADAMW, "zero_optimization": {"stage": "two"}},
            "zero_optimization.stage='two' is not valid: write 0, 1, 2 or 3.",
        ),
        (
            {**ADAMW, "zero_optimization": 2},
            'zero_optimization=2 must be an object, such as "zero_optimization": {"stage": 2}.',
        ),
        (
            {**ADAMW, "scheduler": {"type": "WarmupLR"}},
            "Key 'scheduler' is refused: the learning rate follows dat.schedule: move it there.",
        ),
    ],
)
def test_a_mistake_gives_exactly_one_message_with_path_value_and_remedy(config, message):
    (problem,) = problems(config)
    assert problem == message if message.endswith(".") else problem.startswith(message)


@pytest.mark.parametrize("key", _REFUSED_KEYS)
def test_every_refused_key_is_one_of_deepspeeds_and_says_why(key):
    assert key in TOP_LEVEL_KEYS
    assert problems({**ADAMW, key: {}}) == [f"Key {key!r} is refused: {_REFUSED_KEYS[key]}."]


def test_all_problems_are_reported_at_once():
    config = {
        "gradiant_clipping": 1,
        "fp16": {"enabled": True, "auto_cast": True},
        "zero_optimization": {"stage": 0, "reduce_bucket_size": "auto"},
        "dat": {
            "threat_model": {"eps": 8},
            "attack": {"stpes": 3, "restarts": 0},
            "model": {"mean": [0.5]},
            "evaluation": {"attacks": ["x", "y"]},
        },
    }
    found = problems(config)
    assert len(found) == 10
    for part in [
        "gradiant_clipping",
        "fp16.auto_cast",
        "reduce_bucket_size='auto'",
        "dat.threat_model.eps=8",
        "dat.attack.stpes (did you mean 'steps'?)",
        "dat.attack.restarts=0",
        "dat.model.std",
        "dat.evaluation.attacks[0]",
        "dat.evaluation.attacks[1]",
        "No optimizer",
    ]:
        assert sum(part in problem for problem in found) == 1, part


def test_a_config_error_is_a_user_error_and_a_value_error():
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)


def test_a_client_optimizer_scales_its_own_learning_rate():
    config = {"dat": {"schedule": {"scaling": "linear", "base_batch": 256}}}
    assert problems(config, client_optimizer=True) == [
        "dat.schedule.scaling='linear' with initialize(optimizer=...): scale its own lr instead."
    ]


def test_a_client_optimizer_stands_in_for_the_configs_and_excludes_it():
    assert load_config({}, client_optimizer=True).dat.optimizer is None
    assert problems(ADAMW, client_optimizer=True) == [
        "'optimizer' and initialize(optimizer=...) are given together: keep one of them."
    ]


# ---- files


def test_a_file_is_read_like_its_content(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(ours(attack={"steps": 7})), encoding="utf-8")
    assert load_config(path) == load_config(str(path)) == load_config(ours(attack={"steps": 7}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b" 2}', r"run\.json, line 2, column 6: not valid JSON \(Expecting ':'"),
        ("[1]", r"run\.json: the run config must be a JSON object\."),
        (
            '{"dat": {"seed": 1, "seed": 2}}',
            r"Keys given twice in the run config: seed\.",
        ),
    ],
)
def test_a_broken_file_says_where(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"Cannot read the run config '.*nothing\.json': .*No such"
    ):
        load_config(tmp_path / "nothing.json")


# ---- precedence and overrides


def test_precedence_is_defaults_then_json_then_overrides():
    defaults = ours(attack={"steps": 1, "restarts": 1, "loss": "ce"}, seed=1)
    del defaults["optimizer"]
    config = ours(attack={"steps": 2, "restarts": 2})
    run = load_config(config, defaults=defaults, overrides=["dat.attack.steps=3"])
    assert run.dat.attack.steps == 3
    assert run.dat.attack.restarts == 2
    assert run.dat.seed == 1
    assert load_config(config).dat.seed == 0


def test_overrides_are_json_or_else_text_and_the_last_one_wins():
    run = load_config(
        ADAMW,
        overrides=[
            "dat.threat_model.eps=4/255",
            "dat.attack.random_start=false",
            'dat.model.options={"a": [1]}',
            "dat.output_dir=a=b",
            "train_batch_size=32",
            "dat.seed=1",
            "dat.seed=2",
        ],
    )
    assert run.dat.threat_model.eps == 4 / 255
    assert run.dat.attack.random_start is False
    assert run.dat.model.options == {"a": [1]}
    assert run.dat.output_dir == "a=b"
    assert run.deepspeed["train_batch_size"] == 32
    assert run.dat.seed == 2


@pytest.mark.parametrize("override", ["dat.seed", "=3", "dat..seed=3", ".seed=3"])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match=r"is not 'dotted\.key=value', as in dat\.attack\.steps"):
        load_config(ADAMW, overrides=[override])


def test_an_override_below_a_value_names_what_is_no_section():
    with pytest.raises(ConfigError, match=r"--set 'dat\.seed\.x=1': dat\.seed is no section"):
        load_config(ours(seed=3), overrides=["dat.seed.x=1"])


def test_loading_leaves_the_given_config_alone():
    config = {**ours(attack={"steps": 3}), "zero_optimization": {"stage": 2}}
    before = copy.deepcopy(config)
    load_config(config, overrides=["dat.attack.steps=5", "zero_optimization.stage=1"])
    assert config == before


# ---- combinations that make no sense


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"attack": {"name": "fgsm"}, "threat_model": {"norm": "l1", "eps": 12}},
            "dat.attack.name='fgsm' takes a sign step, which dat.threat_model.norm='l1' has not: ",
        ),
        (
            {"attack": {"name": "n_fgsm"}, "threat_model": {"norm": "l2", "eps": 0.5}},
            "dat.attack.name='n_fgsm' is defined for dat.threat_model.norm='linf', not 'l2': ",
        ),
        (
            {"attack": {"loss": "kl", "random_start": False}},
            "dat.attack.loss='kl' with dat.attack.name='pgd' and no random start: ",
        ),
        (
            {"attack": {"name": "apgd", "loss": "kl"}},
            "dat.attack.loss='kl' with dat.attack.name='apgd': APGD has no such loss; ",
        ),
        (
            {"attack": {"loss": "dlr-targeted"}},
            "dat.attack.loss='dlr-targeted' belongs to dat.attack.name='apgd', not 'pgd': ",
        ),
        (
            {"attack": {"loss": "dlr"}, "model": {"num_classes": 2}},
            "dat.attack.loss='dlr' compares the 3 largest logits, but there are 2 classes: ",
        ),
        (
            {"evaluation": {"attacks": ["apgd-t-100"]}, "data": {"num_classes": 3}},
            "dat.evaluation: 'apgd-t-100' compares the largest logits, but there are 3 classes: ",
        ),
        (
            {"attack": {"name": "n_fgsm", "steps_from": 2}},
            "dat.attack.steps_from=2 makes no sense for 'n_fgsm', which takes one step: remove it.",
        ),
        (
            {"attack": {"name": "multi_norm"}},
            "dat.attack.other_norms=None names no further norm: write such as ",
        ),
        (
            {"attack": {"name": "multi_norm", "other_norms": {"linf": 1}}},
            "dat.attack.other_norms.linf=1: the further norms are l2, l1; ",
        ),
        (
            {"attack": {"name": "multi_norm", "other_norms": {"l2": "x"}}},
            "dat.attack.other_norms.l2='x': 'x' is not a length",
        ),
        (
            {"attack": {"name": "pgd", "extra_steps": 1}},
            "dat.attack.extra_steps=1 is no setting of the attack 'pgd': remove it. It takes ",
        ),
        (
            {"objective": {"beta": 6}},
            "dat.objective.beta=6.0 is no setting of the objective 'at': remove it. It takes ",
        ),
        (
            {"objective": {"name": "trades"}, "attack": {"name": "none"}},
            "dat.objective.name='trades' compares natural and adversarial images, but ",
        ),
        (
            {"objective": {"name": "hat"}},
            "dat.objective.helper_model is missing: 'hat' needs the run folder or checkpoint ",
        ),
        (
            {"objective": {"helper_model": "runs/x"}},
            "dat.objective.helper_model='runs/x' belongs to the objective 'hat': remove it.",
        ),
        (
            {"weight_perturbation": {"name": "awp"}, "attack": {"name": "none"}},
            "dat.weight_perturbation.name='awp' perturbs weights against adversarial images, but ",
        ),
        (
            {"guard": {"action": "stop"}, "attack": {"name": "none"}},
            "dat.guard.action='stop' compares the training attack with a stronger one in the same ",
        ),
        (
            {"guard": {"action": "stop"}, "attack": {"name": "free"}},
            "dat.guard.action='stop' compares the training attack with a stronger one in the same ",
        ),
        (
            {"attack": {"name": "free", "keep_tokens": 0.5}},
            "dat.attack.keep_tokens=0.5 makes the attack cheaper than the update, of which ",
        ),
        (
            {"attack": {"name": "free", "precision": "bf16"}},
            "dat.attack.precision='bf16' makes the attack cheaper than the update, of which ",
        ),
        (
            {"attack": {"fold_batch_norm": True, "model_mode": "train"}},
            "dat.attack.fold_batch_norm=true with dat.attack.model_mode='train': batch statistics ",
        ),
        (
            {"attack": {"keep_tokens": 0.5}, "engine": {"compile": "attack"}},
            "dat.engine.compile='attack' with dat.attack.keep_tokens, which changes the model ",
        ),
        (
            {"engine": {"cuda_graphs": True}, "attack": {"name": "fat"}},
            "dat.engine.cuda_graphs=true with the attack 'fat', which leaves decisions ",
        ),
        (
            {"engine": {"cuda_graphs": True}, "attack": {"precision": "fp16"}},
            "dat.engine.cuda_graphs=true with the attack's precision 'fp16', which leaves ",
        ),
        (
            {"engine": {"attack_micro_batches": 2}},
            "dat.engine.attack_micro_batches=2 does not divide gradient_accumulation_steps=1: ",
        ),
        (
            {"objective": {"name": "dat", "batch_norm": "split"}, "engine": {"compile": "all"}},
            "dat.engine.compile='all' with dat.objective.batch_norm, which changes the model ",
        ),
        (
            {"attack": {"name": "free", "steps": 3}},
            "dat.attack.steps=3 is no setting of the attack 'free': remove it. It takes step_size",
        ),
        (
            {"data": {"mixup": 0.2}, "attack": {"loss": "dlr"}},
            "dat.data.mixup=0.2 makes labels probabilities, but dat.attack.loss='dlr' needs a ",
        ),
        (
            {"data": {"cutmix": 1}, "objective": {"name": "mart"}},
            "dat.data.cutmix=1 makes labels probabilities, but dat.objective.name='mart' needs a ",
        ),
        (
            {
                "data": {"mixup": 0.2, "labelled_fraction": 0.5},
                "objective": {"name": "trades"},
            },
            "dat.data.mixup=0.2 makes labels probabilities, but unlabelled images have none to mix",
        ),
        (
            {"data": {"drop_unlabelled": True}},
            "dat.data.drop_unlabelled=true has nothing to drop: write dat.data.labelled_fraction",
        ),
        (
            {"data": {"pseudo_labels": "runs/x"}},
            "dat.data.pseudo_labels='runs/x' concerns unlabelled images, but there are none: ",
        ),
        (
            {"objective": {"unlabelled_weight": 0.5}},
            "dat.objective.unlabelled_weight=0.5 concerns unlabelled images, but there are none: ",
        ),
        (
            {"data": {"labelled_fraction": 0.1}},
            "dat.data.labelled_fraction=0.1: dat.objective.name='at' has no use for images ",
        ),
        (
            {"data": {"unlabelled_path": "more"}, "objective": {"name": "alp"}},
            "dat.data.unlabelled_path='more': dat.objective.name='alp' has no use for images ",
        ),
        (
            {
                "data": {"labelled_fraction": 0.1},
                "objective": {"name": "trades"},
                "attack": {"name": "fat"},
            },
            "dat.data.labelled_fraction=0.1: dat.attack.name='fat' with loss 'kl' needs labels. ",
        ),
        (
            {
                "data": {"labelled_fraction": 0.1},
                "objective": {"name": "trades"},
                "attack": {"loss": "ce"},
            },
            "dat.data.labelled_fraction=0.1: dat.attack.name='pgd' with loss 'ce' needs labels. ",
        ),
        (
            {"attack": {"name": "pgd", "replays": 4}},
            "dat.attack.replays=4 is no setting of the attack 'pgd': remove it. It takes steps",
        ),
        (
            {"objective": {"name": "rotation"}, "model": {"num_classes": 4}},
            "dat.model.num_classes=4 with dat.objective.name='rotation', which learns no classes: ",
        ),
        (
            {"objective": {"name": "rotation"}, "evaluation": {"natural_twin": True}},
            "dat.evaluation.natural_twin=true with dat.objective.name='rotation': ",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "none"}},
            "dat.objective.name='fare' compares natural and adversarial images, but ",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "fgsm"}},
            "dat.objective.name='fare' with dat.attack.name='fgsm' and no random start: ",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"loss": "dlr"}},
            "dat.attack.loss='dlr' is a loss of class logits, which dat.objective.name=",
        ),
        ({"attack": {"loss": "nt_xent"}}, "dat.attack.loss='nt_xent' belongs to dat.objective."),
        (
            {"objective": {"name": "fare"}, "attack": {"loss": "nt_xent"}},
            "dat.attack.loss='nt_xent' belongs to dat.objective.name='contrastive', not 'fare'",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"name": "apgd"}},
            "dat.attack.name='apgd' looks at which images are misclassified, and ",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "fat"}},
            "dat.attack.name='fat' looks at which images are misclassified, and ",
        ),
        (
            {
                "objective": {"name": "fare"},
                "attack": {"name": "multi_norm", "other_norms": {"l2": 1}},
            },
            "dat.attack.name='multi_norm' looks at which images are misclassified, and ",
        ),
        (
            {
                "objective": {"name": "contrastive"},
                "attack": {
                    "name": "multi_norm",
                    "other_norms": {"l2": 1},
                    "combine": "average",
                },
            },
            "dat.attack.name='multi_norm' with dat.objective.name='contrastive': images of one ",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"restarts": 2}},
            "dat.attack.restarts=2 keeps the worst of several runs, a misclassified image first",
        ),
        (
            {"objective": {"name": "contrastive", "grad_align": 0.2}},
            "dat.objective.grad_align=0.2 aligns gradients of the classes' cross-entropy, which ",
        ),
        (
            {"objective": {"name": "contrastive"}, "guard": {"action": "stop"}},
            "dat.guard.action='stop' compares accuracies, which ",
        ),
        (
            {"objective": {"name": "contrastive"}, "evaluation": {"attacks": ["apgd-ce-20"]}},
            "dat.evaluation: 'apgd-ce-20' looks for misclassified images, and ",
        ),
        (
            {"objective": {"name": "fare"}, "evaluation": {"validation_attack": "pgd-9-2"}},
            "dat.evaluation: 'pgd-9-2' looks for misclassified images, and dat.objective.name=",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "free"}},
            "dat.objective.name='fare' with dat.attack.name='free' and no random start: ",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"name": "free"}},
            "dat.attack.name='free' with dat.objective.name='contrastive': every step sees other ",
        ),
        (
            {"objective": {"name": "rotation"}, "data": {"mixup": 0.2}},
            "dat.data.mixup=0.2 concerns labels, which dat.objective.name='rotation' does not read",
        ),
        (
            {
                "objective": {"name": "fare", "unlabelled_weight": 2},
                "data": {"labelled_fraction": 0.5},
            },
            "dat.objective.unlabelled_weight=2.0 concerns labels, which dat.objective.name='fare' ",
        ),
        (
            {"objective": {"name": "contrastive", "beta": 1}},
            "dat.objective.beta=1.0 is no setting of the objective 'contrastive': remove it.",
        ),
    ],
)
def test_a_combination_without_sense_is_refused_with_the_reason(sections, message):
    (problem,) = problems(ours(**sections))
    assert problem.startswith(message), problem


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"attack": {"name": "free"}}, "the attack 'free', which is the training step itself"),
        (
            {"attack": {"model_mode": "train"}},
            "dat.attack.model_mode='train', whose BatchNorm and dropout go by the batch",
        ),
        (
            {"objective": {"name": "contrastive"}},
            "the objective 'contrastive', which compares the images of a batch",
        ),
    ],
)
def test_micro_batches_are_not_attacked_together_where_it_would_be_another_attack(
    sections, message
):
    together = {"engine": {"attack_micro_batches": 2}}
    config = {**ours(**sections, **together), "gradient_accumulation_steps": 4}
    (problem,) = problems(config)
    assert problem == f"dat.engine.attack_micro_batches=2 with {message}: remove one of them."
    load_config({**ours(**together, attack={"name": "none"}), "gradient_accumulation_steps": 3})


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        (
            {"name": "int9"},
            "dat.compression.name='int9' is not valid (did you mean 'int8'?). Write one of ",
        ),
        (
            {"sides": "single"},
            "dat.compression.sides='single' is no setting of 'none': remove it. Write a codec.",
        ),
        (
            {"name": "int8", "levels": 7},
            "dat.compression.levels=7 is no setting of 'int8': remove it. "
            "It takes block_size, sides, error_feedback, bucket_mb.",
        ),
        (
            {"name": "natural", "block_size": 64},
            "dat.compression.block_size=64 is no setting of 'natural': remove it. "
            "It takes sides, error_feedback, bucket_mb.",
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
        (0, {"compile": {"deepcompile": True}}, "compile.deepcompile"),
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


# ---- resolution


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", get_args(schema.CodecName))
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
        assert section == {**codec_options(name), **general}


def test_the_names_in_the_schema_are_those_that_can_be_built():
    assert set(get_args(schema.AttackName)) == {*ATTACKS, "free", "none"}
    assert get_args(schema.ObjectiveName) == tuple(OBJECTIVES)
    assert get_args(schema.OptimizerName) == tuple(OPTIMIZERS)
    for presets in PRESETS.values():
        hint = typing.get_type_hints(schema.OptimizerConfig)["preset"]
        assert get_args(get_args(hint)[0]) == tuple(presets)
    assert get_args(schema.Norm) == NORMS
    assert get_args(schema.CodecName) == ("none", *CODECS)
    assert set(get_args(schema.InnerLossName)) == {*INNER_LOSSES, "dlr-targeted"}


@pytest.mark.parametrize(
    ("objective", "attack", "loss"),
    [
        ("at", {}, "ce"),
        ("trades", {}, "kl"),
        ("hat", {}, "kl"),
        ("trades", {"loss": "ce"}, "ce"),
        ("trades", {"name": "apgd"}, "ce"),
        ("trades", {"name": "fgsm"}, "ce"),
        ("trades", {"name": "n_fgsm"}, "kl"),
        ("mart", {"name": "fat"}, "ce"),
        ("rotation", {}, "ce"),
        ("contrastive", {"name": "mim"}, "nt_xent"),
        ("fare", {}, "feature_distance"),
    ],
)
def test_the_inner_loss_follows_the_objective_where_the_attack_can(objective, attack, loss):
    section = {"name": objective} | ({"helper_model": "x"} if objective == "hat" else {})
    assert load_config(ours(objective=section, attack=attack)).dat.attack.loss == loss


def test_natural_contrastive_training_has_one_term():
    natural = load_config(ours(objective={"name": "contrastive"}, attack={"name": "none"}))
    assert natural.dat.objective.natural_weight == 0.0
    assert load_config(ours(objective={"name": "contrastive"})).dat.objective.natural_weight == 1.0


@pytest.mark.parametrize("objective", ["rotation", "contrastive", "fare"])
def test_self_supervised_training_takes_unlabelled_images(objective):
    load_config(ours(objective={"name": objective}, data={"labelled_fraction": 0.1}))


def test_nothing_is_guarded_where_there_is_no_accuracy():
    run = load_config(ours(objective={"name": "contrastive"}, attack={"name": "fgsm"}))
    assert run.dat.guard.action == "none"


@pytest.mark.parametrize(
    ("attack", "action"),
    [("fgsm", "rollback"), ("n_fgsm", "rollback"), ("pgd", "none"), ("none", "none")],
)
def test_single_step_training_is_guarded_unless_told_otherwise(attack, action):
    assert load_config(ours(attack={"name": attack})).dat.guard.action == action
    off = ours(attack={"name": attack}, guard={"action": "none"})
    assert load_config(off).dat.guard.action == "none"


def test_the_default_attack_is_pgd_10_of_a_quarter_of_eps_at_8_255():
    run = load_config(ADAMW)
    attack = run.dat.attack
    assert (attack.name, attack.steps, attack.random_start) == ("pgd", 10, True)
    assert str(run.dat.threat_model.eps) == "8/255"
    assert str(attack.step_size) == "2/255"
    assert attack.step_size == 2 / 255
    assert run.dat.objective.natural_weight == 0.0


@pytest.mark.parametrize(
    ("attack", "eps", "step"),
    [
        ({"name": "fgsm"}, "8/255", "8/255"),
        ({"name": "fgsm", "random_start": True}, "8/255", "10/255"),
        ({"name": "pgd"}, "2/255", "0.5/255"),
        ({"name": "pgd"}, 0.5, 0.125),
        ({"name": "pgd", "step_size": "1/255"}, "8/255", "1/255"),
    ],
)
def test_the_step_size_is_written_as_eps_is(attack, eps, step):
    run = load_config(ours(attack=attack, threat_model={"eps": eps}))
    assert run.to_dict()["dat"]["attack"]["step_size"] == step
    assert run.dat.attack.step_size == Length(step)


def test_dat_weighs_the_natural_loss_by_one_unless_told():
    weights = [
        load_config(ours(objective=objective)).dat.objective.natural_weight
        for objective in ({"name": "dat"}, {"name": "dat", "natural_weight": 0.5}, {"name": "at"})
    ]
    assert weights == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_our_optimizers_defaults_are_written_out_and_the_users_values_kept(name):
    fields = {field.name for field in dataclasses.fields(schema.OptimizerConfig)}
    options = optimizer_options(name)
    assert options.keys() < fields
    written = load_config({"dat": {"optimizer": {"name": name}}}).to_dict()["dat"]["optimizer"]
    assert written == {**dict.fromkeys(fields), **options, "name": name}
    assert json.loads(json.dumps(written)) == written
    own = load_config({"dat": {"optimizer": {"name": name, "lr": 3.0}}}).dat.optimizer
    assert (own.lr, own.weight_decay) == (3.0, options["weight_decay"])


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


@pytest.mark.parametrize("kind", ONE_BIT_OPTIMIZERS)
def test_deepspeeds_removed_optimizers_are_ours_with_its_defaults_and_a_note(kind):
    name, defaults = ONE_BIT_OPTIMIZERS[kind]
    run = load_config({**one_bit(kind, lr=0.5), "gradient_clipping": 0})
    assert run.deepspeed["optimizer"]["params"] == {**defaults, "lr": 0.5}
    assert one_bit_name(run.deepspeed) == name
    assert set(one_bit_options(run.deepspeed)) < set(optimizer_options(name))
    assert run.notes == (
        f"optimizer.type={kind!r} is dat_ds's own {name!r}: DeepSpeed removed its optimizer in "
        "0.19.7",
    )


def test_what_is_not_used_of_their_parameters_and_local_clipping_are_said():
    run = load_config(one_bit("OneBitAdam", cuda_aware=True, comm_backend_name="mpi"))
    _, unused, clipping = run.notes
    assert unused == (
        "optimizer.params.cuda_aware and comm_backend_name are not used: collectives are those of "
        "torch.distributed"
    )
    assert clipping == (
        "gradient_clipping=1.0 acts on each rank's own gradient where no gradient is averaged: "
        "once the variance is frozen"
    )
    ours_alone = load_config({"dat": {"optimizer": {"name": "one_bit_lamb"}}})
    assert ours_alone.notes == (clipping,)


@pytest.mark.parametrize("written", ["auto", None])
def test_an_automatic_freeze_is_null_in_the_resolved_config(written):
    run = load_config(one_bit("OneBitAdam", freeze_step=written))
    assert run.deepspeed["optimizer"]["params"]["freeze_step"] is None
    assert load_config(run.to_dict()) == run


def test_an_optimizer_of_ours_is_allowed_under_zero():
    for stage, allowed in [(0, None), (1, True), (3, True)]:
        config = {"zero_optimization": {"stage": stage}, "dat": {"optimizer": {"name": "sgd"}}}
        assert load_config(config).deepspeed.get("zero_allow_untested_optimizer") is allowed


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


ROUND_TRIPS = [
    ours(),
    ours(attack={"name": "fgsm", "random_start": True}),
    ours(attack={"name": "none"}),
    ours(threat_model={"eps": 0}),
    ours(threat_model={"eps": "0/255"}, attack={"name": "fgsm"}),
    ours(threat_model={"norm": "l2", "eps": "128/255"}, objective={"name": "dat"}),
    ours(model={"mean": [0.5], "std": [0.2], "options": {"a": {"b": 1}}}, output_dir="x"),
    {"dat": {"optimizer": {"name": "sgd"}}, "zero_optimization": True},
    {"dat": {"optimizer": {"name": "lamb"}}},
    {"dat": {"optimizer": {"name": "lars", "preset": "paper", "upper": 5}}},
    {**ADAMW, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    {**ADAMW, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_a_saved_config_loads_as_the_same_run(config):
    run = load_config(config)
    through_json = json.loads(json.dumps(run.to_dict()))
    assert load_config(through_json) == run
    assert load_config(through_json).to_dict() == run.to_dict() == through_json
    assert load_config(run) is run


@pytest.mark.parametrize("text", ["8/255", 0.03, "0.03", 1])
def test_a_length_prints_as_it_was_written_also_after_copies(text):
    length = Length(text)
    copies = [length, Length(length), copy.deepcopy(length), pickle.loads(pickle.dumps(length))]
    assert {str(c) for c in copies} == {repr(length)} == {str(text)}
    assert {float(c) for c in copies} == {float(length)}
    assert isinstance(length, float)


@pytest.mark.parametrize(
    ("name", "steps", "restarts"), [("pgd-20", 20, 1), ("pgd-50-10", 50, 10), ("pgd-1", 1, 1)]
)
def test_an_evaluation_attack_is_named_by_steps_and_restarts(name, steps, restarts):
    attack = parse_evaluation_attack(name)
    assert (attack.name, attack.steps, attack.restarts) == (name, steps, restarts)
    assert attack.step_size(0.1) == pytest.approx(0.25 / steps, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["pgd", "pgd-0", "pgd-10-0", "pgd-1.5", "PGD-10", "pgd-10-2-3", ""]
)
def test_anything_else_is_no_evaluation_attack(name):
    with pytest.raises(ValueError, match="is not an evaluation attack"):
        parse_evaluation_attack(name)


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
            "train_batch_size=10 is not train_micro_batch_size_per_gpu=4 x "
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


# ---- learning rate


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_the_learning_rate_is_scaled_to_the_global_batch_in_either_section(scaling, factor):
    schedule = {"scaling": scaling, "base_batch": 256}
    run = load_config({"dat": {"optimizer": {"name": "lamb", "lr": 0.5}, "schedule": schedule}})
    scaled, words = scale_learning_rate(run, 1024)
    assert scaled.dat.optimizer.lr == 0.5 * factor
    assert words == (
        f"Learning rate {0.5 * factor:g} = 0.5 x {factor:g}, scaled ({scaling}) from a global "
        "batch of 256 to 1024."
    )
    params = {"lr": 0.5, "muon_lr": 3.0, "momentum": 0.9}
    config = {"optimizer": {"type": "Muon", "params": params}, "dat": {"schedule": schedule}}
    run = load_config(config)
    scaled, _ = scale_learning_rate(run, 1024)
    expected = {"lr": 0.5 * factor, "muon_lr": 3.0 * factor, "momentum": 0.9}
    assert scaled.deepspeed["optimizer"]["params"] == expected
    assert run.deepspeed["optimizer"]["params"] == params, "what is saved is what was written"


def test_without_scaling_the_learning_rate_is_what_was_written():
    run = load_config(ADAMW)
    assert scale_learning_rate(run, 1024) == (run, "")


# ---- devices


def test_on_a_gpu_nothing_is_adapted():
    run = load_config(ADAMW)
    assert adapt_to_device(run, "cuda") is run


def test_on_a_cpu_torchs_adam_is_chosen_and_said():
    run = load_config(ADAMW)
    adapted = adapt_to_device(run, "cpu")
    assert adapted.deepspeed["optimizer"]["params"]["torch_adam"] is True
    assert adapted.deepspeed["optimizer"]["params"]["weight_decay"] == 0.0  # as on a GPU
    assert adapted.notes == (
        "optimizer.params.torch_adam=true: on a CPU DeepSpeed's is compiled first",
    )
    assert "torch_adam" not in run.deepspeed["optimizer"]["params"]
    assert adapt_to_device(adapted, "cpu") == adapted


def test_on_a_cpu_an_offloaded_optimizer_needs_no_compilation_either():
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "dat": {"optimizer": {"name": "adamw"}},
    }
    adapted = adapt_to_device(load_config(config), "cpu")
    assert adapted.deepspeed["zero_force_ds_cpu_optimizer"] is False
    assert adapted.notes == (
        "zero_force_ds_cpu_optimizer=false: offloaded states are updated by torch",
    )


def test_what_the_user_chose_for_the_cpu_is_kept_without_a_note():
    config = {"optimizer": {"type": "Adam", "params": {"torch_adam": False}}}
    run = adapt_to_device(load_config(config), "cpu")
    assert run.deepspeed["optimizer"]["params"]["torch_adam"] is False
    assert run.notes == ()
    sgd = load_config({"optimizer": {"type": "SGD"}})
    assert adapt_to_device(sgd, "cpu") == sgd


# ---- the tables agree with the installed DeepSpeed


def deepspeed_config_module() -> Any:
    pytest.importorskip("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed.runtime.config as module

    return module


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


def default_of(optimizer: Any, name: str) -> Any:
    return inspect.signature(optimizer).parameters[name].default


def implementations() -> list[tuple[str, dict[str, Any], Any]]:
    """What DeepSpeed builds for a name and its parameters."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    return [
        ("adam", {}, FusedAdam),
        ("adamw", {}, FusedAdam),
        ("adamw", {}, DeepSpeedCPUAdam),
        ("adam", {"torch_adam": True}, torch.optim.AdamW),
        ("adamw", {"torch_adam": True}, torch.optim.AdamW),
        ("adam", {"torch_adam": True, "adam_w_mode": False}, torch.optim.Adam),
        ("adamw", {"torch_adam": True, "adam_w_mode": False}, torch.optim.AdamW),
    ]


def test_our_adam_defaults_are_those_of_the_class_that_runs():
    for name, params, optimizer in implementations():
        assert adam_weight_decay(name, params) == default_of(optimizer, "weight_decay"), optimizer
        for key in ("lr", "betas", "eps"):
            default = OPTIMIZER_DEFAULTS[name][key]
            default = tuple(default) if isinstance(default, list) else default
            assert default == default_of(optimizer, key), (optimizer, key)


def test_our_sgd_defaults_are_torchs():
    for key, value in OPTIMIZER_DEFAULTS["sgd"].items():
        assert value == default_of(torch.optim.SGD, key), key


def test_adams_default_mode_is_deepspeeds():
    module = deepspeed_config_module()
    assert OPTIMIZER_DEFAULTS["adam"]["adam_w_mode"] is module.ADAM_W_MODE_DEFAULT


def test_a_recipes_options_go_with_its_model_alone() -> None:
    defaults = {"dat": {"model": {"name": "vit_tiny_patch16_224", "patch_size": 4}}}
    same = load_config(ours(), defaults=defaults, overrides=["dat.model.depth=2"]).dat.model
    assert (same.name, same.patch_size, same.depth) == ("vit_tiny_patch16_224", 4, 2)
    other = load_config(ours(), defaults=defaults, overrides=["dat.model.name=resnet18"])
    assert (other.dat.model.name, other.dat.model.patch_size) == ("resnet18", None)
