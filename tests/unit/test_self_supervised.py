"""Claims about what needs no label: views, NT-Xent, feature distances, and their attacks."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.testing import assert_close

from dat_ds.attacks import (
    InputGradient,
    SampleGenerator,
    ThreatModel,
    feature_distance,
    nt_xent,
    pgd,
)
from dat_ds.objectives import build_objective, random_view, rotations

pytestmark = pytest.mark.fast

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
VIEWS = {"crop_area": 0.2, "color_jitter": 0.5, "flip": 0.5}
AS_IT_IS = {"crop_area": 1.0, "color_jitter": 0.0, "flip": 0.0}


def features(seed: int = 0, rows: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator, dtype=torch.float64)


def counted(rows: int = 8) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def images(count: int = 4, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, channels, 8, 8, generator=generator)


def plain_nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, eq. 1, one view at a time."""
    losses = []
    for i in range(len(z)):
        s = F.cosine_similarity(z[i : i + 1], z) / temperature
        rest = torch.cat([s[:i], s[i + 1 :]])
        losses.append(-(s[i ^ 1].exp() / rest.exp().sum()).log())
    return torch.stack(losses)


# ---- losses


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_the_published_formula(temperature):
    z = features()
    assert_close(nt_xent(z, counted(), temperature), plain_nt_xent(z, temperature), **FLOAT64)


def test_gradients_agree_with_finite_differences():
    z, z_0 = features().requires_grad_(), features(1)
    loss = functools.partial(
        nt_xent, y=counted(), others=(features(2, 4), torch.tensor([0, -1] * 2))
    )
    for function in (loss, functools.partial(feature_distance, y=z_0)):
        assert torch.autograd.gradcheck(function, z, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_views_of_other_ranks_count_as_if_they_were_here():
    z = features(rows=10)
    whole = nt_xent(z, counted(10))
    others = (torch.cat([z[:2], z[6:]]), counted(6))
    assert_close(nt_xent(z[2:6], counted(4), others=others), whole[2:6], **FLOAT64)


def test_a_view_that_only_fills_a_place_changes_nothing():
    z = features(rows=10)
    y = torch.tensor([0, 0, -1, -1, 0, 0, 0, 0, 0, 0])
    kept = [0, 1, 4, 5, 6, 7, 8, 9]
    others = (torch.cat([z[:2], features(5, 3)]), torch.tensor([0, 0, -1, -1, -1]))
    z.requires_grad_()
    loss = nt_xent(z, y)
    assert_close(loss[kept], nt_xent(z[kept], counted()), **FLOAT64)
    assert_close(loss[[2, 3]], torch.zeros(2, dtype=torch.float64))
    with_others = nt_xent(z[kept], counted(), others=others)
    assert_close(with_others, nt_xent(z[kept], counted(), others=(z[:2], counted(2))), **FLOAT64)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isfinite().all()
    assert gradient[[2, 3]].abs().max() == 0
    assert nt_xent(z[:2], torch.tensor([-1, -1])).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nt_xent_of_equal_and_of_zero_features_is_finite(dtype):
    for z in (torch.ones(6, 3, dtype=dtype), torch.zeros(6, 3, dtype=dtype)):
        z.requires_grad_()
        loss = nt_xent(z, counted(6), 0.01)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert_close(loss, torch.full_like(loss, torch.tensor(5.0).log().item()))
        assert gradient.isfinite().all()


# ---- objectives


def test_contrastive_and_its_gradient_are_those_of_the_usual_two_halves_on_digits():
    """First views, then second ones, and cross-entropy with the other view as the class."""
    torch.manual_seed(0)
    x = torch.tensor(load_digits().images[:16, None] / 16, dtype=torch.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    objective = build_objective({"name": "contrastive", "temperature": 0.1, "natural_weight": 0.5})
    views, y = objective.inputs(x, counted(16), generator=SampleGenerator(0, 0))
    natural = views.double()
    adversarial = (natural + 0.1 * torch.randn_like(natural).sign()).clamp(0, 1)

    def two_halves(images: Tensor) -> Tensor:
        z = F.normalize(torch.cat([model(images[0::2]), model(images[1::2])]), dim=1)
        similarity = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        return F.cross_entropy(similarity, torch.arange(32).roll(16))

    ours = objective(model(adversarial), y, model(natural))["loss"]
    theirs = two_halves(adversarial) + 0.5 * two_halves(natural)
    assert_close(ours, theirs, **FLOAT64)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs)]
    assert_close(*gradients, **FLOAT64)


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
def test_contrastive_is_the_weighted_sum_of_its_formula(weight):
    z_adv, z = features(), features(1)
    config = {"name": "contrastive", "natural_weight": weight, "temperature": 0.2}
    objective = build_objective(config)
    terms = objective(z_adv, counted(), z)
    robust, natural = plain_nt_xent(z_adv, 0.2).mean(), plain_nt_xent(z, 0.2).mean()
    assert_close(terms["loss"], robust + weight * natural, **FLOAT64)
    assert_close(terms["robust_loss"], robust, **FLOAT64)
    assert objective.needs_natural_logits == (weight > 0)


def test_fare_is_the_squared_distance_to_the_features_at_the_start():
    z_adv, z_0 = features().requires_grad_(), features(1)
    objective = build_objective({"name": "fare"})
    loss = objective(z_adv, z_0)["loss"]
    assert_close(loss, ((z_adv - z_0) ** 2).sum() / 8, **FLOAT64)
    assert_close(torch.autograd.grad(loss, z_adv)[0], 2 * (z_adv - z_0) / 8, **FLOAT64)
    generator = SampleGenerator(0, 0)
    x, y = objective.inputs(
        images(), counted(4), generator=SampleGenerator(0, 0), reference=torch.sum
    )
    assert torch.equal(x, images())
    assert y == images().sum()
    with pytest.raises(ValueError, match="needs the encoder as it was at the start"):
        objective.inputs(images(), counted(4), generator=generator)


@pytest.mark.parametrize("name", ["contrastive", "fare"])
def test_only_the_loss_carries_a_gradient_and_features_are_taken_in_float32(name):
    z_adv, z = features().half().requires_grad_(), features(1).half().requires_grad_()
    y = features(2).float() if name == "fare" else counted()
    terms = build_objective({"name": name})(z_adv, y, z)
    assert {key for key, term in terms.items() if term.requires_grad} == {"loss"}
    assert terms["loss"].dtype == torch.float32


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"temperature": 0}, r"temperature=0\.0 is not valid: write a number above 0"),
        ({"crop_area": 0}, r"crop_area=0\.0 is not valid: write a number in \(0, 1\]"),
        ({"color_jitter": 2}, r"color_jitter=2\.0 is not valid: write a number in \[0, 1\]"),
        ({"flip": -0.5}, r"flip=-0\.5 is not valid: write a number in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(option, words):
    with pytest.raises(ValueError, match=words):
        build_objective({"name": "contrastive", **option})


# ---- views


def test_rotations_are_numpys_and_numbered_by_quarter_turns():
    x = images()
    turned, y = rotations(x)
    assert y.tolist() == [0, 1, 2, 3] * 4
    for i, turns in enumerate(y.tolist()):
        assert torch.equal(turned[i], torch.rot90(x[i // 4], turns, dims=(1, 2)))
    with pytest.raises(
        ValueError, match="'rotation' turns images by 90 degrees, but these are 8 x 6"
    ):
        rotations(x[..., :6])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_view_is_a_function_of_seed_step_and_index_alone(channels):
    x = images(6, channels)
    whole = random_view(x, SampleGenerator(1, 2, 10), **VIEWS)
    parts = [random_view(x[i : i + 2], SampleGenerator(1, 2, 10 + i), **VIEWS) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.shape == x.shape
    assert 0 <= whole.min() <= whole.max() <= 1
    for other in (SampleGenerator(2, 2, 10), SampleGenerator(1, 3, 10), SampleGenerator(1, 2, 11)):
        assert not torch.equal(whole, random_view(x, other, **VIEWS))


def test_two_views_of_an_image_stand_one_after_the_other_and_differ():
    objective = build_objective({"name": "contrastive"})
    x = images().clone()
    views, y = objective.inputs(x, counted(4), generator=SampleGenerator(0, 0, 5))
    assert views.shape == (8, 3, 8, 8)
    assert y.tolist() == [0] * 8
    assert torch.equal(x, images())
    later, _ = objective.inputs(x[2:], counted(2), generator=SampleGenerator(0, 0, 7))
    assert torch.equal(views[4:], later)
    assert (views[0::2] - views[1::2]).flatten(1).abs().amax(1).min() > 0.05


def test_a_view_without_changes_is_the_image_and_a_mirrored_one_its_mirror_image():
    x = images()
    assert_close(random_view(x, SampleGenerator(0, 0), **AS_IT_IS), x)
    mirrored = random_view(x, SampleGenerator(0, 0), **(AS_IT_IS | {"flip": 1.0}))
    assert_close(mirrored, x.flip(-1))


def test_crops_show_at_least_the_given_area_and_nothing_from_outside():
    position = torch.linspace(-1 + 1 / 64, 1 - 1 / 64, 64)
    column, row = torch.meshgrid(position, position, indexing="xy")
    x = (torch.stack([column, row]).expand(500, 2, 64, 64) + 1) / 2
    views = random_view(x, SampleGenerator(0, 0), **(AS_IT_IS | {"crop_area": 0.3}))
    # A crop of share s spans s * 63 / 64 between the centres of its outer pixels.
    sides = (views.amax((2, 3)) - views.amin((2, 3))) * 64 / 63
    areas = sides.prod(dim=1)
    assert 0.28 < areas.min() < 0.35
    assert 0.95 < areas.max() <= 1.0001
    assert_close(areas.mean(), torch.tensor(0.65), rtol=0, atol=0.03)
    ratio = sides[:, 0] / sides[:, 1]
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4


def test_four_in_five_images_change_colour_and_one_in_five_loses_it():
    x = images(1).expand(2000, 3, 8, 8)
    views = random_view(x, SampleGenerator(0, 0), **(AS_IT_IS | {"color_jitter": 0.5}))
    spread = (views.amax(1) - views.amin(1)).flatten(1).amax(1)
    assert float((spread < 1e-5).double().mean()) == pytest.approx(0.2, abs=0.03)
    unchanged = (views - x).flatten(1).abs().amax(1) < 1e-5
    assert float(unchanged.double().mean()) == pytest.approx(0.2 * 0.8, abs=0.03)


# ---- attacks


def test_the_attack_on_features_of_a_linear_model_finds_the_closed_form():
    weight = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    x = 0.3 + 0.4 * images(4)[:, :, :2, :2]
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False))
    model[1].weight.data.copy_(weight)
    x_adv = pgd(
        model,
        x,
        model(x).detach(),
        threat=ThreatModel("linf", 0.1),
        steps=3,
        step_size=0.1,
        loss="feature_distance",
        generator=SampleGenerator(0, 0),
    )
    distance = feature_distance(model(x_adv), model(x).detach())
    assert_close(distance, torch.full((4,), float(0.1 * weight.abs().sum()) ** 2))


def test_the_attack_raises_the_contrastive_loss_of_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 6))
    objective = build_objective({"name": "contrastive"})
    x, y = objective.inputs(images(6), counted(6), generator=SampleGenerator(0, 0))
    losses = [nt_xent(model(x), y).sum()]
    for steps in (1, 5, 20):
        x_adv = pgd(
            model,
            x,
            y,
            threat=ThreatModel("linf", 0.05),
            steps=steps,
            step_size=0.02,
            random_start=False,
            loss=objective.inner_loss,
        )
        losses.append(nt_xent(model(x_adv), y).sum())
    assert losses == sorted(losses)
    assert losses[-1] > 1.2 * losses[0]


def test_each_images_input_gradient_is_that_of_the_sum_over_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).double()
    x = images(6).double().requires_grad_()
    (true,) = torch.autograd.grad(plain_nt_xent(model(x), 0.5).sum(), x)
    found = InputGradient()(model, x, counted(6), nt_xent)
    assert_close(
        F.normalize(found.flatten(1), dim=1), F.normalize(true.flatten(1), dim=1), **FLOAT64
    )
