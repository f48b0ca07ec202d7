"""mixup and CutMix: the labels say what the images show, whoever reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dat_ds.data import Augmented, DistributedLoader, Mixed, SampleKey, TensorImages

pytestmark = pytest.mark.fast

CLASSES = 5


def flat_images(side: int = 8) -> Dataset:
    """Image ``i`` is ``i`` grey levels all over, of class ``i``."""
    levels = torch.arange(CLASSES, dtype=torch.uint8).view(-1, 1, 1, 1)
    return TensorImages(levels.expand(-1, 1, side, side).clone(), torch.arange(CLASSES))


def mixed(**alphas: float) -> Mixed:
    chosen = {"mixup": 0.0, "cutmix": 0.0} | alphas
    return Mixed(flat_images(), CLASSES, **chosen, seed=3)


def items(dataset: Mixed, epochs: int = 20) -> list[tuple[Tensor, Tensor]]:
    return [dataset[SampleKey(e, i)] for e in range(epochs) for i in range(CLASSES)]


def expected_level(label: Tensor) -> float:
    return float(label @ torch.arange(CLASSES, dtype=torch.float)) / 255


def test_mixup_labels_are_the_shares_of_the_images() -> None:
    for x, label in items(mixed(mixup=0.4)):
        assert float(label.sum()) == pytest.approx(1)
        assert x.flatten() == pytest.approx(torch.full((64,), expected_level(label)), abs=1e-6)


def test_cutmix_labels_are_the_areas_of_the_images() -> None:
    num_mixed = 0
    for x, label in items(mixed(cutmix=1.0)):
        assert float(label.sum()) == pytest.approx(1)
        assert float(x.mean()) == pytest.approx(expected_level(label), abs=1e-6)
        levels = (255 * x).round().unique()
        assert len(levels) <= 2, "pasted, not blended"
        num_mixed += len(levels) == 2
    assert num_mixed > 40


def test_shares_follow_the_beta_distribution() -> None:
    # Of the own class, where the partner is another; Beta(a, a) has variance 1 / (4 (2 a + 1)).
    shares = torch.tensor(
        [
            label[i]
            for e in range(600)
            for i in range(CLASSES)
            for _, label in [mixed(mixup=0.5)[SampleKey(e, i)]]
            if int((label > 0).sum()) == 2
        ]
    )
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / 8, abs=0.01)


def test_with_both_each_image_gets_one_of_them() -> None:
    kinds = {"blended": 0, "pasted": 0}
    for x, label in items(mixed(mixup=1.0, cutmix=1.0), epochs=60):
        if int((label > 1e-6).sum()) == 2:
            kinds["pasted" if len(x.unique()) == 2 else "blended"] += 1
    assert 0.3 < kinds["pasted"] / sum(kinds.values()) < 0.7


def test_batches_do_not_depend_on_ranks_or_workers() -> None:
    data = Mixed(Augmented(flat_images(), "crop", 0), CLASSES, mixup=0.4, cutmix=1.0, seed=1)

    def batches(ranks: int, **options: int) -> tuple[Tensor, Tensor]:
        parts = []
        for rank in range(ranks):
            loader = DistributedLoader(
                data, micro_batch=4 // ranks, rank=rank, ranks=ranks, **options
            )
            parts.append(list(loader))
        pairs = [pair for step in zip(*parts, strict=True) for pair in step]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

    x, y = batches(1)
    assert y.shape == (CLASSES, CLASSES)
    assert y.dtype == torch.float32
    for other in (batches(2), batches(1, num_workers=1)):
        assert torch.equal(other[0], x)
        assert torch.equal(other[1], y)
    again = [data[SampleKey(1, i)][0] for i in range(CLASSES)]
    assert not all(torch.equal(a, data[i][0]) for i, a in enumerate(again)), "epochs differ"
