"""Claims about sections of run configs that make no sense together."""

from __future__ import annotations

import pytest

from dat_ds.config import load_config
from tests.unit.config_helpers import ours, problems

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"attack": {"name": "fgsm"}, "threat_model": {"norm": "l1", "eps": 12}},
            "dat.attack.name='fgsm' is defined for the norms linf, l2, not 'l1', which "
            "has no sign step. Write name='pgd'.",
        ),
        (
            {"attack": {"name": "n_fgsm"}, "threat_model": {"norm": "l2", "eps": 0.5}},
            "dat.attack.name='n_fgsm' is defined for the norms linf, not 'l2'. Write name='pgd'.",
        ),
        (
            {"attack": {"loss": "kl", "random_start": False}},
            "dat.attack.loss='kl' has no gradient at the image itself, but "
            "dat.attack.name='pgd' without a random start starts at the image itself. "
            "Write ",
        ),
        (
            {"attack": {"name": "apgd", "loss": "kl"}},
            "dat.attack.loss='kl' is not valid with the attack 'apgd'. Write one of 'ce',"
            " 'cw', 'dlr', 'dlr-targeted'.",
        ),
        (
            {"attack": {"loss": "dlr-targeted"}},
            "dat.attack.loss='dlr-targeted' is not valid with the attack 'pgd'. Write one"
            " of 'ce', 'cw', 'dlr', 'kl', 'feature_distance', 'nt_xent'.",
        ),
        (
            {"attack": {"loss": "dlr"}, "model": {"num_classes": 2}},
            "dat.attack.loss='dlr' compares the 3 largest logits, but there are 2 classes: ",
        ),
        (
            {"evaluation": {"attacks": ["apgd-t-100"]}, "data": {"num_classes": 3}},
            "dat.evaluation: 'apgd-t-100' compares the 4 largest logits, and there are 3 classes: ",
        ),
        (
            {"evaluation": {"attacks": ["apgd-t-l1-100"]}},
            "dat.evaluation: 'apgd-t-l1-100' is for the norm l1, not linf: write 'apgd-t-100'.",
        ),
        (
            {"attack": {"name": "n_fgsm", "steps_from": 2}},
            "dat.attack.steps_from=2 is not a setting of the attack 'n_fgsm': remove it. It takes ",
        ),
        (
            {"attack": {"name": "multi_norm"}},
            "dat.attack.other_norms={} names no further norm: write such as {'l2': 0.5, 'l1': 12}.",
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
            "dat.attack.extra_steps=1 is not a setting of the attack 'pgd', but of fat: "
            "remove it. It takes ",
        ),
        (
            {"objective": {"beta": 6}},
            "dat.objective.beta=6 is not a setting of the objective 'at': remove it. It takes ",
        ),
        (
            {"objective": {"name": "trades"}, "attack": {"name": "none"}},
            "dat.objective.name='trades' needs adversarial images, but "
            "dat.attack.name='none' makes no adversarial images. Write ",
        ),
        (
            {"objective": {"name": "hat"}},
            "dat.objective.helper_model is missing: 'hat' needs the run folder or checkpoint ",
        ),
        (
            {"objective": {"helper_model": "runs/x"}},
            "dat.objective.helper_model='runs/x' is not a setting of the objective 'at', but"
            " of hat: remove it. It takes ",
        ),
        (
            {"weight_perturbation": {"name": "awp"}, "attack": {"name": "none"}},
            "dat.weight_perturbation.name='awp' needs adversarial images, but "
            "dat.attack.name='none' makes no adversarial images. Write ",
        ),
        (
            {"guard": {"action": "stop"}, "attack": {"name": "none"}},
            "dat.guard.action='stop' compares the attack with a stronger one in the same "
            "ball, but dat.attack.name='none' has no stronger attack in the same ball. "
            "Remove ",
        ),
        (
            {"guard": {"action": "stop"}, "attack": {"name": "free"}},
            "dat.guard.action='stop' compares the attack with a stronger one in the same "
            "ball, but dat.attack.name='free' has no stronger attack in the same ball. "
            "Remove ",
        ),
        (
            {"attack": {"name": "free", "keep_tokens": 0.5}},
            "dat.attack.keep_tokens=0.5 is not a setting of the attack 'free': remove it. It ",
        ),
        (
            {"attack": {"name": "free", "precision": "bf16"}},
            "dat.attack.precision='bf16' is not a setting of the attack 'free': remove it. It ",
        ),
        (
            {"attack": {"fold_batch_norm": True, "model_mode": "train"}},
            "dat.attack.fold_batch_norm=true with dat.attack.model_mode='train': batch statistics "
            "are known only in the forward. Write dat.attack.model_mode='eval'.",
        ),
        (
            {"attack": {"keep_tokens": 0.5}, "engine": {"compile": "attack"}},
            "dat.engine.compile='attack' compiles the model's forward, but "
            "dat.attack.keep_tokens=0.5 changes the model from call to call. Remove ",
        ),
        (
            {"engine": {"cuda_graphs": True}, "attack": {"name": "fat"}},
            "dat.engine.cuda_graphs=True records the attack and replays it, but "
            "dat.attack.name='fat' leaves decisions to the host. Remove ",
        ),
        (
            {"engine": {"cuda_graphs": True}, "attack": {"precision": "fp16"}},
            "dat.engine.cuda_graphs=True records the attack and replays it, but "
            "dat.attack.precision='fp16' leaves decisions to the host. Remove ",
        ),
        (
            {"engine": {"attack_micro_batches": 2}},
            "dat.engine.attack_micro_batches=2 does not divide gradient_accumulation_steps=1: ",
        ),
        (
            {"objective": {"name": "dat", "batch_norm": "split"}, "engine": {"compile": "all"}},
            "dat.engine.compile='all' compiles the update's forward, but "
            "dat.objective.batch_norm='split' gives each kind of image statistics of its "
            "own. Remove ",
        ),
        (
            {"attack": {"name": "free", "steps": 3}},
            "dat.attack.steps=3 is not a setting of the attack 'free': remove it. It takes ",
        ),
        (
            {"data": {"mixup": 0.2}, "attack": {"loss": "dlr"}},
            "dat.attack.loss='dlr' needs a true class, but dat.data.mixup=0.2 makes "
            "labels probabilities. Write ",
        ),
        (
            {"data": {"cutmix": 1}, "objective": {"name": "mart"}},
            "dat.objective.name='mart' needs a true class, but dat.data.cutmix=1.0 makes "
            "labels probabilities. Write ",
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
            "dat.data.pseudo_labels='runs/x' concerns unlabelled images, but "
            "dat.data.labelled_fraction=1 leaves no image unlabelled. Write ",
        ),
        (
            {"objective": {"unlabelled_weight": 0.5}},
            "dat.objective.unlabelled_weight=0.5 concerns unlabelled images, but "
            "dat.data.labelled_fraction=1 leaves no image unlabelled. Write ",
        ),
        (
            {"data": {"labelled_fraction": 0.1}},
            (
                (
                    "dat.attack.loss='ce' needs labels, but dat.data.labelled_fraction=0.1 leaves"
                    " images without labels. Write "
                ),
                (
                    "dat.objective.name='at' needs labels, but dat.data.labelled_fraction=0.1 "
                    "leaves images without labels. Write "
                ),
            ),
        ),
        (
            {"data": {"unlabelled_path": "more"}, "objective": {"name": "alp"}},
            (
                (
                    "dat.attack.loss='ce' needs labels, but dat.data.unlabelled_path='more' "
                    "leaves images without labels. Write "
                ),
                (
                    "dat.objective.name='alp' needs labels, but dat.data.unlabelled_path='more' "
                    "leaves images without labels. Write "
                ),
            ),
        ),
        (
            {
                "data": {"labelled_fraction": 0.1},
                "objective": {"name": "trades"},
                "attack": {"name": "fat"},
            },
            "dat.attack.name='fat' needs labels, but dat.data.labelled_fraction=0.1 "
            "leaves images without labels. Write ",
        ),
        (
            {
                "data": {"labelled_fraction": 0.1},
                "objective": {"name": "trades"},
                "attack": {"loss": "ce"},
            },
            "dat.attack.loss='ce' needs labels, but dat.data.labelled_fraction=0.1 leaves"
            " images without labels. Write ",
        ),
        (
            {"attack": {"name": "pgd", "replays": 4}},
            "dat.attack.replays=4 is not a setting of the attack 'pgd', but of free: remove "
            "it. It takes ",
        ),
        (
            {"objective": {"name": "rotation"}, "model": {"num_classes": 4}},
            "dat.model.num_classes=4 is for a model that learns classes, but "
            "dat.objective.name='rotation' learns no classes. Remove ",
        ),
        (
            {"objective": {"name": "rotation"}, "evaluation": {"natural_twin": True}},
            "dat.evaluation.natural_twin=True is for a model that learns classes, but "
            "dat.objective.name='rotation' learns no classes. Remove ",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "none"}},
            "dat.objective.name='fare' needs adversarial images, but "
            "dat.attack.name='none' makes no adversarial images. Write ",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "fgsm"}},
            "dat.objective.name='fare' has no gradient at the image itself, but "
            "dat.attack.name='fgsm' without a random start starts at the image itself. "
            "Write ",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"loss": "dlr"}},
            "dat.attack.loss='dlr' is a loss of class logits, but "
            "dat.objective.name='contrastive' knows no classes. Remove ",
        ),
        ({"attack": {"loss": "nt_xent"}}, "dat.attack.loss='nt_xent' belongs to dat.objective."),
        (
            {"objective": {"name": "fare"}, "attack": {"loss": "nt_xent"}},
            "dat.attack.loss='nt_xent' belongs to dat.objective.name='contrastive', not 'fare'",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"name": "apgd"}},
            "dat.attack.name='apgd' looks at which images are misclassified, but "
            "dat.objective.name='contrastive' knows no classes. Write ",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "fat"}},
            "dat.attack.name='fat' looks at which images are misclassified, but "
            "dat.objective.name='fare' knows no classes. Write ",
        ),
        (
            {
                "objective": {"name": "fare"},
                "attack": {"name": "multi_norm", "other_norms": {"l2": 1}},
            },
            "dat.attack.name='multi_norm' looks at which images are misclassified, but "
            "dat.objective.name='fare' knows no classes. Write ",
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
            "dat.attack.combine='average' trains on several perturbations of each image, "
            "but dat.objective.name='contrastive' compares the images of a batch with one"
            " another. Write ",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"restarts": 2}},
            "dat.attack.restarts=2 looks at which images are misclassified, but "
            "dat.objective.name='contrastive' knows no classes. Write ",
        ),
        (
            {"objective": {"name": "contrastive", "grad_align": 0.2}},
            "dat.objective.grad_align=0.2 is a loss of class logits, but "
            "dat.objective.name='contrastive' knows no classes. Remove ",
        ),
        (
            {"objective": {"name": "contrastive"}, "guard": {"action": "stop"}},
            "dat.guard.action='stop' compares accuracies, but "
            "dat.objective.name='contrastive' knows no classes. Remove ",
        ),
        (
            {"objective": {"name": "contrastive"}, "evaluation": {"attacks": ["apgd-ce-20"]}},
            "dat.evaluation: 'apgd-ce-20' looks at which images are misclassified, but "
            "dat.objective.name='contrastive' knows no classes. Write ",
        ),
        (
            {"objective": {"name": "fare"}, "evaluation": {"validation_attack": "pgd-9-2"}},
            "dat.evaluation: 'pgd-9-2' looks at which images are misclassified, but "
            "dat.objective.name='fare' knows no classes. Write ",
        ),
        (
            {"objective": {"name": "fare"}, "attack": {"name": "free"}},
            "dat.objective.name='fare' has no gradient at the image itself, but "
            "dat.attack.name='free' starts at the image itself. Write ",
        ),
        (
            {"objective": {"name": "contrastive"}, "attack": {"name": "free"}},
            "dat.attack.name='free' goes on with the perturbation of earlier steps, but "
            "dat.objective.name='contrastive' shows other views of each image in every "
            "step. Write ",
        ),
        (
            {"objective": {"name": "rotation"}, "data": {"mixup": 0.2}},
            "dat.data.mixup=0.2 concerns labels, but dat.objective.name='rotation' learns"
            " no classes. Remove ",
        ),
        (
            {
                "objective": {"name": "fare", "unlabelled_weight": 2},
                "data": {"labelled_fraction": 0.5},
            },
            "dat.objective.unlabelled_weight=2.0 concerns labels, but "
            "dat.objective.name='fare' learns no classes. Remove ",
        ),
        (
            {"objective": {"name": "contrastive", "beta": 1}},
            "dat.objective.beta=1 is not a setting of the objective 'contrastive': remove it. It "
            "takes ",
        ),
    ],
)
def test_a_combination_without_sense_is_refused_with_the_reason(sections, message):
    messages = message if isinstance(message, tuple) else (message,)
    found = problems(ours(**sections))
    assert len(found) == len(messages), found
    for problem, words in zip(found, messages, strict=True):
        assert problem.startswith(words), problem


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"attack": {"name": "free"}},
            "dat.attack.name='free' goes on with the perturbation of earlier steps. Remove one of "
            "them.",
        ),
        (
            {"attack": {"model_mode": "train"}},
            "dat.attack.model_mode='train' lets BatchNorm and dropout go by the batch "
            "that is attacked. Remove one of them.",
        ),
        (
            {"objective": {"name": "contrastive"}},
            "dat.objective.name='contrastive' compares the images of a batch with one "
            "another. Remove one of them.",
        ),
    ],
)
def test_micro_batches_are_not_attacked_together_where_it_would_be_another_attack(
    sections, message
):
    together = {"engine": {"attack_micro_batches": 2}}
    config = {**ours(**sections, **together), "gradient_accumulation_steps": 4}
    (problem,) = problems(config)
    assert problem == (
        "dat.engine.attack_micro_batches=2 attacks several micro-batches as one, but " + message
    )
    load_config({**ours(**together, attack={"name": "none"}), "gradient_accumulation_steps": 3})
