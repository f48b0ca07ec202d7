"""BatchNorm in evaluation mode, folded into the convolution before it while an attack runs.

There it is a fixed scale and shift per channel, which the convolution's weights can take over:
``W' = W s`` and ``b' = beta + (b - mean) s`` with ``s = gamma / sqrt(var + eps)``. That saves two
passes over every activation, one forward and one backward, in each step of the attack.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dat_ds.errors import ConfigError
from dat_ds.patching import may_be_patched, module_of, patched_forwards

_WITH_ACTIVATION = "BatchNormAct2d"  # timm's: normalisation, dropout and activation in one module

Pair = tuple[nn.Conv2d, _BatchNorm]
_pairs_of: weakref.WeakKeyDictionary[nn.Module, list[Pair]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def folded_batch_norm(model: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[None]:
    """Let ``model`` compute each convolution and the BatchNorm behind it as one, until exit.

    Folded are plain convolutions whose output goes to one BatchNorm and nowhere else. Which those
    are is read off the graph of a forward, the first time that a model is seen.

    Args:
        model: A module in evaluation mode with frozen parameters, or a callable with the module as
            its ``module``.
        x: Images for it ``(B, C, H, W)``.

    Raises:
        ConfigError: If nothing can be folded.
    """
    root = module_of(model)
    if root is None:
        raise ConfigError("dat.attack.fold_batch_norm=true needs a torch module.")
    modules = set(root.modules())
    if not all(modules.issuperset(pair) for pair in _pairs_of.get(root, [])):
        del _pairs_of[root]  # a layer was replaced since
    if root not in _pairs_of:
        _pairs_of[root] = conv_norm_pairs(root, model, x[:1])
    pairs = _pairs_of[root]
    if not pairs:
        raise ConfigError(
            "dat.attack.fold_batch_norm=true: no BatchNorm of this model follows a plain "
            "convolution. Remove it."
        )
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for conv, norm in pairs:
        forwards |= {conv: _folded(conv, norm), norm: _after(norm)}
    with patched_forwards(forwards):
        yield


def conv_norm_pairs(root: nn.Module, called: Callable[[Tensor], Tensor], x: Tensor) -> list[Pair]:
    """Plain convolutions whose output one BatchNorm alone reads, with that BatchNorm.

    Args:
        root: The network.
        called: Calls it on ``x``.
        x: Images ``(B, C, H, W)``.
    """
    made: dict[Any, nn.Conv2d] = {}
    read: list[tuple[_BatchNorm, Any]] = []
    calls: Counter[nn.Module] = Counter()

    def after_conv(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        calls[module] += 1
        assert isinstance(module, nn.Conv2d)
        made[output.grad_fn] = module

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        assert isinstance(module, _BatchNorm)
        read.append((module, inputs[0].grad_fn))

    handles = [
        module.register_forward_hook(after_conv)
        if type(module) is nn.Conv2d
        else module.register_forward_pre_hook(before_norm)
        for module in root.modules()
        if may_be_patched(module) and (type(module) is nn.Conv2d or _is_fixed_norm(module))
    ]
    try:
        with torch.enable_grad():
            output = called(x.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    readers = _readers(output.grad_fn)
    return [
        (made[node], norm)
        for norm, node in read
        if node in made and readers[node] == calls[norm] == calls[made[node]] == 1
    ]


def _is_fixed_norm(module: nn.Module) -> bool:
    known = type(module) is nn.BatchNorm2d or type(module).__name__ == _WITH_ACTIVATION
    return known and isinstance(module, _BatchNorm) and module.running_var is not None


def _readers(node: Any) -> Counter[Any]:
    """How many operations read what each node of a graph made."""
    readers: Counter[Any] = Counter()
    pending, seen = [node], {node}
    while pending:
        for parent, _ in pending.pop().next_functions:
            if parent is None:
                continue
            readers[parent] += 1
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return readers


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """The convolution's forward with the normalisation in its weights, in their dtype."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    exact = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = (norm.running_var.to(exact) + norm.eps).rsqrt()
    shift = -norm.running_mean.to(exact)
    if conv.bias is not None:
        shift = shift + conv.bias
    if norm.affine:
        scale = scale * norm.weight
    shift = shift * scale
    if norm.affine:
        shift = shift + norm.bias
    weight = (conv.weight * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype)
    bias = shift.to(conv.weight.dtype)
    return lambda x: conv._conv_forward(x, weight, bias)


def _after(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """The rest of the module's forward, after normalisation."""
    if type(norm).__name__ != _WITH_ACTIVATION:
        return lambda x: x
    drop: Any = norm.drop
    act: Any = norm.act
    return lambda x: act(drop(x))
