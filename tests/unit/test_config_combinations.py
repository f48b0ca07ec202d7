"""Claims about sections of run configs that make no sense together."""

from __future__ import annotations

import pytest

from dat_ds.config import load_config
from tests.unit.config_helpers import ours, problems


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
