"""Checks of models and of finished evaluations: planted faults are caught, sound models pass."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dat_ds.attacks import SampleGenerator, ThreatModel, already_checked, attack_mode, cw_margin
from dat_ds.cli.main import main
from dat_ds.evaluation.checks import (
    MODEL_CHECKS,
    OUTCOME_CHECKS,
    Finding,
    check_model,
    check_outcome,
)
from dat_ds.evaluation.checks.data import judge_label_order, normalising_modules
from dat_ds.evaluation.checks.model import layers_in_training
from dat_ds.evaluation.checks.probe import Names, Probe
from dat_ds.evaluation.checks.search import estimated_ascent, random_search
from dat_ds.evaluation.checks.unit_test import Planted, farthest
from dat_ds.models.normalize import Normalize
from tests.unit import planted

THREAT = ThreatModel("linf", 0.05)
Network = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Network:
    return planted.digits_network()


def found(network: Network, model: Any, *names: str, threat: ThreatModel = THREAT) -> list[Finding]:
    """Findings of the named checks alone."""
    _, x, y = network
    with attack_mode(model), already_checked():
        probe = Probe(model, x, y, threat)
        wanted = [check for check in MODEL_CHECKS if check.name in names]
        assert len(wanted) == len(names)
        return [check.finding(check.measure(probe)) for check in wanted]


# ---- planted faults

FAULTS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], nn.Module], tuple[str, ...]]] = {
    "label leak": (lambda m, x, y: planted.LabelLeak(m, x, y), ("label_leak", "continuity")),
    "label leak by rounded pixels": (
        lambda m, x, y: planted.LabelLeak(m, x, y, digits=2),
        ("label_leak",),
    ),
    "temperature 1e4": (lambda m, x, y: planted.Scaled(m, 1e4), ("logit_scale",)),
    "temperature 1e-5": (lambda m, x, y: planted.Scaled(m, 1e-5), ("logit_scale",)),
    "stochastic layer": (lambda m, x, y: planted.Noisy(m, 1e-3), ("randomness",)),
    "noise from a hash": (lambda m, x, y: planted.Hashed(m, 0.05), ("continuity",)),
    "rounding layer": (
        lambda m, x, y: planted.Rounded(m, 0.5),
        ("zero_gradient", "input_quantisation"),
    ),
    "input quantisation": (
        lambda m, x, y: planted.Quantised(m, 17),
        ("zero_gradient", "input_quantisation", "attack_unit_test"),
    ),
    "input quantisation, straight-through": (
        lambda m, x, y: planted.Quantised(m, 17, straight_through=True),
        ("gradient_agreement", "input_quantisation"),
    ),
    "compression": (lambda m, x, y: planted.Compressed(m, 0.05), ("zero_gradient",)),
    "thermometer code": (
        lambda m, x, y: planted.Thermometer(m, 16),
        ("gradient", "input_quantisation", "attack_unit_test"),
    ),
    "detached graph": (lambda m, x, y: planted.Detached(m), ("gradient", "unbounded_attack")),
    "half detached graph": (lambda m, x, y: planted.Detached(m, 0.6), ("gradient_agreement",)),
    "backward of its own": (lambda m, x, y: planted.Shattered(m), ("gradient_agreement",)),
    "softmax": (lambda m, x, y: planted.Probabilities(m, "softmax"), ("probabilities",)),
    "log-softmax": (lambda m, x, y: planted.Probabilities(m, "log_softmax"), ("probabilities",)),
    "sigmoid": (lambda m, x, y: planted.Probabilities(m, "sigmoid"), ("probabilities",)),
    "normalised twice": (
        lambda m, x, y: planted.Normalised(planted.Normalised(m, [0.5], [0.5]), [0.5], [0.5]),
        ("normalisation",),
    ),
    "BatchNorm in train mode": (lambda m, x, y: planted.BatchStatistics(m), ("batch_dependence",)),
    "batch-dependent output": (
        lambda m, x, y: planted.BatchDependent(m, 0.01),
        ("batch_dependence",),
    ),
    "clipped logits": (lambda m, x, y: planted.Clipped(m, 3.0), ("clipped_logits",)),
    "softly clipped logits": (
        lambda m, x, y: planted.Clipped(m, 1.0, soft=True),
        ("clipped_logits",),
    ),
    "two classes swapped": (
        lambda m, x, y: planted.Reordered(m, [1, 0, *range(2, 10)]),
        ("label_order",),
    ),
    "classes shifted by one": (
        lambda m, x, y: planted.Reordered(m, [*range(1, 10), 0]),
        ("label_order", "accuracy"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_the_checks_named_for_it(digits: Network, fault: str) -> None:
    plant, names = FAULTS[fault]
    model = plant(*digits)
    for finding in found(digits, model, *names):
        assert finding.is_alarm, finding


def test_a_sound_model_raises_no_alarm_and_is_left_as_it_was(digits: Network) -> None:
    model, x, y = digits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    findings = check_model(model, x, y, THREAT, seconds=600)
    assert [f.name for f in findings] == [check.name for check in MODEL_CHECKS]
    assert not [f for f in findings if f.status != "ok"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_attacks_without_gradients_beat_a_masked_gradient(digits: Network) -> None:
    model = planted.Quantised(digits[0], 17)
    names = ("unbounded_attack", "black_box", "transfer", "estimated_gradient")
    for finding in found(digits, model, *names, threat=ThreatModel("linf", 0.2)):
        assert finding.is_alarm, finding


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_checks_that_attack_work_in_every_norm(digits: Network, norm: Any) -> None:
    threat = ThreatModel(norm, {"l2": 0.3, "l1": 1.0}[norm])
    names = ("verification", "attack_unit_test", "black_box", "estimated_gradient")
    for finding in found(digits, digits[0], *names, threat=threat):
        assert finding.status == "ok", finding


def test_images_that_are_not_pixels_fail_and_are_not_attacked(digits: Network) -> None:
    model, x, y = digits
    findings = {f.name: f for f in check_model(model, (x - 0.3) / 0.38, y, THREAT)}
    assert findings["images"].status == "failed"
    assert "normalised" in findings["images"].found
    assert findings["black_box"].status == "skipped"
    (dark,) = found((model, x / 255, y), model, "images")
    assert dark.status == "failed"


def test_only_checks_that_attack_are_skipped_when_time_is_over(digits: Network) -> None:
    findings = check_model(*digits, THREAT, seconds=-1)
    skipped = [finding.name for finding in findings if finding.status == "skipped"]
    assert skipped == [finding.name for finding in findings][-len(skipped) :]
    assert {"verification", "black_box", "transfer"} <= set(skipped)
    assert "label_leak" not in skipped


def test_layers_in_training_mode_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.0), nn.Dropout(0.5))
    assert layers_in_training(model.train()) == ["1", "3"]
    assert layers_in_training(model.eval()) == []
    assert layers_in_training(model, ["", "0", "1", "2"]) == ["1"]
    assert layers_in_training(lambda x: x) == []


def test_two_layers_that_normalise_are_seen_and_one_that_does_nothing_is_not() -> None:
    once, nothing = Normalize([0.5], [0.2]), Normalize([0.0], [1.0])
    assert normalising_modules(nn.Sequential(once, nothing, nn.BatchNorm2d(1))) == ["0"]
    assert normalising_modules(nn.Sequential(once, nn.Sequential(Normalize([0.4], [0.3])))) == [
        "0",
        "1.0",
    ]


def test_names_of_classes_in_another_order_fail(digits: Network) -> None:
    model, x, y = digits
    with attack_mode(model), already_checked():
        probe = Probe(model, x, y, THREAT, names=Names(["cat", "dog"], ["dog", "cat"]))
        check = next(check for check in MODEL_CHECKS if check.name == "label_order")
        measured = check.measure(probe)
    assert measured.status == "failed"
    assert "class 0 is 'cat' in the data and 'dog' in training" in measured.found


# ---- closed forms


@pytest.mark.parametrize(
    ("predicted", "status", "gain"),
    [
        ([i % 4 for i in range(64)], "ok", 0.0),
        ([[1, 0, 2, 3][i % 4] for i in range(64)], "failed", 0.5),  # two classes swapped
        ([(i % 4) - 1 if i % 4 else 3 for i in range(64)], "failed", 1.0),
        ([0] * 64, "ok", 0.0),  # no order helps a constant
    ],
)
def test_label_order(predicted: list[int], status: str, gain: float) -> None:
    # Labels in blocks, so that both halves of the cross-validation see every class.
    blocks = [predicted[i] for k in range(4) for i in range(64) if i % 4 == k]
    labels = [i % 4 for k in range(4) for i in range(64) if i % 4 == k]
    measured = judge_label_order(blocks, labels, 4)
    assert measured.status == status
    assert measured.value == pytest.approx(gain, abs=1e-12)


def linear(threat: ThreatModel) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, float]:
    """A linear two-class model, images, labels, and the largest gain of the margin in the ball."""
    weight = torch.linspace(-1, 1, 64).roll(17).view(1, 1, 8, 8)
    x, y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    dual = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[threat.norm]
    best = threat.eps * float(torch.linalg.vector_norm(weight.flatten(), ord=dual))

    def logits(x: Tensor) -> Tensor:
        score = ((x - 0.5) * weight).flatten(1).sum(dim=1).double()
        return torch.stack([torch.zeros_like(score), score], dim=1)

    return logits, x, y, best


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_searches_without_gradients_stay_in_the_ball_and_near_the_optimum(norm: Any) -> None:
    threat = ThreatModel(norm, {"linf": 0.1, "l2": 0.5, "l1": 1.0}[norm])
    logits, x, y, best = linear(threat)
    for x_adv, share in (
        (estimated_ascent(logits, x, y, threat, 8, SampleGenerator(0, 0)), 0.5),
        (random_search(logits, x, y, threat, 150, SampleGenerator(0, 0)), 0.2),
    ):
        gained = cw_margin(logits(x_adv), y)
        assert bool((gained <= best * (1 + 1e-4)).all())
        assert bool((gained >= share * best).all())
        assert bool((threat.distance(x_adv, x) <= threat.eps * (1 + 1e-4)).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_planted_examples_lie_at_the_surface(norm: Any) -> None:
    threat = ThreatModel(norm, 0.25)
    x = torch.full((3, 1, 4, 4), 0.5)
    far = farthest(x, threat, SampleGenerator(0, 0))
    assert threat.distance(far, x).tolist() == pytest.approx([0.25] * 3, rel=1e-5)


def test_the_classifier_of_planted_examples_separates_what_can_be_separated() -> None:
    inner = torch.zeros(2, 5, 3)
    inner[:, :, 0] = torch.linspace(-0.1, 0.1, 5)
    planted_features = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    classifier = Planted.fitted(inner, planted_features)
    assert classifier.separates.tolist() == [True, False]
    assert float(classifier.score(planted_features)[0]) > 0
    assert all(float(classifier.score(inner[:, i])[0]) < 0 for i in range(5))
    # Half-way between the inner examples and the planted one.
    middle = torch.tensor([[0.0, 0.5, 0.0]] * 2)
    assert float(classifier.score(middle)[0]) == pytest.approx(0, abs=1e-3)


# ---- finished evaluations


def evaluation(broken: dict[str, int], standing: int = 40, **changes: Any) -> tuple[Any, Any]:
    """Files of an evaluation: samples broken by each attack, and those that stand."""
    samples = []
    for attack, count in [*broken.items(), (None, standing)]:
        for _ in range(count):
            index = len(samples)
            samples.append(
                {
                    "index": index,
                    "label": index % 4,
                    "predicted": index % 4,
                    "correct": True,
                    "robust": attack is None,
                    "broken_by": attack,
                    "stage": attack,
                    "step": None if attack is None else 5,
                    "margin": 0.5 if attack is None else -0.5,
                    "natural_margin": 2.0,
                    "predicted_under_attack": None if attack is None else 3 - index % 4,
                    "distance": None if attack is None else 2 / 255,
                    "verified": None if attack is None else True,
                }
            )
    left, attacks = len(samples), []
    for attack, count in broken.items():
        attacks.append({"name": attack, "attacked": left, "broken": count})
        left -= count
    values = {
        "threat_model": {"norm": "linf", "eps": "2/255"},
        "attacks": attacks,
        "natural_acc": 1.0,
        "robust_acc": {"all": standing / len(samples)},
        "num_examples": len(samples),
        "num_classes": 4,
    }
    for sample in samples[: changes.pop("rows", len(samples))]:
        sample.update({key: value for key, value in changes.items() if key in sample})
    values.update({key: value for key, value in changes.items() if key in values})
    return values, samples


APGD = {"apgd-ce-100": 20, "apgd-t-100": 2, "square-5000": 0}
OUTCOMES: list[tuple[str, dict[str, int], dict[str, Any], str]] = [
    ("outcome_random_search", {"apgd-ce-100": 20, "square-5000": 10}, {}, "suspicious"),
    ("outcome_random_search", {"apgd-ce-100": 20, "square-5000": 1}, {}, "ok"),
    ("outcome_random_search", {"malt-20": 20, "apgd-square-2000": 10}, {}, "suspicious"),
    ("outcome_random_search", {"square-5000": 30}, {}, "skipped"),
    ("outcome_loss_dependence", {"apgd-ce-100": 2, "apgd-t-100": 30}, {}, "suspicious"),
    ("outcome_late_breaks", APGD, {"step": 90, "rows": 10}, "suspicious"),
    ("outcome_late_breaks", {"pgd-50-2": 20}, {"step": 60}, "ok"),  # early in the second run
    ("outcome_verification", APGD, {"verified": False, "rows": 1}, "suspicious"),
    ("outcome_verification", APGD, {"verified": False, "rows": 10}, "failed"),
    ("outcome_accuracy", APGD, {"natural_acc": 0.26}, "failed"),
    ("outcome_label_order", APGD, {"predicted": 3}, "ok"),
    ("outcome_unmoved_margins", {"apgd-ce-100": 0}, {"margin": 2.0}, "failed"),
    ("outcome_consistency", APGD, {"natural_acc": 0.5}, "failed"),
    ("outcome_consistency", APGD, {"distance": 0.01, "rows": 1}, "failed"),
    ("outcome_consistency", APGD, {"num_examples": 10}, "failed"),
    ("outcome_consistency", APGD, {"robust_acc": {"all": 0.9}}, "failed"),
]


@pytest.mark.parametrize(("name", "broken", "changes", "status"), OUTCOMES)
def test_an_outcome_is_judged_from_its_files(
    name: str, broken: dict[str, int], changes: dict[str, Any], status: str
) -> None:
    findings = {f.name: f for f in check_outcome(*evaluation(broken, **changes))}
    assert findings[name].status == status, findings[name]


def test_a_sound_outcome_raises_no_alarm() -> None:
    findings = check_outcome(*evaluation(APGD))
    assert [f.name for f in findings] == [check.name for check in OUTCOME_CHECKS]
    assert {f.status for f in findings} == {"ok"}
    entry = findings[0].to_dict()
    assert list(entry) == ["name", "status", "found", "meaning", "remedy", "value"]
    json.dumps(entry)


# ---- the command and the page


def test_doctor_prints_a_table_writes_a_file_and_tells_by_its_exit_code(
    digits: Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, x, y = digits
    module = types.ModuleType("ward")
    module.sick = lambda: planted.Probabilities(model, "softmax")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ward", module)
    images = (x.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    np.savez(tmp_path / "data.npz", x_test=images, y_test=y.numpy())
    words = ["doctor", "ward:sick", "--import", "ward", "--data", f"npz:{tmp_path}/data.npz"]
    # Radius 0: nothing is attacked, which keeps this short.
    words += ["--threat", "linf:0", "--num_examples", "64", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "failed      probabilities" in text
    assert "to do: Return the logits" in text
    record = json.loads((tmp_path / "out" / "doctor.json").read_text(encoding="utf-8"))
    assert [check["name"] for check in record["checks"]] == [c.name for c in MODEL_CHECKS]
    assert record["num_examples"] == 64
    assert record["threat_model"]["norm"] == "linf"
    assert main([*words[:-4], "--num_examples", "0"]) == 2
    assert "--num_examples 0: give at least 1." in capsys.readouterr().err


def test_the_page_holds_every_check_and_every_planted_fault() -> None:
    page = (Path(__file__).parents[2] / "docs" / "checks.md").read_text(encoding="utf-8")
    checks = [*MODEL_CHECKS, *OUTCOME_CHECKS]
    for check in checks:
        assert f"| `{check.name}` | {check.meaning} | {check.remedy} |" in page
    for fault, (_, names) in FAULTS.items():
        assert f"| {fault} | {', '.join(f'`{name}`' for name in names)} |" in page
    assert len({check.name for check in checks}) == len(checks)
