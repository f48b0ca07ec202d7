"""Claims about int8 after a Hadamard rotation; those of every codec are in test_codecs.py."""

from __future__ import annotations

import math

import pytest
import torch

from dat_ds.compression import build_codec
from dat_ds.compression.hadamard import _hadamard, _signs

pytestmark = pytest.mark.fast


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_butterflies_are_the_matrix_and_undo_themselves(size):
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = torch.randn(3, 5, size, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(_hadamard(blocks), blocks @ matrix.double())
    torch.testing.assert_close(_hadamard(_hadamard(blocks)) / size, blocks)


def test_it_is_unbiased_and_within_its_bound():
    codec = build_codec("int8_hadamard")
    tensor = torch.randn(192, generator=generator()) ** 3
    draws = torch.stack([codec.decode(codec.encode(tensor, generator(i))) for i in range(4000)])
    errors = (draws - tensor).double()
    spread = errors.square().mean(0).sqrt()
    assert bool((errors.mean(0).abs() <= 5 * spread / math.sqrt(4000) + 1e-7).all())
    assert float(errors.square().sum(1).mean()) <= codec.variance_bound(192) * float(
        tensor.double().square().sum()
    )


def test_a_large_entry_costs_less_than_it_does_int8():
    tensor = 0.01 * torch.randn(6400, generator=generator())
    tensor[::64] = 10.0

    def error(name: str) -> float:
        codec = build_codec(name)
        draws = [codec.decode(codec.encode(tensor, generator(i))) for i in range(20)]
        return sum(float((d - tensor).square().sum()) for d in draws)

    assert error("int8_hadamard") < 0.2 * error("int8")


def test_every_process_has_the_same_signs():
    assert torch.equal(_signs(64, torch.device("cpu")), _signs.__wrapped__(64, torch.device("cpu")))
    assert set(_signs(64, torch.device("cpu")).tolist()) == {-1.0, 1.0}


def test_blocks_are_powers_of_two():
    with pytest.raises(ValueError, match="block_size=48 is not valid: write a power"):
        build_codec("int8_hadamard", block_size=48)
