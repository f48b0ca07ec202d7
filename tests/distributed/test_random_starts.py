"""The attack and the outer loss see the global batch: how it is cut up does not matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dat_ds.attacks.strategy import Adversarial
from tests.distributed import tiny
from tests.distributed.harness import run_ranks

GLOBAL, STEPS, SEED, LR, MOMENTUM = 8, 2, 3, 0.1, 0.9
EPS, STEP_SIZE, ATTACK_STEPS = 0.1, 0.04, 3


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut: over micro-steps on every rank."""

    micro_batch: int
    accumulation: int
    stage: int = 0


CUTS = {
    1: (Cut(8, 1), Cut(4, 2), Cut(2, 4), Cut(4, 2, stage=3)),
    2: (Cut(4, 1), Cut(2, 2), Cut(4, 1, stage=2), Cut(2, 2, stage=3)),
}


@dataclass(frozen=True)
class Epoch:
    """An epoch whose last global batch is not full; in some, ranks go without an image."""

    images: int
    stage: int
    accumulation: int = 1

    @property
    def global_batch(self) -> int:
        return 4 * self.accumulation * 2


EPOCHS = [
    *(Epoch(images, stage) for images in (13, 9) for stage in range(4)),
    *(Epoch(17, stage, accumulation=2) for stage in (1, 3)),
    *(Epoch(19, stage, accumulation=2) for stage in (0, 1, 2, 3)),
]


def settings(stage: int, micro_batch: int, accumulation: int, attack_steps: int) -> dict[str, Any]:
    return tiny.config(
        stage,
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulation,
        optimizer={"type": "SGD", "params": {"lr": LR, "momentum": MOMENTUM}},
        dat={
            "attack": {"steps": attack_steps, "step_size": STEP_SIZE},
            "seed": SEED,
        },
    )


def adversarial_images(cut: Cut, attack_steps: int, step_size: float) -> Tensor:
    """What this rank's attacks made of its images, ``(steps, micro-steps, images, ...)``."""
    import dat_ds

    config = settings(cut.stage, cut.micro_batch, cut.accumulation, attack_steps)
    config["dat"]["attack"]["step_size"] = step_size
    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
    find, made = engine.inner.images, []

    def kept(*args: Any) -> Adversarial:
        found = find(*args)
        made.append(found.images)
        return found

    engine.inner.images = kept  # type: ignore[method-assign]
    x, y = (part.split(cut.micro_batch) for part in tiny.images(STEPS * GLOBAL))
    slots = cut.accumulation * engine.ranks.count
    for step in range(STEPS):
        for micro in range(cut.accumulation):
            slot = step * slots + micro * engine.ranks.count + engine.ranks.rank
            loss = engine(x[slot], y[slot])
            engine.backward(loss)
            engine.step()
    engine.close()
    return torch.stack(made).unflatten(0, (STEPS, cut.accumulation))


def train_epoch(epoch: Epoch) -> dict[str, Any]:
    import dat_ds
    from dat_ds.engine import hooks

    data = TensorDataset(*tiny.images(epoch.images))
    engine, _, loader, _ = dat_ds.initialize(
        model=tiny.vit(),
        config=settings(epoch.stage, 4, epoch.accumulation, ATTACK_STEPS),
        training_data=data,
    )
    sizes, reduced = [], []
    for x, y in loader:
        sizes.append(len(x))
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        if engine.micro_step == 0:
            engine.measure_natural_accuracy(x, y)
            reduced.append(engine.reduced_metrics())
    state = hooks.full_state_dict(engine.deepspeed)
    engine.close()
    return {"state": state, "sizes": sizes, "metrics": reduced}


def run_all() -> dict[Any, Any]:
    from dat_ds.engine.launch import setup_ranks

    ranks = setup_ranks().count
    reports: dict[Any, Any] = {}
    for cut in CUTS[ranks]:
        reports["starts", cut] = adversarial_images(cut, 1, 0.0)
        reports["attacks", cut] = adversarial_images(cut, ATTACK_STEPS, STEP_SIZE)
    if ranks == 2:
        for epoch in EPOCHS:
            reports[epoch] = train_epoch(epoch)
    return reports


@pytest.fixture(scope="module")
def reports() -> dict[int, list[dict[Any, Any]]]:
    return {ranks: run_ranks(run_all, ranks) for ranks in CUTS}


def global_order(by_rank: list[dict[Any, Any]], key: Any) -> Tensor:
    """All ranks' images, put together in the order of the data: ``(steps, global batch, ...)``."""
    return torch.stack([report[key] for report in by_rank], dim=2).flatten(1, 3)


@pytest.mark.parametrize("ranks", CUTS)
def test_random_starts_do_not_depend_on_how_the_batch_is_cut(
    reports: dict[int, list[Any]], ranks: int
) -> None:
    from dat_ds.attacks import SampleGenerator
    from dat_ds.attacks.noise import rand_like

    for cut in CUTS[ranks]:
        starts = global_order(reports[ranks], ("starts", cut))
        for step, x in enumerate(tiny.images(STEPS * GLOBAL)[0].split(GLOBAL)):
            noise = rand_like(x, SampleGenerator(SEED, step, 0)) * 2 * EPS - EPS
            expected = (x + noise).clamp(0, 1)
            assert (starts[step] - expected).abs().max() <= 1e-6, cut
        # A step of length 0 leaves the start as it was, so no rounding excuses a difference.
        assert torch.equal(starts, global_order(reports[1], ("starts", CUTS[1][0]))), cut


@pytest.mark.parametrize("ranks", CUTS)
def test_adversarial_images_do_not_depend_on_how_the_batch_is_cut(
    reports: dict[int, list[Any]], ranks: int
) -> None:
    reference = global_order(reports[1], ("attacks", CUTS[1][0]))
    x = tiny.images(STEPS * GLOBAL)[0].unflatten(0, (STEPS, GLOBAL))
    assert (reference - x).abs().amax(dim=(1, 2, 3, 4)).min() > 0.9 * EPS
    for cut in CUTS[ranks]:
        x_adv = global_order(reports[ranks], ("attacks", cut))
        # Sums in another order may turn the sign of a gradient entry that is almost zero.
        same = (x_adv - reference).abs().le(1e-6)
        assert same.double().mean() >= 0.999, cut


def plain_epoch(epoch: Epoch) -> tuple[nn.Module, list[dict[str, float]]]:
    """One process on the concatenated batches, in the loader's order."""
    from dat_ds.attacks import SampleGenerator
    from dat_ds.attacks.noise import rand_like
    from dat_ds.data.sampler import seeded_generator

    model = tiny.vit()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    order = torch.randperm(epoch.images, generator=seeded_generator("order", SEED, 0))
    x_all, y_all = tiny.images(epoch.images)
    metrics = []
    for step, indices in enumerate(order.split(epoch.global_batch)):
        x, y = x_all[indices], y_all[indices]
        noise = rand_like(x, SampleGenerator(SEED, step, 0)) * 2 * EPS - EPS
        x_adv = (x + noise).clamp(0, 1)
        for _ in range(ATTACK_STEPS):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPS), x + EPS), 0, 1)
        logits = model(x_adv)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        robust_acc = (logits.argmax(1) == y).double().mean().item()
        metrics.append({"loss": loss.item(), "robust_acc": robust_acc})
    return model, metrics


@pytest.mark.parametrize("epoch", EPOCHS, ids=str)
def test_epoch_with_an_uneven_last_batch_equals_plain_pytorch(
    reports: dict[int, list[Any]], epoch: Epoch
) -> None:
    model, _ = plain_epoch(epoch)
    state = reports[2][0][epoch]["state"]
    assert max((state[k] - v).abs().max().item() for k, v in model.state_dict().items()) <= 1e-6


@pytest.mark.parametrize("epoch", EPOCHS, ids=str)
def test_metrics_of_uneven_batches_are_means_over_the_global_batch(
    reports: dict[int, list[Any]], epoch: Epoch
) -> None:
    _, expected = plain_epoch(epoch)
    if epoch.images == 19:  # a rank without an image would show if it were counted
        assert 0 < expected[-1]["robust_acc"] < 1
    first, second = (report[epoch]["metrics"] for report in reports[2])
    assert len(first) == len(second) == len(expected)
    for of_first, of_second, plain in zip(first, second, expected, strict=True):
        assert of_first["robust_acc"] == of_second["robust_acc"]
        assert of_first["robust_acc"] == pytest.approx(plain["robust_acc"], abs=1e-9)
        assert of_first["loss"] == pytest.approx(plain["loss"], abs=1e-5)


def test_epochs_hold_ranks_without_an_image(reports: dict[int, list[Any]]) -> None:
    assert reports[2][1][Epoch(9, 3)]["sizes"] == [4, 0]
    assert reports[2][0][Epoch(9, 3)]["sizes"] == [4, 1]
    assert reports[2][1][Epoch(17, 3, accumulation=2)]["sizes"] == [4, 4, 0, 0]
    assert reports[2][1][Epoch(19, 3, accumulation=2)]["sizes"] == [4, 4, 1, 0]
