"""The attack's forwards in a shorter float than the update's.

Only the sign or direction of the attack's gradient moves pixels, and pixels themselves stay
float32, so the attack tolerates less precision than the update.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dat_ds.attacks.gradient import Model
from dat_ds.attacks.passes.quantized import is_format, multiplied, quantized_linears
from dat_ds.errors import ConfigError

Precision = Literal["bf16", "fp16", "int8", "fp8"]
PRECISIONS: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""The float to which a precision autocasts; in 8 bits are the products of linear layers alone."""

_PRODUCT = 512  # rows and columns of the matrices of the first probe
_ROUNDS = 3


@contextlib.contextmanager
def shorter_floats(model: Model, precision: Precision) -> Iterator[Model]:
    """``model`` with its forwards, and so their backwards, in ``precision``, until exit.

    Args:
        model: A module with frozen parameters, or a callable with the module as its ``module``.
        precision: See :data:`PRECISIONS`.

    Raises:
        ConfigError: In 8 bits, where the model has no linear layer for it.
    """

    def shortened(images: Tensor) -> Tensor:
        with autocast(images.device, precision):
            return model(images)

    with contextlib.ExitStack() as stack:
        if is_format(precision):
            stack.enter_context(quantized_linears(model, precision))
        yield shortened


@contextlib.contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Autocast for ``precision``, with the attention that is fast in it."""
    with torch.autocast(device.type, dtype=PRECISIONS[precision]), fast_attention(device):
        yield


def fast_attention(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The attention that is fast in shorter floats, also where a backward computes it again.

    On a CPU that is the plain one: the backward of torch's fused attention in bfloat16 takes four
    times as long there as in float32, the plain one's matrix products half as long.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def product_speedup(device: torch.device, precision: Precision) -> float:
    """How much faster a CPU multiplies matrices in ``precision`` than in float32.

    A processor without instructions for it can be tens of times slower; this takes milliseconds.
    """
    matrix = torch.ones(_PRODUCT, _PRODUCT, device=device)
    half = matrix.to(PRECISIONS[precision])
    return _speedup(lambda: matrix @ matrix, lambda: half @ half, device)


def check_device(device: torch.device, precision: Precision) -> None:
    """Refuse 8 bits on a device that has no products in them.

    Raises:
        ConfigError: With what torch says of it.
    """
    if not is_format(precision):
        return
    matrix = torch.ones(32, 32, device=device)
    try:
        multiplied(matrix, matrix, precision)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"dat.attack.precision={precision!r}: this device cannot multiply so ({reason}). Write "
            "'bf16', or 'auto'."
        ) from None


def gradient_speedup(model: Model, x: Tensor, precision: Precision) -> float:
    """How much faster input gradients of ``model`` at ``x`` are in ``precision``.

    Args:
        model: Frozen, in the mode of the attack. Called ``2 * (1 + 3)`` times, whatever comes out.
        x: Images ``(B, C, H, W)``, float32.
        precision: Compared with the precision in which ``model`` runs by itself.
    """

    def gradient(called: Model) -> None:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(called(leaf).float().sum(), leaf)

    with shorter_floats(model, precision) as shortened:
        return _speedup(lambda: gradient(model), lambda: gradient(shortened), x.device)


def _speedup(
    plain: Callable[[], object], shorter: Callable[[], object], device: torch.device
) -> float:
    """Least time of ``plain`` over that of ``shorter``, run in turn."""
    best = [float("inf"), float("inf")]
    for run in range(1 + _ROUNDS):
        for index, function in enumerate((plain, shorter)):
            _wait_for(device)
            start = time.perf_counter()
            function()
            _wait_for(device)
            if run:
                best[index] = min(best[index], time.perf_counter() - start)
    return best[0] / best[1]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
