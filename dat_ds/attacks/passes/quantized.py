"""Linear layers whose products run in 8 bits while an attack runs.

Rows of the left factor and columns of the right one are scaled by their largest magnitude, rounded
to int8 or to float8 (4 bits of exponent, 3 of mantissa), multiplied by the hardware's instructions
for it, and scaled back; forward and input gradient alike. Scales per token and per channel are
those of LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv 2208.07339), without its treatment of
outliers.

``fp8`` is experimental: it was tested on CPUs, which emulate it, and no GPU has run it yet.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat_ds.errors import ConfigError
from dat_ds.patching import may_be_patched, module_of, patched_forwards

Format = Literal["int8", "fp8"]
FORMATS: tuple[str, ...] = ("int8", "fp8")


def is_format(precision: str) -> TypeGuard[Format]:
    """Whether a precision is one of 8 bits."""
    return precision in FORMATS


_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
_FEWEST_ROWS = 17  # CUDA's product of int8 refuses fewer
_MULTIPLE = 16  # of both sizes of the weight, which the products of both formats ask for


@contextlib.contextmanager
def quantized_linears(model: object, format: Format) -> Iterator[None]:
    """Let the linear layers of ``model`` multiply in 8 bits, until exit.

    Layers whose sizes the instructions do not take, as a classifier of 10 classes, stay as they
    are.

    Args:
        model: A module with frozen parameters, or a callable with the module as its ``module``.
        format: ``int8`` or ``fp8``.

    Raises:
        ConfigError: If there is no layer to quantise.
    """
    layers = quantizable_linears(model)
    if not layers:
        raise ConfigError(
            f"precision={format!r} needs torch.nn.Linear layers whose sizes are multiples of "
            f"{_MULTIPLE}: this model has none."
        )
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]]
    forwards = {layer: functools.partial(_linear, layer, format) for layer in layers}
    with patched_forwards(forwards):
        yield


def quantizable_linears(model: object) -> list[nn.Linear]:
    """Linear layers of ``model``, as :func:`quantized_linears` takes it, whose sizes fit."""
    root = module_of(model)
    modules = () if root is None else root.modules()
    return [m for m in modules if isinstance(m, nn.Linear) and _fits(m)]


def _fits(layer: nn.Linear) -> bool:
    is_plain = type(layer) is nn.Linear and may_be_patched(layer)
    return is_plain and layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0


def _linear(layer: nn.Linear, format: Format, x: Tensor) -> Tensor:
    """The layer at ``x`` ``(..., K)``, in the dtype that autocast gives, else that of ``x``."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < _FEWEST_ROWS:
        return F.linear(x, layer.weight, layer.bias)
    product: Callable[..., Tensor] = _Product.apply
    with torch.autocast(device, enabled=False):
        outputs = product(rows, layer.weight, format).to(dtype)
        if layer.bias is not None:
            outputs = outputs + layer.bias.to(dtype)
    return outputs.reshape(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """``rows @ weight.T`` of ``(M, K)`` and ``(N, K)``, in 8 bits; gradients of the rows alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, format: Format) -> Tensor:
        ctx.weight, ctx.format, ctx.dtype = weight, format, rows.dtype
        return multiplied(rows, weight, format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows = multiplied(gradients[0].contiguous(), ctx.weight.t().contiguous(), ctx.format)
        return rows.to(ctx.dtype), None, None


def multiplied(left: Tensor, right: Tensor, format: Format) -> Tensor:
    """``left @ right.T`` of ``(M, K)`` and ``(N, K)`` in 8 bits, ``(M, N)`` float32.

    A row of either that holds a non-finite entry makes what it enters NaN.
    """
    (codes, scales), (other_codes, other_scales) = (_rounded(t, format) for t in (left, right))
    if format == "int8":
        product = torch._int_mm(codes, other_codes.t()).float()
    else:
        one = torch.ones((), device=left.device)
        product = torch._scaled_mm(
            codes, other_codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        ).float()
    return product.mul_(scales).mul_(other_scales.t())


def _rounded(rows: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Rows ``(M, K)`` in 8 bits, and what each is to be multiplied by ``(M, 1)``."""
    rows = rows.float()
    largest = _LARGEST[format]
    scales = rows.abs().amax(dim=1, keepdim=True) / largest
    inverse = scales.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    scales = scales.masked_fill(~scales.isfinite(), torch.nan)
    levels = (rows * inverse).nan_to_num_(0.0, largest, -largest).clamp_(-largest, largest)
    if format == "int8":
        return levels.round_().to(torch.int8), scales
    return levels.to(torch.float8_e4m3fn), scales
