"""Requirements of an attack that a model does not meet."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dat_ds.attacks.attack import Attack
from dat_ds.attacks.passes.quantized import FORMATS, quantizable_linears
from dat_ds.attacks.passes.tokens import patch_tokens


def misfits(attack: Attack, model: nn.Module) -> list[str]:
    """Requirements of an attack that a model does not meet, as messages to the user."""
    spec = getattr(model, "spec", None)
    kind = spec.get("name") if isinstance(spec, Mapping) else type(model).__name__
    problems = []
    if attack.keep_tokens is not None and patch_tokens(model) is None:
        problems.append(
            f"dat.attack.keep_tokens={attack.keep_tokens:g} needs a vision transformer: timm's "
            f"VisionTransformer, or Hugging Face's ViT, DeiT or DINOv2, not this model ({kind}). "
            "Remove it, or write dat.attack.resolution."
        )
    if attack.fold_batch_norm and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        problems.append(
            f"dat.attack.fold_batch_norm=true, but this model ({kind}) has no BatchNorm: remove it."
        )
    if attack.precision in FORMATS and not quantizable_linears(model):
        problems.append(
            f"dat.attack.precision={attack.precision!r}: this model ({kind}) has no linear layer "
            "whose sizes are multiples of 16. Write 'bf16'."
        )
    return problems
