"""Attacks on a vision transformer that sees a random part of its patches.

Attention and the layers around it then cost that part of their time. The idea is that of masked
inputs in training (Li et al., CVPR 2023, arXiv 2212.00794); every forward draws anew, so that over
the steps of an attack all pixels move.

Shapes: ``B`` batch, ``N`` patch tokens, ``D`` width.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dat_ds.attacks.noise import Generator, rand_like
from dat_ds.patching import module_of

_PATCH_DROPS = ("Identity", "PatchDropout")  # of timm; others return positions too
_PREFIX_TOKENS = {"ViTEmbeddings": 1, "DeiTEmbeddings": 2, "Dinov2Embeddings": 1}
"""Class and distillation tokens in the output of Hugging Face's embedding layers."""


def patch_tokens(model: object) -> tuple[nn.Module, int] | None:
    """The layer whose output is the sequence of tokens, and how many of them are not patches.

    Known are timm's ``VisionTransformer`` (the place of its own ``patch_drop``) and Hugging Face's
    ViT, DeiT and DINOv2. Others, as those whose attention depends on where tokens lie, have none.

    Args:
        model: A module, or a callable with the module as its ``module``.

    Returns:
        The layer and the number of leading tokens, or None.
    """
    root = module_of(model)
    for module in () if root is None else root.modules():
        drop, prefix = getattr(module, "patch_drop", None), getattr(module, "num_prefix_tokens", 0)
        if type(drop).__name__ in _PATCH_DROPS and isinstance(drop, nn.Module):
            return drop, int(prefix)
        if type(module).__name__ in _PREFIX_TOKENS:
            return module, _PREFIX_TOKENS[type(module).__name__]
    return None


@contextlib.contextmanager
def dropped_tokens(model: object, share: float, generator: Generator) -> Iterator[None]:
    """Let ``model`` see a random ``share`` of each image's patches, drawn anew in every forward.

    Args:
        model: A module, or a callable with the module as its ``module``.
        share: Fraction of the patch tokens that is kept, in (0, 1]; at least one token.
        generator: Source of the choice.

    Raises:
        ValueError: If the model has no such tokens.
    """
    found = patch_tokens(model)
    if found is None:
        raise ValueError(
            "keep_tokens needs a timm VisionTransformer or a Hugging Face ViT, DeiT or DINOv2."
        )
    layer, num_prefix = found

    def keep_some(_module: nn.Module, _inputs: object, tokens: Tensor) -> Tensor:
        prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
        num_kept = max(1, round(share * patches.shape[1]))
        scores = torch.empty(patches.shape[:2], device=tokens.device)
        kept = rand_like(scores, generator).topk(num_kept, dim=1).indices
        chosen = patches.gather(1, kept.unsqueeze(2).expand(-1, -1, patches.shape[2]))
        return torch.cat([prefix, chosen], dim=1)

    handle = layer.register_forward_hook(keep_some)
    try:
        yield
    finally:
        handle.remove()
