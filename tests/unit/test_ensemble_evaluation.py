"""An evaluation under an ensemble: closed forms, and what no outcome may depend on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from dat_ds.attacks import ThreatModel, parse_evaluation_attack
from dat_ds.attacks import ensemble as stages
from dat_ds.attacks.ensemble import Stage
from dat_ds.data.images import TensorImages
from dat_ds.errors import CheckpointError, DataError, ModelError
from dat_ds.evaluation import ensemble
from dat_ds.evaluation.ensemble import EnsembleEvaluation, Outcome, shared_batches
from dat_ds.evaluation.samples import (
    Journal,
    open_folder,
    parse_ranges,
    ranges_of,
    rounded,
    wilson_interval,
)
from dat_ds.ranks import Ranks

EPS = 0.05
THREAT = ThreatModel("linf", EPS)
ONE = Ranks(rank=0, count=1, device=torch.device("cpu"), cpu_group=None)


class Linear(nn.Module):
    """Logits ``(0, w x + b)``: robust at eps exactly where ``|w x + b| > eps ||w||_1``."""

    def __init__(self, num_pixels: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(num_pixels, generator=generator))
        self.b = nn.Parameter(-self.w.detach().sum() / 2)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


def images(count: int = 100) -> TensorImages:
    """Pixels far enough from 0 and 1 that the range does not bind; some labels are wrong."""
    generator = torch.Generator().manual_seed(1)
    x = 0.1 + 0.8 * torch.rand((count, 1, 4, 4), generator=generator)
    labels = Linear()(x).argmax(1)
    labels[::10] = 1 - labels[::10]
    return TensorImages(x, labels)


def evaluation(model: Any = None, data: Any = None, **changed: Any) -> EnsembleEvaluation:
    values: dict[str, Any] = {
        "model": Linear() if model is None else model,
        "data": images() if data is None else data,
        "threat": THREAT,
        "attacks": [parse_evaluation_attack("pgd-5"), parse_evaluation_attack("apgd-ce-5")],
        "indices": range(100),
        "batch_size": 64,
        "seed": 0,
        "ranks": ONE,
        "journal": Journal(None, 0),
    }
    return EnsembleEvaluation(**{**values, **changed})


def use_stage(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[Any, Tensor, Tensor], Tensor]
) -> None:
    """Every attack is one stage of ``run``."""
    made = [Stage("own", "own", lambda model, x, y, generator: run(model, x, y))]
    monkeypatch.setattr(ensemble, "stages_of", lambda attack, threat, num_classes: made)


def test_a_linear_model_stands_exactly_where_its_margin_says() -> None:
    model, data = Linear(), images()
    outcome = evaluation(model, data).run()
    with torch.no_grad():
        logits = model(data.images)
    margins = (logits[:, 1] * (2 * data.labels - 1)).double()
    reach = EPS * float(model.w.detach().abs().sum())
    for sample, margin in zip(outcome.samples, margins.tolist(), strict=True):
        assert sample.natural_margin == pytest.approx(margin, rel=1e-4, abs=1e-5)
        assert sample.correct == (margin > 0)
        assert sample.stands == (margin > reach)
        if sample.stands:
            assert sample.margin == pytest.approx(margin - reach, rel=1e-3, abs=1e-4)
            assert sample.verified is None
        elif sample.correct:
            assert sample.broken_by == "pgd-5"
            assert sample.verified is True
            assert sample.step is not None
            assert 1 <= sample.step <= 6
            assert sample.margin < 0
            assert sample.distance is not None
            assert 0.5 * EPS < sample.distance <= EPS + 1e-6
            assert sample.predicted_under_attack == 1 - sample.label
    assert 20 < sum(sample.stands for sample in outcome.samples) < 80
    natural, pgd, apgd = outcome.stages
    assert natural.attacked == 100
    assert pgd.attacked == sum(sample.correct for sample in outcome.samples)
    assert apgd.attacked == pgd.attacked - pgd.broken
    assert apgd.broken == 0


def noisy_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


def network_case(**changed: Any) -> EnsembleEvaluation:
    model, data = noisy_network(), images()
    with torch.no_grad():
        labels = model(data.images).argmax(1)
    return evaluation(model, TensorImages(data.images, labels), **changed)


@pytest.mark.parametrize("batch_size", [1, 40, 96, 1000])
def test_outcomes_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    expected = network_case().run().samples
    assert network_case(batch_size=batch_size).run().samples == expected
    assert 0 < sum(sample.stands for sample in expected) < 100


def test_a_sample_has_the_outcome_that_it_has_alone() -> None:
    together = network_case().run().samples
    for index in (3, 57):
        (alone,) = network_case(indices=[index]).run().samples
        assert (alone.stands, alone.broken_by) == (
            together[index].stands,
            together[index].broken_by,
        )
        assert alone.margin == pytest.approx(together[index].margin, rel=1e-3, abs=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_evaluation_goes_on_where_it_stood(tmp_path: Path, after: int) -> None:
    expected = network_case(batch_size=32).run()
    calls = 0

    def interrupt(label: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    with contextlib.suppress(Stop):
        network_case(journal=Journal(tmp_path, 0), batch_size=32, progress=interrupt).run()
    file = tmp_path / "progress-0.jsonl"
    assert len(file.read_text().splitlines()) == after
    with file.open("a") as torn:
        torn.write('{"stage": "pgd-5", "rows": [[1, 2')
    seen: list[int] = []
    again = network_case(
        journal=Journal(tmp_path, 0),
        batch_size=64,
        progress=lambda label, done, total: seen.append(done),
    ).run()
    assert again.samples == expected.samples
    assert [(s.label, s.attacked, s.broken) for s in again.stages] == [
        (s.label, s.attacked, s.broken) for s in expected.stages
    ]
    # What another rank has written is read as well.
    file.rename(tmp_path / "progress-7.jsonl")
    third = network_case(journal=Journal(tmp_path, 0), progress=lambda *told: pytest.fail("done"))
    assert third.run().samples == expected.samples


def test_what_only_lies_outside_the_ball_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(model: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            model(x - 3 * (2 * y - 1).view(-1, 1, 1, 1) * model._model._model.w.view(1, 1, 4, 4))
        return x

    use_stage(monkeypatch, leave)
    outcome = evaluation().run()
    assert outcome.stages[-1].broken == 0
    assert all(s.margin == s.natural_margin for s in outcome.samples)


def test_an_image_that_a_plain_forward_denies_does_not_count() -> None:
    class Deceitful(Linear):
        """Wrong about every image, but only while somebody asks for its gradient."""

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits.flip(1) if x.requires_grad else logits

    outcome = evaluation(Deceitful(), attacks=[parse_evaluation_attack("pgd-1")]).run()
    correct = [sample for sample in outcome.samples if sample.correct]
    broken = [sample for sample in correct if not sample.stands]
    denied = [sample for sample in correct if sample.verified is False]
    assert all(sample.stands for sample in denied)
    assert len(denied) > len(correct) / 2
    # Those whose last image is misclassified without a gradient too are broken all the same.
    assert all(sample.verified for sample in broken)
    assert len(broken) < len(correct) / 2


def test_a_stage_ends_when_every_row_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def descend(model: Any, x: Tensor, y: Tensor) -> Tensor:
        sign = (2 * y - 1).view(-1, 1, 1, 1)
        far = x - EPS * sign * model._model._model.w.view(1, 1, 4, 4).sign()
        for _ in range(50):
            with torch.no_grad():
                model(far)
        return far

    use_stage(monkeypatch, descend)
    weak = Linear()
    data = images()
    reach = EPS * float(weak.w.detach().abs().sum())
    with torch.no_grad():
        margins = weak(data.images)[:, 1].abs()
    chosen = [i for i in range(100) if i % 10 and margins[i] < reach]
    outcome = evaluation(weak, data, indices=chosen, attacks=[parse_evaluation_attack("pgd-1")])
    (_, stage) = outcome.run().stages
    assert stage.broken == len(chosen)
    verified = sum(-(-size // 32) * 32 for size in (len(chosen) // 32 * 32, len(chosen) % 32))
    assert stage.forwards == len(chosen) + verified, "one to break them, one to verify"


def test_passes_are_counted() -> None:
    robust = dataclasses.replace(THREAT, eps=1e-6)
    outcome = evaluation(
        threat=robust, attacks=[parse_evaluation_attack("pgd-5")], batch_size=32
    ).run()
    natural, stage = outcome.stages
    assert natural.forwards == 100
    assert stage.attacked == 90
    assert stage.broken == 0
    assert (stage.forwards, stage.backwards) == (6 * 90, 5 * 90)


def test_sixteen_bits_only_find_what_float32_confirms() -> None:
    plain = network_case().run()
    filtered = network_case(prefilter="bf16").run()
    labels = [stage.label for stage in filtered.stages]
    assert labels == ["natural", "pgd-5 in bf16", "pgd-5", "apgd-ce-5"]
    early = [s for s in filtered.samples if s.stage == "pgd-5 in bf16"]
    assert early
    assert all(s.verified and s.margin < 0 for s in early)
    assert filtered.stages[2].attacked < plain.stages[1].attacked
    difference = sum(
        a.stands != b.stands for a, b in zip(plain.samples, filtered.samples, strict=True)
    )
    assert difference <= 2


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ({"labels": 5}, DataError, r"label 5|5.*2 outputs|class"),
        ({"pixels": 1.5}, DataError, "Sample 37"),
        ({"pixels": float("nan")}, DataError, "Sample 37"),
        ({"model": "nan"}, ModelError, "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(case: dict[str, Any], error: type[Exception], words: str) -> None:
    data, model = images(), Linear()
    if "labels" in case:
        data.labels[37] = case["labels"]
    if "pixels" in case:
        data.images[37, 0, 0, 0] = case["pixels"]
    if "model" in case:
        model.b.data.fill_(float("nan"))
    with pytest.raises(error, match=words):
        evaluation(model, data).run()


def test_outputs_that_are_not_finite_near_an_image_are_refused() -> None:
    class Fragile(Linear):
        def forward(self, x: Tensor) -> Tensor:
            moved = (x * 1e4).round() != x * 1e4
            return super().forward(x) / (~moved.flatten(1).any(dim=1, keepdim=True)).float()

    data = images()
    exact = TensorImages((data.images * 16).round() / 16, data.labels)
    exact.labels = Linear()(exact.images).argmax(1)
    with pytest.raises(ModelError, match="NaN or infinite"):
        evaluation(Fragile(), exact).run()


def test_it_works_under_inference_mode_and_leaves_no_trace() -> None:
    model = Linear()
    expected: Outcome = evaluation(model).run()
    with torch.inference_mode():
        assert evaluation(model).run().samples == expected.samples
    assert model.training
    assert model.w.requires_grad
    assert model.w.grad is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [32, 64, 256])
@pytest.mark.parametrize("count", [0, 14, 32, 110, 550, 1000])
def test_ranks_have_about_as_many_samples(count: int, rows: int, ranks: int) -> None:
    shares = shared_batches(range(count), rows, ranks)
    batches = [batch for share in shares for batch in share]
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(0 < len(batch) <= rows for batch in batches)
    assert sum(len(batch) % 32 != 0 for batch in batches) <= 1
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 32


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (5, 10), (10, 10), (551, 1000)])
def test_wilson_intervals_are_those_of_scipy(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, count) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], [3, 5, 6, 7, 9], list(range(100))])
def test_ranges_are_read_as_they_are_written(indices: list[int]) -> None:
    assert parse_ranges(ranges_of(indices)) == indices


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "1,,2", "1.5"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a list of indices"):
        parse_ranges(text)


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    plan = {"attacks": ["pgd-5"], "threat_model": {"norm": "linf", "eps": "2/255"}, "seed": 0}
    assert not open_folder(tmp_path / "a", plan)
    assert not open_folder(tmp_path / "a", plan)
    changed = {**plan, "threat_model": {"norm": "linf", "eps": "8/255"}}
    with pytest.raises(CheckpointError, match=r"threat_model was .*2/255.*is .*8/255"):
        open_folder(tmp_path / "a", changed)
    (tmp_path / "a" / "plan.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        open_folder(tmp_path / "a", plan)


def test_six_digits_are_kept() -> None:
    assert rounded(0.123456789) == 0.123457
    assert rounded(-1234567.8) == -1234570.0


def test_every_ensemble_is_made_of_attacks_that_have_stages() -> None:
    for name, attacks in stages.ENSEMBLES.items():
        for norm in ("linf", "l2", "l1"):
            threat = ThreatModel(norm, 0.5)  # type: ignore[arg-type]
            names = stages.attack_names([name], threat)
            assert names == list(attacks(threat))
            for attack in names:
                parts = stages.stages_of(parse_evaluation_attack(attack), threat, 10)
                assert len({part.label for part in parts}) == len(parts) > 0
                assert {part.attack for part in parts} == {attack}
