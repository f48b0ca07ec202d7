"""Claims about mistakes in run configs: one message each, with path, value and remedy."""

from __future__ import annotations

import math

import pytest

from dat_ds.config.deepspeed.keys import TOP_LEVEL_KEYS
from dat_ds.config.deepspeed.resolve import _REFUSED_KEYS
from dat_ds.errors import ConfigError, UserError
from tests.unit.config_helpers import ADAMW, one_bit, ours, problems

pytestmark = pytest.mark.fast

NVME = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}


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
            "overfitting, numerics, optimizer, finetuning, schedule, ema, compression, evaluation, "
            "checkpoint, fault, logging, engine, seed, output_dir.",
        ),
        (
            ours(ema={"decya": 0.9}),
            "Unknown key in the run config: dat.ema.decya (did you mean 'decay'?). "
            "Valid keys of 'dat.ema': decay.",
        ),
        (
            ours(threat_model={"eps": 8}),
            "dat.threat_model.eps=8 exceeds the pixel range [0.0, 1.0]. It looks like "
            "0-255 units: write '8/255'.",
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
            "dat.attack.name='pdg' is not valid (did you mean 'pgd'?). Write one of 'pgd', ",
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
            "dat.attack.steps=3 is not a setting of the attack 'fgsm': remove it. It takes "
            "precision, fold_batch_norm, "
            "resolution, keep_tokens, eps_warmup, model_mode, step_size, random_start, "
            "restarts, loss.",
        ),
        (ours(attack=[]), "dat.attack=[] must be an object such as {'name': 'pgd'}."),
        (ours(seed=None), "dat.seed=None must be an integer."),
        (ours(output_dir=3), "dat.output_dir=3 must be a string."),
        ({"dat": {"optimizer": {"lr": "x"}}}, "dat.optimizer.lr='x' must be a finite number."),
        (
            {"dat": {"optimizer": {"name": "sgd", "betas": [0.9, 0.99]}}},
            "dat.optimizer.betas=[0.9, 0.99] is not a setting of the optimizer 'sgd': remove it. "
            "It takes"
            " lr, weight_decay, momentum, nesterov.",
        ),
        (
            {"dat": {"optimizer": {"betas": [0.9]}}},
            "dat.optimizer.betas=[0.9] is not valid: write two numbers in [0, 1).",
        ),
        (
            {"dat": {"optimizer": {"name": "adamw", "preset": "paper"}}},
            "dat.optimizer.preset='paper' is not a setting of the optimizer 'adamw', but of "
            "lamb, lars: remove it. It takes lr, weight_decay, betas, eps.",
        ),
        (
            {"dat": {"optimizer": {"name": "lamb", "lower": 2, "upper": 1}}},
            "dat.optimizer.upper=1.0 must be above 0 and at least lower=2.0.",
        ),
        (
            {"dat": {"optimizer": {"name": "sgd", "momentum": 0, "nesterov": True}}},
            "dat.optimizer.name='sgd': Nesterov momentum requires a momentum and zero dampening",
        ),
        (
            {"dat": {"optimizer": {"name": "lamb"}}, "zero_optimization": NVME},
            "zero_optimization.offload_optimizer.device='nvme' with a layer-wise optimizer: it "
            "needs all shards of a step before any is updated, but this moves them "
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
            "dat.schedule.scaling='sqrt' and dat.schedule.base_batch=None go together: "
            "write 'linear' or 'sqrt' and the global batch that the learning rate is for, such as "
            "256, or neither.",
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
            "dat.schedule.warmup_epochs=5 must be below dat.schedule.epochs=5, of which it is a "
            "part.",
        ),
        (
            ours(schedule={"milestones": [0.5]}),
            "dat.schedule.milestones=[0.5] is not a setting of the schedule 'cosine', but of step: "
            "remove it. It takes epochs, warmup_epochs, scaling, base_batch, max_steps, "
            "final_ratio.",
        ),
        (
            ours(schedule={"name": "step", "milestones": [0.7, 0.5]}),
            "dat.schedule.milestones=[0.7, 0.5] is not valid: "
            "write increasing fractions of the run in (0, 1).",
        ),
        (
            ours(evaluation={"attacks": ["pgd-20", "pgd20"]}),
            "dat.evaluation.attacks[1]: 'pgd20' is not an evaluation attack: write METHOD-STEPS "
            "or METHOD-STEPS-RESTARTS, such as 'pgd-20' or 'pgd-50-10'; methods are pgd, apgd-ce, "
            "apgd-dlr, apgd-t, apgd-ce-l1, apgd-t-l1, fab, fab-t, square, apgd-cw, apgd-pm, malt, "
            "apgd-square.",
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
            "optimizer.params.freeze_steps=10 is not a parameter of 'OneBitAdam' (did you "
            "mean 'freeze_step'?): remove it. It takes lr, weight_decay, betas, eps, "
            "bias_correction, preconditioned, block_size, scale, freeze_step, "
            "stability_threshold, eps_inside_sqrt, amsgrad, cuda_aware, "
            "comm_backend_name.",
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
            "dat.optimizer.var_freeze_step=5 is not a setting of the optimizer "
            "'one_bit_adam', but of zero_one_adam: remove it. It takes lr, weight_decay, "
            "betas, eps, bias_correction, preconditioned, block_size, scale, freeze_step,"
            " stability_threshold.",
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
