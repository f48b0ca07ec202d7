"""Claims about codecs; expectations are taken over every random number there is, not sampled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dat_ds.compression import (
    CODECS,
    Codec,
    NearestInt8,
    base,
    build_codec,
    natural,
    packing,
    rounding,
    topk,
)

pytestmark = pytest.mark.fast

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CODECS),
    ("int8", {"block_size": None}),
    ("int4", {"block_size": 7}),
    ("qsgd", {"levels": 1, "block_size": 5}),
    ("qsgd", {"levels": 5, "block_size": 32}),
    ("topk", {"ratio": 0.3, "block_size": None}),
    ("topk", {"ratio": 1.0, "block_size": 3}),
    ("sign", {"scale": "rms", "block_size": None}),
]
IDS = [name + "".join(f"-{value}" for value in options.values()) for name, options in OPTIONS]
EVERY = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
ROUNDING = [(name, options) for name, options in OPTIONS if name in ("int8", "int4", "qsgd")]
EVERY_ROUNDING = pytest.mark.parametrize(("name", "options"), ROUNDING)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def through(codec: Codec, tensor: Tensor, seed: int = 0) -> Tensor:
    return codec.decode(codec.encode(tensor, generator(seed)))


def over_all_noise(codec: Codec, tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What each of the 2^16 equally likely noises makes of ``tensor``: ``(2^16, numel)``."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)

    def all_bits(like: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
        return every.view(-1, *[1] * (like.ndim - 1)).expand(like.shape)

    for module in (natural, rounding):
        monkeypatch.setattr(module, "random_bits", all_bits)
    rows = tensor.expand(len(every), -1)
    return codec.decode_rows(codec.encode_rows(rows), tensor.numel()).double()


# ---- the payload


@EVERY
@pytest.mark.parametrize("numel", [0, 1, 2, 7, 64, 65, 1000, 2049])
def test_the_payload_is_bytes_whose_number_depends_on_the_size_alone(name, options, numel):
    codec = build_codec(name, **options)
    for values in (torch.zeros(numel), torch.randn(numel, generator=generator())):
        payload = codec.encode(values, generator())
        assert payload.data.dtype == torch.uint8
        assert payload.data.ndim == 1
        assert codec.num_bytes(payload) == payload.data.numel() == codec.bytes_of(numel)
        decoded = codec.decode(payload)
        assert decoded.shape == values.shape
        assert decoded.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("int8", {}, 8 + 32 / 64),
        ("int4", {}, 4 + 32 / 64),
        ("qsgd", {}, 8 + 32 / 64),
        ("qsgd", {"levels": 7}, 4 + 32 / 64),
        ("qsgd", {"levels": 1}, 2 + 32 / 64),
        ("natural", {}, 9),
        ("topk", {}, 11 / 1024 * 48),
        ("sign", {}, 1 + 32 / 1024),
    ],
)
def test_bits_per_element(name, options, bits):
    assert 8 * build_codec(name, **options).bytes_of(2**16) / 2**16 == bits


@EVERY
def test_a_tensor_keeps_its_shape_and_is_left_alone(name, options):
    tensor = torch.randn(3, 5, 2, generator=generator(), requires_grad=True)
    before = tensor.detach().clone()
    state = torch.get_rng_state()
    assert through(build_codec(name, **options), tensor).shape == (3, 5, 2)
    assert torch.equal(tensor, before)
    assert torch.equal(torch.get_rng_state(), state)


@EVERY
def test_the_generator_decides(name, options):
    codec, tensor = build_codec(name, **options), torch.randn(500, generator=generator())
    first, again, other = (codec.encode(tensor, generator(seed)).data for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) is not codec.unbiased


@EVERY
def test_rows_are_encoded_apart_and_blocks_end_with_them(name, options):
    codec, rows = build_codec(name, **options), torch.randn(3, 70, generator=generator())
    decoded = codec.decode_rows(codec.encode_rows(rows, generator()), 70)
    alone = torch.stack([through(codec, row) for row in rows])
    if codec.unbiased:
        step = rows.norm(dim=1).max()
        assert (decoded - alone).abs().max() <= step
    else:
        assert torch.equal(decoded, alone)


@EVERY
@pytest.mark.parametrize("numel", [640, 1030, 5001])
def test_the_payload_does_not_depend_on_how_much_is_encoded_together(
    name, options, numel, monkeypatch
):
    codec, rows = build_codec(name, **options), torch.randn(3, numel, generator=generator())
    rows[2, numel - 7 :] = 0
    valid = codec.valid_counts(rows != 0)

    def no_noise(like: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
        return torch.zeros(like.shape, dtype=dtype)

    for module in (natural, rounding):
        monkeypatch.setattr(module, "random_bits", no_noise)
    whole = codec.encode_rows(rows, None, valid)
    decoded = codec.decode_rows(whole, numel)
    monkeypatch.setattr(base, "_CACHED_ENTRIES", 1)
    assert whole.shape == (3, codec.bytes_of(numel))
    assert torch.equal(codec.encode_rows(rows, None, valid), whole)
    assert torch.equal(codec.decode_rows(whole, numel), decoded)


@given(
    width=st.sampled_from([1, 2, 4]),
    codes=st.lists(st.lists(st.integers(0, 15), min_size=5, max_size=5), min_size=1, max_size=4),
)
def test_packing_is_undone_by_unpacking(width, codes):
    values = (torch.tensor(codes) % 2**width).to(torch.uint8)
    packed = packing.pack(values, width)
    assert packed.shape == (len(codes), math.ceil(5 * width / 8))
    assert torch.equal(packing.unpack(packed, width, 5), values)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("numel", [1, 3, 8, 9, 255 * 8 + 1])
def test_codes_lie_in_bytes_from_the_lowest_bits_up(width, numel):
    count = math.ceil(numel * width / 8)
    packed = torch.arange(2 * count).remainder(256).to(torch.uint8).view(2, count)
    lanes = 8 // width
    expected = [
        [byte >> width * lane & 2**width - 1 for byte in row for lane in range(lanes)][:numel]
        for row in packed.tolist()
    ]
    codes = packing.unpack(packed, width, numel)
    assert codes.tolist() == expected
    whole = packing.unpack(packed, width, count * lanes)
    assert torch.equal(packing.pack(whole, width), packed)


def test_bits_are_packed_as_numpy_packs_them():
    bits = torch.randint(0, 2, (2, 77), dtype=torch.uint8, generator=generator())
    expected = np.packbits(bits.numpy(), axis=1, bitorder="little")
    assert np.array_equal(packing.pack(bits, 1).numpy(), expected)


# ---- bias and variance


@EVERY_ROUNDING
@settings(max_examples=20, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=9))
def test_rounding_is_unbiased_and_within_its_variance_bound(name, options, values):
    codec, tensor = build_codec(name, **options), torch.tensor(values)
    with pytest.MonkeyPatch.context() as monkeypatch:
        decoded = over_all_noise(codec, tensor, monkeypatch)
    length = tensor.double().norm()
    # Noise has 16 bits, and the scaled entry float32's 24.
    step = length / codec.max_level
    tolerance = step * 2**-17 + 2**-21 * length + 1e-37
    assert (decoded.mean(0) - tensor.double()).abs().max() <= tolerance
    variance = (decoded - tensor.double()).square().sum(1).mean()
    assert variance <= codec.variance_bound(tensor.numel()) * length**2 * (1 + 1e-4) + 1e-70


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_variance_bound_of_rounding_is_attained(name, monkeypatch):
    codec = build_codec(name)
    tensor = torch.full((64,), 0.5)
    tensor[0] = codec.max_level
    variance = over_all_noise(codec, tensor, monkeypatch).sub(tensor).square().sum(1).mean()
    bound = codec.variance_bound(64) * tensor.square().sum()
    # The half-way entries add to the length what the bound leaves out.
    assert 0.7 * bound < variance <= bound * (1 + 1e-6)


@pytest.mark.parametrize("value", [1.0, 4 / 3, -1.7, 1.9999, 3e-39, 1.5e38, 0.0])
def test_natural_compression_is_unbiased_and_within_an_eighth(value, monkeypatch):
    tensor = torch.tensor([value])
    decoded = over_all_noise(build_codec("natural"), tensor, monkeypatch)
    exact = tensor.double()
    assert (decoded.mean() - exact).abs() <= 2.0**-16 * exact.abs() + 2.0**-142
    variance = (decoded - exact).square().mean()
    assert variance <= exact.square() / 8 * (1 + 1e-4) + 2.0**-252
    assert decoded.unique().numel() <= 2
    if value == 1.0:
        assert not variance


def test_natural_compression_attains_its_bound(monkeypatch):
    tensor = torch.tensor([4 / 3])
    decoded = over_all_noise(build_codec("natural"), tensor, monkeypatch)
    assert (decoded - 4 / 3).square().mean() / (4 / 3) ** 2 == pytest.approx(1 / 8, rel=1e-4)


@EVERY
@settings(max_examples=30, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=40))
def test_biased_codecs_are_within_their_bound_for_every_tensor(name, options, values):
    codec, tensor = build_codec(name, **options), torch.tensor(values)
    if codec.unbiased:
        return
    loss = (through(codec, tensor).double() - tensor.double()).square().sum()
    bound = codec.variance_bound(tensor.numel())
    assert loss <= bound * tensor.double().square().sum() * (1 + 1e-5) + 1e-70


def test_the_random_bits_are_uniform():
    like = torch.empty(2**18)
    bits = packing.random_bits(like, torch.int16, generator()).to(torch.float64)
    unit = (bits + 0.5) / 2**16
    assert abs(unit.mean()) * math.sqrt(12 * 2**18) < 4
    assert unit.var() == pytest.approx(1 / 12, rel=0.01)
    for lane in unit.view(-1, 4).T:  # each quarter of a 64-bit word
        assert abs(lane.mean()) * math.sqrt(12 * 2**16) < 4
    lag = (unit[1:] * unit[:-1]).mean() * 12 * math.sqrt(2**18)
    assert abs(lag) < 4


@pytest.mark.parametrize("name", [name for name in CODECS if CODECS[name].unbiased])
def test_means_of_draws_approach_the_tensor_as_they_should(name):
    codec, tensor = build_codec(name), torch.randn(20_000, generator=generator())
    source = generator(1)
    draws = torch.stack([codec.decode(codec.encode(tensor, source)) for _ in range(64)])
    error = (draws.double().mean(0) - tensor).square().sum()
    single = (draws.double() - tensor).square().sum(1).mean()
    # Independent draws: the mean of 64 has a 64th of the variance.
    assert error / single == pytest.approx(1 / 64, rel=0.1)


# ---- accuracy at 8 bits


@pytest.mark.parametrize("name", ["int8", "qsgd"])
@pytest.mark.parametrize("freedom", [None, 1, 1.5, 2, 2.5, 3, 5])
def test_at_8_bits_the_relative_error_is_at_most_3_percent(name, freedom):
    torch.manual_seed(0)
    tensor = torch.randn(2**20)
    if freedom is not None:  # Student-t; infinite variance up to 2, no mean at 1
        tensor = torch.distributions.StudentT(float(freedom)).sample((2**20,))
    tensor *= 1e-4
    error = (through(build_codec(name), tensor) - tensor).norm() / tensor.norm()
    assert error <= 0.03


# ---- what each codec does, on numbers one can check


def test_int8_rounds_to_its_two_neighbours():
    tensor = torch.tensor([127.0, -126.5, 0.25, 0.0, -3.0])
    seen = torch.stack([through(build_codec("int8"), tensor, seed) for seed in range(200)])
    assert [sorted(column.unique().tolist()) for column in seen.T] == [
        [127.0],
        [-127.0, -126.0],
        [0.0, 1.0],
        [0.0],
        [-3.0],
    ]


def test_qsgd_rounds_to_multiples_of_the_norm():
    tensor = torch.tensor([3.0, -4.0])  # norm 5
    seen = torch.stack([through(build_codec("qsgd", levels=1), tensor, s) for s in range(200)])
    assert set(seen[:, 0].tolist()) == {0.0, 5.0}
    assert set(seen[:, 1].tolist()) == {0.0, -5.0}
    assert seen.mean(0).tolist() == pytest.approx([3.0, -4.0], abs=0.6)


def test_qsgd_states_the_bound_of_its_paper():
    assert build_codec("qsgd", levels=1, block_size=None).variance_bound(10_000) == 100
    assert build_codec("qsgd", levels=127, block_size=64).variance_bound(1000) == 64 / 127**2


def test_natural_compression_rounds_to_powers_of_two():
    tensor = torch.tensor([1.0, -0.5, 3.0, -5.0, 0.0])
    seen = torch.stack([through(build_codec("natural"), tensor, seed) for seed in range(100)])
    assert [sorted(column.unique().tolist()) for column in seen.T] == [
        [1.0],
        [-0.5],
        [2.0, 4.0],
        [-8.0, -4.0],
        [0.0],
    ]


def test_natural_compression_carries_into_neither_infinity_nor_the_sign(monkeypatch):
    bits = [0x7F000000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7EFFFFFF]
    tensor = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    tensor = torch.cat([tensor, -tensor])
    decoded = over_all_noise(build_codec("natural"), tensor, monkeypatch)
    expected = torch.tensor([2.0**127] * 2 + [math.inf] * 3, dtype=torch.float64)
    assert torch.equal(decoded[:, :5], expected.expand(len(decoded), -1))
    assert torch.equal(decoded[:, 6:11], -expected.expand(len(decoded), -1))
    assert set(decoded[:, 5].tolist()) <= {2.0**126, 2.0**127}


def test_topk_keeps_the_largest_of_each_block_exactly():
    tensor = torch.tensor([0.1, -9.0, 0.2, 3.0, 0.3, 0.2, -0.1, 0.0])
    codec = build_codec("topk", ratio=0.25, block_size=4)
    assert through(codec, tensor).tolist() == pytest.approx([0, -9, 0, 0, 0.3, 0, 0, 0])


def test_topk_of_one_block_is_the_top_of_the_tensor():
    tensor = torch.randn(40_000, generator=generator())
    decoded = through(build_codec("topk", ratio=0.01, block_size=None), tensor)
    kept = decoded != 0
    assert kept.sum() == 400
    assert torch.equal(decoded[kept], tensor[kept])
    assert tensor[kept].abs().min() >= tensor[~kept].abs().max()


@pytest.mark.parametrize("size", [1024, 1000, 96, 7])
@pytest.mark.parametrize("kept", [1, 3, 7])
def test_the_largest_of_groups_are_the_largest_of_all(size, kept):
    blocks = torch.randn(2, 30, size, generator=generator())
    blocks[0] = blocks[0].round()  # ties
    blocks[1, :, :4] = torch.tensor([math.inf, math.nan, -math.inf, 3e38])
    places = topk._largest(blocks, kept)
    assert places.shape == (2, 30, kept)
    assert all(len(set(row)) == kept for row in places.flatten(0, 1).tolist())
    found = blocks.abs().gather(2, places).sort(dim=2, descending=True).values
    expected = blocks.abs().sort(dim=2, descending=True).values[:, :, :kept]
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(("scale", "value"), [("mean", 3.5), ("rms", 5 / math.sqrt(2))])
def test_sign_sends_one_scale_per_block(scale, value):
    tensor = torch.tensor([3.0, -4.0, 3.0, -4.0, 8.0])
    decoded = through(build_codec("sign", scale=scale, block_size=4), tensor)
    assert decoded.tolist() == pytest.approx([value, -value, value, -value, 8.0])


def test_padding_does_not_enter_the_scale_of_sign():
    codec = build_codec("sign", block_size=4)
    rows = torch.tensor([[3.0, -4.0, 2.0, 5.0, 6.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    decoded = codec.decode_rows(codec.encode_rows(rows, None, codec.valid_counts(mask)), 5)
    assert decoded[0].tolist() == pytest.approx([3.5, -3.5, 3.5, 3.5, 6.0])
    assert decoded[1, 0] == 1


def test_rounding_to_the_nearest_level_needs_no_random_numbers_and_errs_least():
    tensor = torch.randn(10_000, generator=generator())
    nearest, random = NearestInt8(), build_codec("int8")
    payload = nearest.encode(tensor, generator(1))
    assert torch.equal(payload.data, nearest.encode(tensor, generator(2)).data)
    assert payload.data.numel() == random.bytes_of(10_000)
    blocks = F.pad(tensor, (0, -10_000 % 64)).view(-1, 64)
    step = blocks.abs().amax(dim=1, keepdim=True) / 127
    expected = ((blocks / step).round() * step).flatten()[:10_000]
    assert torch.allclose(nearest.decode(payload), expected, atol=1e-5)


# ---- extreme tensors


@EVERY
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(100),
        torch.full((300,), 1e38) * torch.arange(300).sub(150).sign(),
        torch.full((70,), 1e-38),
        torch.full((70,), 1e-44),
        torch.tensor([1e38, 1e-38, 0.0, -1.0]),
        torch.tensor([torch.finfo(torch.float32).max] * 3),
    ],
    ids=["zero", "huge", "tiny", "denormal", "mixed", "largest"],
)
def test_finite_tensors_stay_finite(name, options, tensor):
    codec = build_codec(name, **options)
    decoded = through(codec, tensor)
    assert decoded.isfinite().all()
    if not tensor.any():
        assert not decoded.any()
    else:
        assert decoded.abs().max() <= 20 * tensor.abs().max() + 2e-38


@EVERY
def test_one_element_is_kept_to_its_power_of_two_or_exactly(name, options):
    decoded = through(build_codec(name, **options), torch.tensor([0.375]))
    assert decoded.item() in (0.25, 0.5) if name == "natural" else decoded.item() == 0.375


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_stay_visible_and_other_blocks_stay_clean(name, options, bad):
    codec = build_codec(name, **options)
    tensor = torch.randn(3000, generator=generator())
    tensor[1] = bad
    decoded = through(codec, tensor)
    assert not decoded[:1024].isfinite().all()
    if options.get("block_size", 1) is not None:
        assert decoded[1024:].isfinite().all()


# ---- building


def test_codecs_are_built_by_name_with_their_own_options_only():
    for name in CODECS:
        assert build_codec(name).name == name
        assert build_codec(**CODECS[name]().to_dict()) == build_codec(name)
    with pytest.raises(
        ValueError,
        match=r"name='int9' is not valid \(did you mean 'int8'\?\)\. Write one of 'int8', 'int4'",
    ):
        build_codec("int9")
    with pytest.raises(
        ValueError, match=r"block_size=3 is not a setting of the codec 'natural': remove it"
    ):
        build_codec("natural", block_size=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int8", {"block_size": -1}, "block_size=-1 is not valid: write a number of at least 0"),
        ("qsgd", {"levels": 128}, r"levels=128 is not valid: write "),
        ("topk", {"ratio": 0.0}, r"ratio=0\.0 is not valid: write a number in \(0, 1\]"),
        ("sign", {"scale": "max"}, "scale='max' is not valid. Write one of 'mean', 'rms'"),
    ],
)
def test_values_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_codec(name, **options)
