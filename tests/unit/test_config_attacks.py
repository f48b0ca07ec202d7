"""Claims about what run configs say of attacks, objectives and their evaluation."""

from __future__ import annotations

import re

import pytest

from dat_ds.config import Length, load_config, parse_evaluation_attack
from tests.unit.config_helpers import ADAMW, ours

pytestmark = pytest.mark.fast

# ---- defaults that follow from other settings


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
        ({"name": "pgd", "step_size": "eps/4"}, "6/255", "1.5/255"),
        ({"name": "n_fgsm", "step_size": "1.25 eps"}, "8/255", "10/255"),
        ({"name": "pgd", "step_size": "2.5 eps/20"}, 0.5, 0.0625),
    ],
)
def test_the_step_size_is_written_as_eps_is(attack, eps, step):
    run = load_config(ours(attack=attack, threat_model={"eps": eps}))
    assert run.to_dict()["dat"]["attack"]["step_size"] == step
    assert run.dat.attack.step_size == Length(step)


@pytest.mark.parametrize(
    ("attack", "eps", "note"),
    [
        ({"steps": 3, "step_size": "2/255"}, "8/255", "3 steps do not reach .* write 'eps/3'"),
        ({"name": "fgsm", "step_size": "2/255"}, "8/255", "it does not reach .* write 'eps'"),
        ({"steps": 3, "step_size": "4/255"}, "2/255", "is longer than the radius 2/255"),
    ],
)
def test_a_step_that_does_not_suit_the_ball_is_noted(attack, eps, note):
    run = load_config(ours(attack=attack, threat_model={"eps": eps}))
    (found,) = run.notes
    assert found.startswith(f"dat.attack.step_size={attack['step_size']}")
    assert re.search(note, found)


@pytest.mark.parametrize("attack", [{}, {"name": "fgsm_rs"}, {"name": "zero_grad"}, {"steps": 4}])
def test_usual_steps_are_not_noted(attack):
    assert load_config(ours(attack=attack)).notes == ()


def test_dat_weighs_the_natural_loss_by_one_unless_told():
    weights = [
        load_config(ours(objective=objective)).dat.objective.natural_weight
        for objective in ({"name": "dat"}, {"name": "dat", "natural_weight": 0.5}, {"name": "at"})
    ]
    assert weights == [1.0, 0.5, 0.0]


# ---- evaluation attacks


@pytest.mark.parametrize(
    ("name", "steps", "restarts"), [("pgd-20", 20, 1), ("pgd-50-10", 50, 10), ("pgd-1", 1, 1)]
)
def test_an_evaluation_attack_is_named_by_steps_and_restarts(name, steps, restarts):
    attack = parse_evaluation_attack(name)
    assert (attack.name, attack.steps, attack.restarts) == (name, steps, restarts)
    assert attack.step_size(0.1) == pytest.approx(0.25 / steps, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "method", "targets", "classes"),
    [
        ("apgd-ce-l1-100-5", "apgd-ce-l1", 0, 2),
        ("apgd-t-l1-100", "apgd-t-l1", 5, 4),
        ("apgd-t-100", "apgd-t", 9, 4),
        ("fab-t-100", "fab-t", 9, 2),
        ("fab-100-5", "fab", 0, 2),
        ("square-5000", "square", 0, 2),
    ],
)
def test_an_evaluation_attack_has_its_method_and_targets(name, method, targets, classes):
    attack = parse_evaluation_attack(name)
    assert (attack.method, attack.num_targets, attack.needed_classes) == (method, targets, classes)


@pytest.mark.parametrize(
    "name", ["pgd", "pgd-0", "pgd-10-0", "pgd-1.5", "PGD-10", "pgd-10-2-3", ""]
)
def test_anything_else_is_no_evaluation_attack(name):
    with pytest.raises(ValueError, match="is not an evaluation attack"):
        parse_evaluation_attack(name)
