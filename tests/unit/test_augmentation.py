"""Augmentation by libraries' transforms: functions of (seed, epoch, index), and what they say."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from dat_ds.config import load_config
from dat_ds.data import (
    AUGMENTATIONS,
    Augmented,
    DatasetMethod,
    DistributedLoader,
    SampleKey,
    TensorImages,
    build_data,
)
from dat_ds.data.method import is_rand_augment
from dat_ds.data.policies import (
    COLOUR_BIASED,
    IDBH_ERASING,
    NoiseErasing,
    Policy,
    _posterize,
    changed,
    color_or_shape,
    policy_of,
    seeded_globals,
    to_image,
    to_pixels,
)
from dat_ds.data.sampler import derive_seed, seeded_generator
from dat_ds.data.transforms import cropshift
from dat_ds.errors import ConfigError, DataError
from tests.settings import settings_of

pytestmark = pytest.mark.fast

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
POLICIES: dict[str, dict[str, Any]] = {
    "rand_augment": {"augment": "crop_flip", "rand_augment": "rand-m9-mstd0.5-inc1"},
    "weighted": {"rand_augment": "rand-m7-n3-p0.9-mstd101-tweights"},
    "trivial_augment": {"augment": "crop", "trivial_augment": True},
    "color_jitter": {"augment": "resized_crop_flip", "color_jitter": 0.4},
    "random_erasing": {"random_erasing": 0.9},
    "all": {"rand_augment": "rand-m9", "color_jitter": 0.4, "random_erasing": 0.5},
    "cropshift_flip": {"augment": "cropshift_flip"},
    "idbh_weak": {"augment": "idbh_weak"},
    "idbh_strong": {"augment": "idbh_strong"},
}


def levels(count: int = 8, channels: int = 3, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, side, side), generator=generator).to(torch.uint8)


def data_of(options: dict[str, Any], channels: int = 3) -> Any:
    return build_data(
        "synthetic",
        num_train=12,
        num_test=4,
        image_shape=[channels, 16, 16],
        validation_fraction=0.0,
        seed=3,
        **options,
    ).train


def policy(**options: Any) -> Policy:
    chosen = load_config(
        {
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "dat": {"data": {**settings_of("data", "synthetic"), **options}},
        }
    ).dat.data
    found = policy_of(chosen, (3, 32, 32), (MEAN, STD))
    assert found is not None
    return found


# --- the contract


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_a_function_of_seed_epoch_and_index(name: str, channels: int) -> None:
    data = data_of(POLICIES[name], channels)
    keys = [SampleKey(epoch, index) for epoch in range(3) for index in range(12)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    forward = [data[key][0] for key in keys]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    backward = [data[key][0] for key in reversed(keys)][::-1]
    for x, again in zip(forward, backward, strict=True):
        assert torch.equal(x, again)
        assert x.shape == (channels, 16, 16)
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() <= 1
    by_epoch = torch.stack(forward).unflatten(0, (3, 12))
    assert not torch.equal(by_epoch[0], by_epoch[1])


@pytest.mark.parametrize("name", ["all", "idbh_strong"])
def test_batches_do_not_depend_on_ranks_workers_or_an_interruption(name: str) -> None:
    data = data_of(POLICIES[name])

    def batches(ranks: int, start: int = 0, **options: int) -> Tensor:
        parts = []
        for rank in range(ranks):
            loader = DistributedLoader(
                data, micro_batch=6 // ranks, rank=rank, ranks=ranks, **options
            )
            loader.set_position(1, start)
            parts.append([x for x, _ in loader])
        return torch.cat([x for step in zip(*parts, strict=True) for x in step])

    whole = batches(1)
    assert len(whole) == 12
    for ranks in (2, 3):
        assert torch.equal(batches(ranks), whole)
    assert torch.equal(batches(1, num_workers=2), whole)
    assert torch.equal(batches(1, start=1), whole[6:])


def test_without_a_policy_pixels_are_what_they_were() -> None:
    images = TensorImages(levels(), torch.zeros(8))
    plain = Augmented(images, "crop_flip", seed=1)
    erased = Augmented(
        images, "crop_flip", seed=1, policy=Policy((), (NoiseErasing(1.0, MEAN, STD),))
    )
    assert plain.policy is None
    shares = [(plain[i][0] == erased[i][0]).float().mean() for i in range(8)]
    assert all(0.5 < share < 1 for share in shares), "the same crop and flip, but for a box"


def test_seeding_restores_the_generators_after_an_error() -> None:
    random.gauss(0, 1)  # leaves a second draw behind, which is a part of the state
    before = random.getstate(), torch.get_rng_state()

    def fail() -> None:
        with seeded_globals(2**63 - 1):
            random.random()
            torch.rand(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_another_seed_is_another_draw_in_all_three_generators() -> None:
    def drawn(seed: int) -> tuple[float, float, float]:
        with seeded_globals(seed):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(7) == drawn(7)
    assert all(a != b for a, b in zip(drawn(0), drawn(1), strict=True))
    # torch's generator of the CPU reads the lower half of a seed alone; seeds are hashes.
    assert all(a != b for a, b in zip(drawn(0)[:2], drawn(1 << 62)[:2], strict=True))


def test_of_torch_alone_the_others_are_left_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), float(np.random.rand())
    random.seed(1)
    np.random.seed(1)
    with seeded_globals(3, only_torch=True):
        drawn = float(torch.rand(()))
        assert (random.random(), float(np.random.rand())) == expected
    with seeded_globals(3):
        assert float(torch.rand(())) == drawn


@pytest.mark.parametrize("name", ["trivial_augment", "color_jitter", "idbh_strong"])
def test_policies_of_torch_alone_draw_from_it_alone(name: str) -> None:
    data = data_of(POLICIES[name])
    assert data.policy.only_torch
    states = random.getstate(), np.random.get_state()[1].tolist()
    for epoch in range(20):
        data[SampleKey(epoch, 0)]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]


# --- what the transforms are


def expected_image(transform: Any, x: Tensor, seed: int) -> Tensor:
    """A library's transform of 8-bit images, called with generators that were seeded likewise."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)
    pixels = vision.pil_to_tensor(transform(vision.to_pil_image(x)))
    return pixels.to(torch.float32) / 255


@pytest.mark.parametrize(
    ("options", "transform"),
    [
        (
            {"rand_augment": "rand-m9-mstd0.5-inc1"},
            rand_augment_transform(
                "rand-m9-mstd0.5-inc1", {"translate_const": 14, "img_mean": (102, 128, 153)}
            ),
        ),
        ({"trivial_augment": True}, transforms.TrivialAugmentWide()),
        ({"color_jitter": 0.3}, transforms.ColorJitter(0.3, 0.3, 0.3)),
    ],
)
def test_a_policy_is_the_library_s_own_function_with_that_seed(
    options: dict[str, Any], transform: Any
) -> None:
    ours = policy(**options)
    num_changed = 0
    for seed, image in enumerate(levels()):
        seed = derive_seed("test", seed)
        found = ours(image.to(torch.float32) / 255, seed)
        assert torch.equal(found, expected_image(transform, image, seed))
        num_changed += not torch.equal(found, image / 255)
    assert num_changed >= 4


def test_the_strongest_posterize_keeps_no_bits() -> None:
    # Pillow 13 refuses 0 bits, which timm asks for at magnitude 10.
    strongest = policy(rand_augment="rand-m10-n9-p1-inc1")
    for seed in range(60):
        assert strongest(torch.rand(3, 8, 8), seed).shape == (3, 8, 8)
    image = to_image(torch.rand(3, 4, 4))
    assert torch.equal(to_pixels(_posterize(image, 0)), torch.zeros(3, 4, 4))
    assert _posterize(image, 3) == posterize(image, 3)
    assert _posterize(image, 8) == image


def test_erasing_is_timm_s_on_a_normalised_image() -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    ours, theirs = policy(random_erasing=0.7), RandomErasing(0.7, mode="pixel", device="cpu")
    num_erased = 0
    for seed in range(40):
        x = torch.rand(3, 32, 32)
        found = ours(x, seed)
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        expected = theirs(((x - mean) / std).clone()) * std + mean
        assert torch.allclose(found, expected.clamp(0, 1), atol=1e-6)
        share = float((found != x).any(dim=0).float().mean())
        num_erased += share > 0
        assert share == 0 or 0.015 < share < 0.36
    assert 18 < num_erased < 37, "of 40, with probability 0.7"


def test_eight_bit_pixels_are_converted_exactly_and_others_rounded() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    for channels in (1, 3):
        x = every.expand(channels, 16, 16) / 255
        assert torch.equal(to_pixels(to_image(x)), x)
    between = torch.full((3, 2, 2), 100.4 / 255)
    assert torch.equal(to_pixels(to_image(between)), torch.full((3, 2, 2), 100 / 255))


# --- IDBH


def test_cropshift_keeps_a_part_and_moves_it() -> None:
    image = torch.arange(1, 32 * 32 + 1, dtype=torch.float32).view(1, 32, 32)
    windows = image.unfold(1, 1, 1)
    assert windows.shape[1] == 32
    counts: Counter[int] = Counter()
    moved = 0
    for draw in range(3300):
        x = cropshift(image, seeded_generator("cropshift", draw))
        rows, columns = (x[0] > 0).any(dim=1), (x[0] > 0).any(dim=0)
        height, width = int(rows.sum()), int(columns.sum())
        top, left = int(rows.int().argmax()), int(columns.int().argmax())
        part = x[0, top : top + height, left : left + width]
        first = int(part[0, 0]) - 1
        row, column = divmod(first, 32)
        assert torch.equal(part, image[0, row : row + height, column : column + width])
        assert float(x.sum()) == pytest.approx(float(part.sum())), "black elsewhere"
        counts[64 - height - width] += 1
        moved += (row, column) != (top, left)
    assert set(counts) == set(range(11)), "from none to ten rows and columns"
    assert all(count == pytest.approx(300, abs=75) for count in counts.values())
    assert moved > 2000


def test_color_or_shape_draws_each_kind_alike_within_its_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[str, float, bool]] = []

    def record(image: Any, name: str, strength: float = 0.0, *, across: bool = False) -> Any:
        drawn.append((name, strength, across))
        return image

    monkeypatch.setattr("dat_ds.data.policies.changed", record)
    with seeded_globals(0):
        for _ in range(4000):
            color_or_shape(None)  # type: ignore[arg-type]
    counts = Counter(name for name, _, _ in drawn)
    assert counts.keys() == COLOUR_BIASED.keys()
    assert all(count == pytest.approx(500, abs=90) for count in counts.values())
    for name, limits in COLOUR_BIASED.items():
        strengths = [strength for other, strength, _ in drawn if other == name]
        if limits is None:
            assert set(strengths) == {0.0}
            continue
        low, high = limits
        assert all(low <= abs(strength) <= high for strength in strengths), name
        assert min(map(abs, strengths)) < low + 0.05 * (high - low) + 1e-9
        assert max(map(abs, strengths)) > high - 0.05 * (high - low) - 1e-9
        assert (min(strengths) < 0) == (name in ("shear", "rotate"))
    assert {s for n, s, _ in drawn if n == "rotate"} == {*range(-10, 0), *range(1, 11)}
    assert {across for name, _, across in drawn if name == "shear"} == {False, True}


def test_each_change_is_torchvision_s() -> None:
    image = to_image(levels(1)[0] / 255)
    for name, expected in {
        "color": vision.adjust_saturation(image, 1.5),
        "brightness": vision.adjust_brightness(image, 1.5),
        "contrast": vision.adjust_contrast(image, 1.5),
        "sharpness": vision.adjust_sharpness(image, 1.5),
    }.items():
        assert changed(image, name, 1.5) == expected
    assert changed(image, "autocontrast") == vision.autocontrast(image)
    assert changed(image, "equalize") == vision.equalize(image)
    assert changed(image, "rotate", 7) == vision.rotate(image, 7)
    degrees = float(np.degrees(0.1))
    for across, shear in ((True, [degrees, 0.0]), (False, [0.0, degrees])):
        expected = vision.affine(image, 0.0, [0, 0], 1.0, shear)
        assert changed(image, "shear", 0.1, across=across) == expected


@pytest.mark.parametrize("name", IDBH_ERASING)
def test_idbh_erases_with_its_probability(name: str) -> None:
    # White images stay white but for what Cropshift, a shear or a rotation leave black at the
    # border; a black box with white all around it is erased.
    white = TensorImages(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(1))
    data = Augmented(white, name, seed=0)
    inside = [data[SampleKey(epoch, 0)][0][:, 13:19, 13:19] for epoch in range(400)]
    share = np.mean([bool((x < 0.5).any()) for x in inside])
    # A box of 2 to 33 percent of the area meets the six central rows and columns in about half of
    # the draws, whatever the policy.
    reached = share / IDBH_ERASING[name]
    assert 0.4 < reached < 0.8


# --- mistakes


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("rand", True),
        ("rand-m9-mstd0.5-inc1", True),
        ("rand-m10-n3-p0.5-mstd101-tweights", True),
        ("rand-t3a", True),
        ("rand-m11", False),
        ("rand-m9-m8", False),
        ("rand-q3", False),
        ("rand-", False),
        ("rand-inc2", False),
        ("original-mstd0.5", False),
        ("", False),
    ],
)
def test_strings_of_rand_augment(text: str, valid: bool) -> None:
    assert is_rand_augment(text) is valid
    if valid:
        rand_augment_transform(text, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rand_augment": "rand-m9-x"}, "rand_augment='rand-m9-x' is not valid: write timm's"),
        ({"random_erasing": 1.5}, r"random_erasing=1.5 is not valid: write a number in \[0, 1\]"),
        (
            {"augment": "idbh_weak", "color_jitter": 0.4, "random_erasing": 0.1},
            "augment='idbh_weak' is a whole policy: remove dat.data.color_jitter, "
            "dat.data.random_erasing",
        ),
        (
            {"rand_augment": "rand-m9", "trivial_augment": True},
            "dat.data.rand_augment='rand-m9' and dat.data.trivial_augment=true are two policies",
        ),
    ],
)
def test_mistakes_name_the_key(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        policy(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rand_augment": "rand-m9"}, "dat.data.rand_augment='rand-m9': works on images of 1 or 3"),
        ({"augment": "idbh_weak"}, "dat.data.augment='idbh_weak': works on images of 1 or 3"),
    ],
)
def test_other_channels_are_refused_by_key(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        data_of(options, channels=4)
    assert data_of({"random_erasing": 0.5}, channels=4)[0][0].shape == (4, 16, 16)


def test_the_config_takes_every_augmentation_there_is() -> None:
    assert get_args(get_type_hints(DatasetMethod)["augment"]) == AUGMENTATIONS


def test_a_policy_beside_idbh_is_a_programmer_s_mistake() -> None:
    with pytest.raises(ValueError, match="is a whole policy"):
        Augmented([], "idbh_weak", 0, policy=Policy())
