"""Gradients of an inner loss with respect to the pixels, in any precision.

Only the direction of a sample's gradient matters to an attack, so each sample's gradient may be
scaled freely. The gradient at the logits is computed in float64 and scaled per sample by a power of
two, which is exact, before it goes back through the network: a float16 network then neither
underflows for confident samples nor needs a loss scale, and a float32 network gives the direction
that the unscaled gradient has.

Shapes: ``B`` batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dat_ds.attacks.losses import InnerLoss
from dat_ds.attacks.projections import per_sample
from dat_ds.errors import ModelError

Model = Callable[[Tensor], Tensor]
"""Pixels ``(B, C, H, W)`` float32 to logits ``(B, K)``."""

_LOG2_SCALE = 6  # the largest entry of each sample's logit gradient lands in [2^5, 2^6)
_RETRY_FACTOR = 2.0**-6
_MAX_RETRIES = 3
_NO_GRADIENT = (
    "The model's outputs carry no gradient to its images, so there is nothing to attack: take "
    "torch.no_grad, torch.inference_mode, detach or NumPy out of its forward (frozen parameters "
    "need none of them), or attack it by a function of your own."
)


def logit_gradient(logits: Tensor, y: Tensor, loss: InnerLoss) -> tuple[Tensor, Tensor]:
    """Gradient of each sample's loss at the logits, scaled per sample by a power of two.

    Args:
        logits: Shape ``(B, K)``, any floating dtype; not differentiated through.
        y: Labels as ``loss`` takes them.
        loss: Per-sample inner loss.

    Returns:
        The float64 gradient ``(B, K)`` whose largest entry per sample lies in ``[2^5, 2^6)`` (zero
        where the loss is flat), and the float64 loss of each sample ``(B,)``.
    """
    leaf = logits.detach().double().requires_grad_()
    with torch.enable_grad():
        values = loss(leaf, y.double() if y.is_floating_point() else y)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    largest = gradient.abs()
    if gradient.ndim > 1:
        largest = largest.amax(dim=tuple(range(1, gradient.ndim)), keepdim=True)
    _, exponent = torch.frexp(largest)
    # A float64 exponent: older torch raises 2 to an integer one in float32, which overflows.
    return torch.ldexp(gradient, (_LOG2_SCALE - exponent).double()), values.detach()


def has_reentrant_checkpoint(output: Tensor) -> bool:
    """Whether the graph of ``output`` holds a reentrant activation checkpoint.

    ``torch.autograd.grad`` refuses those, from ``torch.utils.checkpoint`` with
    ``use_reentrant=True`` and from ``deepspeed.checkpointing`` alike.
    """
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        pending.extend(parent for parent, _ in node.next_functions)
    return False


def finite_samples(gradient: Tensor) -> Tensor:
    """Whether each sample's gradient ``(B, ...)`` is finite: ``(B,)``."""
    # The largest entry is infinite or NaN where any is. (An infinity norm takes ten times as long.)
    return gradient.flatten(1).abs().amax(dim=1).isfinite()


def _forward(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with a graph, and the leaf that they are differentiated by.

    Raises:
        ModelError: They have no gradient.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
    if not logits.requires_grad:
        raise ModelError(_NO_GRADIENT)
    return logits, leaf


def _agree_locally(flag: Tensor) -> bool:
    return bool(flag)


@dataclass
class InputGradient:
    """Takes input gradients of ``loss`` and counts what went wrong.

    One instance serves one model in one mode: whether its graph holds a reentrant checkpoint is
    looked up on the first call.

    Args:
        retry_non_finite: Take a gradient with non-finite entries again at a smaller scale, up to 3
            times. Only a 16-bit float with few exponent bits (float16) needs it; it costs one
            host synchronisation per gradient, so it is off otherwise.
        agree: Turns a rank's 0-dim bool tensor "mine was not finite" into the decision of all
            ranks, so that every rank does the same number of forwards. Default: decide alone.

    Attributes:
        num_zero: Gradient entries that were exactly zero, 0-dim float64 tensor, summed over calls.
        num_entries: Gradient entries looked at.
        num_non_finite: Samples whose gradient stayed non-finite and was set to zero, 0-dim tensor.
        num_samples: Samples looked at.
        num_retries: Gradients taken again.
    """

    retry_non_finite: bool = False
    agree: Callable[[Tensor], bool] = _agree_locally
    num_zero: Tensor | None = field(default=None, init=False)
    num_non_finite: Tensor | None = field(default=None, init=False)
    num_entries: int = field(default=0, init=False)
    num_samples: int = field(default=0, init=False)
    num_retries: int = field(default=0, init=False)
    _uses_backward: bool | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, model: Model, x: Tensor, y: Tensor, loss: InnerLoss) -> Tensor:
        """Direction-preserving gradient of each sample's ``loss`` at ``x``.

        One forward and one input-gradient backward; parameters get no gradient, provided that they
        are frozen (see :func:`dat_ds.attacks.attack_mode`).

        Args:
            model: Pixels to logits.
            x: Images ``(B, C, H, W)``, float32; not modified.
            y: Labels as ``loss`` takes them.
            loss: Per-sample inner loss.

        Returns:
            Float32 like ``x``: the gradient times a positive factor per sample; zero for samples
            whose gradient is not finite.
        """
        return self.with_values(model, x, y, loss)[0]

    def with_values(
        self, model: Model, x: Tensor, y: Tensor, loss: InnerLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`__call__` with what its forward found besides.

        Returns:
            The gradient; each sample's loss ``(B,)`` float64; the logits ``(B, K)``, detached.
        """
        scale = 1.0
        for attempt in range(1 + (_MAX_RETRIES if self.retry_non_finite else 0)):
            self.num_retries += attempt > 0
            gradient, values, logits = self._gradient(model, x, y, loss, scale)
            finite = finite_samples(gradient)
            if not self.retry_non_finite or not self.agree(~finite.all()):
                break
            scale *= _RETRY_FACTOR
        return self.count(gradient, finite), values, logits

    def of_margins(
        self, model: Model, x: Tensor, y: Tensor, others: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Margins ``z_other - z_y`` and their gradients at ``x``, which are not rescaled.

        One forward, and one input-gradient backward for each column; none is taken again.

        Args:
            model: Pixels to logits.
            x: Images ``(B, C, H, W)``, float32; not modified.
            y: Class indices ``(B,)`` int64.
            others: Class indices ``(B, T)`` int64, none of them the sample's ``y``.

        Yields:
            For each column the margins ``(B,)`` float64 and their gradients like ``x``, zero for
            samples whose gradient is not finite.
        """
        logits, leaf = _forward(model, x)
        scale = 2.0**_LOG2_SCALE
        away = torch.zeros_like(logits).scatter_(1, y.unsqueeze(1), -scale)
        columns = others.unsqueeze(2).unbind(dim=1)
        for number, other in enumerate(columns, start=1):
            is_last = number == len(columns)
            cotangent = away.scatter(1, other, scale)
            gradient = self._pulled_back(logits, leaf, cotangent, keeps_graph=not is_last)
            margins = (logits.detach().double() * (cotangent.double() / scale)).sum(dim=1)
            yield margins, self.count(gradient, finite_samples(gradient)) / scale

    def _gradient(
        self, model: Model, x: Tensor, y: Tensor, loss: InnerLoss, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, leaf = _forward(model, x)
        cotangent, values = logit_gradient(logits, y, loss)
        cotangent = (cotangent * scale).to(logits.dtype)
        return self._pulled_back(logits, leaf, cotangent), values, logits.detach()

    def _pulled_back(
        self, logits: Tensor, leaf: Tensor, cotangent: Tensor, keeps_graph: bool = False
    ) -> Tensor:
        """The gradient at ``leaf`` for one at the logits."""
        if self._uses_backward is None:
            self._uses_backward = has_reentrant_checkpoint(logits)
        if self._uses_backward:
            leaf.grad = None
            torch.autograd.backward(logits, cotangent, retain_graph=keeps_graph)
            gradient = leaf.grad
        else:
            (gradient,) = torch.autograd.grad(
                logits, leaf, cotangent, retain_graph=keeps_graph, allow_unused=True
            )
        if gradient is None:
            raise ModelError(_NO_GRADIENT)
        return gradient

    def count(self, gradient: Tensor, finite: Tensor) -> Tensor:
        """Count a gradient ``(B, ...)`` and set it to zero for samples that are not finite.

        Args:
            gradient: Overwritten.
            finite: Whether each sample's gradient is finite ``(B,)``.

        Returns:
            ``gradient``.
        """
        # On a CPU it costs nothing to ask, and a pass over the gradient not to.
        if gradient.device.type != "cpu" or not bool(finite.all()):
            gradient.masked_fill_(~per_sample(finite, gradient), 0.0)
        num_zero = (gradient.numel() - gradient.count_nonzero()).double()
        num_non_finite = (~finite).sum().double()
        self._add(num_zero, num_non_finite)
        self.num_entries += gradient.numel()
        self.num_samples += len(gradient)
        return gradient

    def add_counts(self, other: "InputGradient") -> None:
        """Add what ``other`` has counted; its tensors may be overwritten afterwards."""
        if other.num_zero is not None and other.num_non_finite is not None:
            self._add(other.num_zero, other.num_non_finite)
        self.num_entries += other.num_entries
        self.num_samples += other.num_samples
        self.num_retries += other.num_retries

    def _add(self, num_zero: Tensor, num_non_finite: Tensor) -> None:
        self.num_zero = num_zero + (0 if self.num_zero is None else self.num_zero)
        before = 0 if self.num_non_finite is None else self.num_non_finite
        self.num_non_finite = num_non_finite + before
