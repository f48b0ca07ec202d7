"""Faulty numbers, by closed forms: the first step, its samples, large ratios, falling accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dat_ds.evaluation.samples import wilson_interval
from dat_ds.minmax import FiniteWatch, MicroBatch, Moment, OuterTerms
from dat_ds.optim import Lamb
from dat_ds.training.overfitting import falls_in_a_row

NAN = float("nan")


def outer(loss: float, logits: Tensor) -> OuterTerms:
    return OuterTerms({"loss": torch.tensor(loss)}, logits, None)


def part(step: int, slot: int = 0, samples: Any = (7, 8, 9), **values: Any) -> MicroBatch:
    x = torch.zeros(3, 1, 2, 2)
    moment = Moment(seed=0, step=step, slot=slot)
    values = {"num_images": 3, **values}
    return MicroBatch(x=x, y=torch.zeros(3), moment=moment, samples=samples, **values)


def test_the_first_step_is_found_with_its_micro_steps_and_samples() -> None:
    watch, fine = FiniteWatch(), torch.zeros(3, 2)
    spoiled = torch.tensor([[0.0, 0.0], [NAN, 0.0], [0.0, 0.0]])
    watch.see_loss(outer(0.1, fine), part(0))
    watch.see_loss(outer(0.1, fine), part(1))
    watch.see_loss(outer(NAN, spoiled), part(1, slot=1))
    watch.see_loss(outer(float("inf"), spoiled), part(2))
    watch.see_gradient(2, torch.tensor(NAN))
    found = watch.first()
    assert found is not None
    assert (found.kind, found.step, found.micro_steps, found.samples) == ("loss", 2, (1,), (8,))
    assert watch.first() is None, "told once"


def test_views_of_an_image_count_for_it_and_finite_outputs_name_the_whole_batch() -> None:
    watch = FiniteWatch()
    views = torch.zeros(6, 2)
    views[5] = torch.inf  # the second view of the last image
    watch.see_loss(outer(NAN, views), part(0))
    found = watch.first()
    assert found is not None
    assert found.samples == (9,)
    watch.see_loss(outer(NAN, torch.zeros(3, 2)), part(0))
    found = watch.first()
    assert found is not None
    assert found.samples == (7, 8, 9)


def test_a_gradient_is_told_where_losses_are_finite_and_infinite_logits_are_no_fault() -> None:
    watch = FiniteWatch()
    watch.see_loss(outer(0.1, torch.full((3, 2), -torch.inf)), part(0))
    watch.see_gradient(1, torch.tensor(3.0))
    assert watch.first() is None
    watch.see_gradient(4, torch.tensor(torch.inf))
    found = watch.first()
    assert found is not None
    assert (found.kind, found.step) == ("gradient", 4)


def test_a_batch_that_fills_in_for_none_is_not_looked_at() -> None:
    watch = FiniteWatch()
    watch.see_loss(outer(NAN, torch.full((3, 2), NAN)), part(0, num_images=0))
    assert watch.first() is None


class _NoReading(TorchDispatchMode):
    """Inside, no number may go from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


def test_remembering_does_not_wait_for_the_device() -> None:
    watch, logits, norm = FiniteWatch(), torch.zeros(3, 2), torch.tensor(NAN)
    with _NoReading():
        watch.see_loss(outer(NAN, logits), part(0))
        watch.see_gradient(1, norm)
    with pytest.raises(AssertionError, match="waits"), _NoReading():
        watch.first()


def test_the_largest_ratio_since_the_last_look_is_kept() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([weight], lr=0.0, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0)
    ratios = []
    for size in (1.0, 1e-3, 0.5):  # the direction is g / (|g| + 1)
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
        ratios.append((size + 1) / size)
    assert list(optimizer.take_peaks().values()) == pytest.approx([max(ratios)], rel=1e-4)
    assert optimizer.take_peaks() == {}


def history(*shares: float, count: int = 1000) -> list[dict[str, Any]]:
    return [{"robust_acc": {"pgd": share}, "num_examples": count} for share in shares]


def test_a_fall_counts_where_intervals_do_not_meet() -> None:
    low, high = wilson_interval(500, 1000)
    largest = next(n for n in range(500, 0, -1) if wilson_interval(n, 1000)[1] < low)
    assert low < 0.5 < high
    assert falls_in_a_row(history(0.5, largest / 1000), "pgd") == 1
    assert falls_in_a_row(history(0.5, (largest + 1) / 1000), "pgd") == 0
    assert falls_in_a_row(history(0.5, largest / 1000, count=100), "pgd") == 0, "fewer images"


def test_falls_are_counted_in_a_row_from_the_best() -> None:
    assert falls_in_a_row([], "pgd") == 0
    assert falls_in_a_row(history(0.5, 0.3, 0.2, 0.25), "pgd") == 3
    assert falls_in_a_row(history(0.5, 0.3, 0.49, 0.3), "pgd") == 1, "one came back"
    assert falls_in_a_row(history(0.5, 0.3, 0.6), "pgd") == 0, "a new best"
    assert falls_in_a_row(history(0.50, 0.48, 0.47), "pgd", margin=0.02) == 1
