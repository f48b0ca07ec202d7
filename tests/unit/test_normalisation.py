"""Claims about models of pixels: float32 normalisation inside, whatever the type of the body."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dat_ds.models import PixelModel
from tests.unit.model_helpers import pixels

pytestmark = pytest.mark.fast


class Recorder(nn.Module):
    """A body that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.mean(dim=(2, 3)) * self.scale


def recorder_model() -> PixelModel:
    return PixelModel(Recorder(), num_classes=1, mean=[0.4914], std=[0.2471])


def test_body_receives_pixels_minus_mean_over_std() -> None:
    model, x = recorder_model(), pixels()
    model(x)
    torch.testing.assert_close(model.body.seen, (x - 0.4914) / 0.2471)


def test_each_channel_has_its_own_mean_and_std() -> None:
    model = PixelModel(Recorder(), num_classes=3, mean=[0.0, 0.5, 1.0], std=[1.0, 2.0, 4.0])
    model(torch.ones(1, 3, 2, 2))
    assert model.body.seen[0, :, 0, 0].tolist() == [1.0, 0.25, 0.0]


def test_cast_to_a_bfloat16_body_happens_after_float32_normalisation() -> None:
    model, x = recorder_model().bfloat16(), pixels()
    model(x)
    assert model.body.seen.dtype == torch.bfloat16
    assert torch.equal(model.body.seen, ((x - 0.4914) / 0.2471).bfloat16())


def test_mean_and_std_stay_exact_when_the_model_is_cast_to_16_bits() -> None:
    exact = recorder_model().normalize.mean
    for cast in (recorder_model().bfloat16(), recorder_model().half(), recorder_model().double()):
        assert cast.normalize.mean.dtype == torch.float32
        assert torch.equal(cast.normalize.mean, exact)


def test_body_input_stays_float32_under_autocast() -> None:
    model = recorder_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pixels())
    assert model.body.seen.dtype == torch.float32


def test_bfloat16_pixels_would_leave_the_eps_ball_and_ours_do_not() -> None:
    x = torch.linspace(0.5, 0.9, 64).reshape(1, 1, 8, 8)
    eps = 8 / 255
    adversarial = x + eps
    assert ((adversarial.bfloat16().float() - x).abs() > eps + 1e-3).any()
    model = PixelModel(Recorder(), num_classes=1, mean=[0.0], std=[1.0])
    model(adversarial)
    # 1e-6: rounding of the float32 sum and difference.
    assert (model.body.seen - x).abs().max() <= eps + 1e-6


def test_model_moves_to_the_meta_device() -> None:
    assert recorder_model().to("meta").normalize.mean.device.type == "meta"
