"""Claims about ensembles: their budgets, their stages, and Auto-PGD in a shrinking ball."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from dat_ds.attacks import SampleGenerator, ThreatModel, apgd, ensemble, parse_evaluation_attack
from dat_ds.attacks.ensemble import attack_names, stages_of
from dat_ds.attacks.projections import project_l1_box
from dat_ds.errors import ConfigError
from dat_ds.evaluation import evaluate
from tests.unit.attack_helpers import EPS, every_norm

pytestmark = pytest.mark.fast


def threat_of(norm: str) -> ThreatModel:
    return ThreatModel(norm, 8 / 255 if norm == "linf" else EPS[norm])


class Rows(nn.Module):
    """A small network whose rows are computed apart; it counts its forwards."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, classes))
        self.num_forwards = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        return torch.cat([self.net(row) for row in x.split(1)])


def pictures(size: int = 4) -> Tensor:
    return torch.rand(size, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def labels(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


# ---- names and stages


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_standard_has_the_budgets_of_autoattack(norm):
    names = attack_names(["standard"], threat_of(norm))
    assert names == ["apgd-ce-100", "apgd-t-100", "fab-t-100", "square-5000"]
    counts = Counter(s.attack for n in names for s in stages(n, norm))
    assert counts == {"apgd-ce-100": 1, "apgd-t-100": 9, "fab-t-100": 9, "square-5000": 1}


def test_standard_for_l1_has_restarts_and_fewer_targets():
    names = attack_names(["standard"], threat_of("l1"))
    counts = Counter(s.attack for n in names for s in stages(n, "l1"))
    assert counts == {
        "apgd-ce-l1-100-5": 5,
        "apgd-t-l1-100": 5,
        "fab-t-100": 9,
        "square-5000": 1,
    }


def stages(name: str, norm: str = "linf", classes: int = 10):
    return stages_of(parse_evaluation_attack(name), threat_of(norm), classes)


@pytest.mark.parametrize(
    ("name", "classes", "labels"),
    [
        ("pgd-5", 10, ["pgd-5"]),
        ("pgd-5-2", 10, ["pgd-5-2 restart 1", "pgd-5-2 restart 2"]),
        ("apgd-t-5", 3, ["apgd-t-5 target 1", "apgd-t-5 target 2"]),
        ("fab-t-5", 2, ["fab-t-5 target 1"]),
        ("fab-t-5-2", 2, ["fab-t-5-2 target 1 restart 1", "fab-t-5-2 target 1 restart 2"]),
    ],
)
def test_there_is_a_stage_for_each_target_and_restart(name, classes, labels):
    found = stages(name, classes=classes)
    assert [stage.label for stage in found] == labels
    assert {stage.attack for stage in found} == {name}


@pytest.mark.parametrize(
    ("names", "norm", "text"),
    [
        (["standard", "fab-t-100"], "linf", "names an attack twice"),
        (["autoattack"], "linf", "'autoattack' is not an evaluation attack"),
        (["apgd-ce-l1-9"], "l2", "'apgd-ce-l1-9' is for the norm l1, not l2: write 'apgd-ce-9'"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, norm, text):
    with pytest.raises(ValueError, match=text):
        attack_names(names, threat_of(norm))


# ---- runs

SHORT = ["apgd-ce-4", "apgd-t-3", "fab-t-2", "fab-2-2", "square-9-2", "pgd-2-2"]
SHORT_L1 = ["apgd-ce-l1-5-2", "apgd-t-l1-5"]


@every_norm
@pytest.mark.parametrize("classes", [2, 4])
def test_every_stage_stays_inside_and_does_not_mix_rows(norm, classes):
    model, threat, x = Rows(classes), threat_of(norm), pictures()
    y = labels(model, x)
    for name in SHORT + (SHORT_L1 if norm == "l1" else []):
        for stage in stages_of(parse_evaluation_attack(name), threat, classes):
            together = stage.run(model, x, y, SampleGenerator(0, 0))
            assert (threat.distance(together, x) <= threat.eps * (1 + 1e-5)).all(), stage.label
            assert together.min() >= 0
            assert together.max() <= 1
            row = 2
            generator = SampleGenerator(0, 0, indices=[row])
            alone = stage.run(model, x[row : row + 1], y[row : row + 1], generator)
            assert torch.equal(alone[0], together[row]), stage.label


def test_each_target_is_the_class_of_its_rank(monkeypatch):
    model, x = Rows(5), pictures()
    y = labels(model, x)
    targets = []
    monkeypatch.setattr(
        ensemble, "fab", lambda *args, **options: targets.append(options["targets"])
    )
    for stage in stages("fab-t-9", classes=5):
        stage.run(model, x, y, SampleGenerator(0, 0))
    with torch.no_grad():
        order = model(x).argsort(dim=1, descending=True)
    assert torch.equal(torch.stack(targets, dim=1), order[:, 1:])


def test_a_targeted_stage_takes_one_forward_more():
    model, x = Rows(5), pictures()
    y = labels(model, x)
    for name, forwards in (("apgd-t-6", 1 + 7), ("fab-t-4", 1 + 2 * 4 + 5), ("square-30", 30)):
        model.num_forwards = 0
        stages(name, classes=5)[0].run(model, x, y, SampleGenerator(0, 0))
        assert model.num_forwards == forwards, name


# ---- evaluation

NAMES = ["apgd-ce-l1-5", "apgd-t-l1-3", "fab-2", "fab-t-3", "square-9-2"]


def test_an_evaluation_runs_the_attacks_by_name():
    model, x = Rows(4), pictures(6)
    data = list(zip(x, labels(model, x).tolist(), strict=True))
    record = evaluate(model, data, ThreatModel("l1", 3.0), NAMES, batch_size=4)
    assert record.robust_acc.keys() == set(NAMES)
    assert min(record.robust_acc.values()) < 1, "some attack succeeds"
    assert max(record.largest_perturbation.values()) <= 3.0 * (1 + 1e-5)
    apart = evaluate(model, data, ThreatModel("l1", 3.0), NAMES, batch_size=2)
    assert apart.outcomes == record.outcomes


def test_an_evaluation_refuses_attacks_of_another_norm():
    data = list(zip(pictures(), [0, 1, 1, 0], strict=True))
    with pytest.raises(ConfigError, match="'apgd-t-l1-3' is for the norm l1, not linf"):
        evaluate(Rows(4), data, threat_of("linf"), NAMES)


# ---- Auto-PGD in a shrinking l1 ball


def test_the_phases_of_a_shrinking_ball_have_3_2_and_1_times_its_radius():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    x = 0.5 + 0.1 * torch.rand(4, 1, 12, 12)
    y, distances = labels(model, x), []
    threat = ThreatModel("l1", 2.0)

    def watched(images: Tensor) -> Tensor:
        distances.append(float(threat.distance(images.detach(), x).max()))
        return model(images)

    x_adv = apgd(
        watched,
        x,
        y,
        threat=threat,
        steps=10,
        shrinking_ball=True,
        generator=SampleGenerator(0, 0),
    )
    # 3, 3 and 4 steps, each phase with the forward of its start.
    assert len(distances) == 4 + 4 + 5
    assert 4.01 < max(distances[:4]) <= 6.001
    assert 2.01 < max(distances[4:8]) <= 4.001
    assert max(distances[8:]) <= 2.001
    assert (threat.distance(x_adv, x) <= 2.001).all()


def test_on_a_linear_model_a_shrinking_ball_ends_at_the_best_corner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, dtype=torch.float64))
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    y = labels(model, x)
    gain = (model[1].weight[1 - y] - model[1].weight[y]).detach()
    # All the room of the entries with the largest gains: 3 whole pixels of 1/2.
    best = gain.abs().topk(3).values.sum() / 2
    x_adv = apgd(
        model,
        x,
        y,
        threat=ThreatModel("l1", 1.5),
        steps=100,
        loss="cw",
        shrinking_ball=True,
        generator=SampleGenerator(0, 0),
    )
    reached = ((x_adv - x).flatten(1) * gain).sum()
    assert reached > 0.98 * best
    assert torch.equal(project_l1_box(x_adv - x, 1.5 + 1e-9, -x, 1 - x), x_adv - x)


def test_a_shrinking_ball_is_for_l1_alone():
    x = pictures()
    with pytest.raises(ValueError, match="shrinking_ball is for l1, not l2"):
        apgd(
            Rows(3),
            x,
            torch.zeros(4, dtype=torch.int64),
            threat=ThreatModel("l2", 1),
            steps=3,
            shrinking_ball=True,
        )
