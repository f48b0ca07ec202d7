"""Faults planted into a working classifier, as defences and mistakes in the wild look.

Each is a module around ``body`` (pixels to logits) that keeps most of its natural accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fault(nn.Module):
    """A wrapped network."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class LabelLeak(Fault):
    """Remembers images by their exact pixels, and adds to the logit of their label."""

    def __init__(self, body: nn.Module, x: Tensor, y: Tensor, digits: int | None = None) -> None:
        super().__init__(body)
        self.digits = digits
        pairs = zip(x, y, strict=True)
        self.known = {self.key(image): int(label) for image, label in pairs}

    def key(self, image: Tensor) -> bytes:
        image = image.detach().float()
        image = image if self.digits is None else image.round(decimals=self.digits) + 0.0
        return image.cpu().numpy().tobytes()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        bonus = torch.zeros_like(logits)
        for row, image in enumerate(x):
            if (label := self.known.get(self.key(image))) is not None:
                bonus[row, label] = 30.0
        return logits + bonus


class Scaled(Fault):
    """Logits times a factor."""

    def __init__(self, body: nn.Module, factor: float) -> None:
        super().__init__(body)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor


class Noisy(Fault):
    """Gaussian noise on the pixels in every forward."""

    def __init__(self, body: nn.Module, sigma: float) -> None:
        super().__init__(body)
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.sigma * torch.randn_like(x))


class Hashed(Fault):
    """Noise that is a function of the pixels: every forward gives the same."""

    def __init__(self, body: nn.Module, sigma: float) -> None:
        super().__init__(body)
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        seeds = (x.detach().double().flatten(1).sum(dim=1) * 1e7).long().tolist()
        noise = [
            torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return self.body(x + self.sigma * torch.stack(noise))


class Rounded(Fault):
    """A rounding layer in the middle: of the logits here, whose gradient is zero."""

    def __init__(self, body: nn.Module, step: float) -> None:
        super().__init__(body)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) / self.step).round() * self.step


class Quantised(Fault):
    """Pixels on a few levels; ``straight_through`` hides that from the gradient."""

    def __init__(self, body: nn.Module, levels: int, straight_through: bool = False) -> None:
        super().__init__(body)
        self.levels, self.straight_through = levels, straight_through

    def forward(self, x: Tensor) -> Tensor:
        quantised = (x * (self.levels - 1)).round() / (self.levels - 1)
        if self.straight_through:
            quantised = x + (quantised - x).detach()
        return self.body(quantised)


class Compressed(Fault):
    """Coefficients of a cosine transform of blocks, rounded, as JPEG rounds them."""

    def __init__(
        self, body: nn.Module, step: float, side: int = 4, straight_through: bool = False
    ) -> None:
        super().__init__(body)
        self.straight_through = straight_through
        n = torch.arange(side).float()
        basis = torch.cos(torch.pi * (n + 0.5)[None] * n[:, None] / side) * (2 / side) ** 0.5
        basis[0] /= 2**0.5
        self.step, self.side = step, side
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unfold(2, self.side, self.side).unfold(3, self.side, self.side)
        coefficients = self.basis @ blocks @ self.basis.T
        coefficients = (coefficients / self.step).round() * self.step
        blocks = self.basis.T @ coefficients @ self.basis
        decoded = blocks.transpose(3, 4).reshape(x.shape)
        return self.body(x + (decoded - x).detach() if self.straight_through else decoded)


class Thermometer(Fault):
    """Pixels as counts of the thresholds that they exceed."""

    def __init__(self, body: nn.Module, levels: int) -> None:
        super().__init__(body)
        self.register_buffer("thresholds", (torch.arange(levels) + 0.5) / levels)

    def forward(self, x: Tensor) -> Tensor:
        code = (x[..., None] > self.thresholds).float()
        return self.body(code.mean(dim=-1))


class Detached(Fault):
    """The graph is cut at the pixels; ``share`` of them where it is below 1."""

    def __init__(self, body: nn.Module, share: float = 1.0) -> None:
        super().__init__(body)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if self.share == 1:
            return self.body(x.detach())
        rows = round(x.shape[2] * self.share)
        return self.body(torch.cat([x[:, :, :rows].detach(), x[:, :, rows:]], dim=2))


class Probabilities(Fault):
    """Softmax, log-softmax or sigmoid of the logits."""

    def __init__(self, body: nn.Module, kind: str) -> None:
        super().__init__(body)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        return logits.sigmoid() if self.kind == "sigmoid" else getattr(logits, self.kind)(dim=1)


class Normalised(Fault):
    """Normalises the pixels once more, with no module that shows it."""

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(body)
        shape = (1, -1, 1, 1)
        self.constants = (torch.tensor(mean).view(shape), torch.tensor(std).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.constants[0]) / self.constants[1])


class BatchStatistics(Fault):
    """Every BatchNorm of the body normalises by the batch in any mode; else one at the pixels."""

    def __init__(self, body: nn.Module, mean: float = 0.5, std: float = 0.25) -> None:
        super().__init__(body)
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        norms = [m for m in self.body.modules() if isinstance(m, nn.BatchNorm2d)]
        if not norms:
            channels = torch.ones(x.shape[1])
            weight, bias = self.std * channels, self.mean * channels
            return self.body(F.batch_norm(x, None, None, weight, bias, training=True))
        saved = [(m.running_mean, m.running_var) for m in norms]
        for m in norms:
            m.running_mean = m.running_var = None
        try:
            return self.body(x)
        finally:
            for m, (mean, var) in zip(norms, saved, strict=True):
                m.running_mean, m.running_var = mean, var


class BatchDependent(Fault):
    """Adds to the logits a share of the batch's mean logits."""

    def __init__(self, body: nn.Module, share: float) -> None:
        super().__init__(body)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        return logits + self.share * logits.mean(dim=0)


class Clipped(Fault):
    """Logits within bounds, hard or soft."""

    def __init__(self, body: nn.Module, bound: float, soft: bool = False) -> None:
        super().__init__(body)
        self.bound, self.soft = bound, soft

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        if self.soft:
            return self.bound * (logits / self.bound).tanh()
        return logits.clamp(-self.bound, self.bound)


class Reordered(Fault):
    """Classes in another order than the labels."""

    def __init__(self, body: nn.Module, order: Sequence[int]) -> None:
        super().__init__(body)
        self.order = list(order)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, self.order]


class Shattered(Fault):
    """The right logits with the gradient of a shifted image: a backward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        wrong = self.body(x.roll(3, dims=3))
        return wrong + (self.body(x) - wrong).detach()


class Nearest(Fault):
    """The label of the nearest image that it knows, whatever the network says."""

    def __init__(self, body: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(body)
        self.known, self.labels = x.flatten(1), y

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.known).argmin(dim=1)
        logits = self.body(x)
        return logits + 30.0 * F.one_hot(self.labels[nearest], logits.shape[1])


def digits_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network with BatchNorm, trained on scikit-learn's digits for a second.

    Returns:
        The network in eval mode; test images ``(N, 1, 8, 8)`` in [0, 1]; their labels.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target, dtype=torch.int64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for step in range(150):
            rows = torch.arange(step * 64, step * 64 + 64) * 7 % 1200
            loss = F.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval(), x[1200:1328], y[1200:1328]
