"""A Trainer's checkpoint back into its model, with every tensor.

transformers 5 saves the weights of many models (ViT, DeiT, BEiT, CLIP, ...) under other names than
the model's own. Its ``from_pretrained`` translates them. Its Trainer, which reads the file itself,
does not: the encoder stays as it was, and two warnings in the log are the only sign.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dat_ds.errors import CheckpointError

logger = logging.getLogger("dat_ds")


def restore(model: PreTrainedModel, folder: str | Path) -> None:
    """Read a checkpoint's weights by the names that its file has.

    Raises:
        CheckpointError: They are not those of the model.
    """
    dtypes = [t.dtype for t in model.state_dict().values() if t.is_floating_point()]
    kind = type(model)
    try:
        saved, info = kind.from_pretrained(
            folder,
            config=model.config,
            # Wide enough for every tensor: copying back into the model's own types is exact.
            dtype=functools.reduce(torch.promote_types, dtypes, torch.float32),
            output_loading_info=True,
        )
        names = [*info["missing_keys"], *info["unexpected_keys"]]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"only one of the two has {', '.join(sorted(names)[:3])}{more}")
        model.load_state_dict(saved.state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The weights in {str(folder)!r} are not those of this {kind.__name__} "
            f"({' '.join(str(error).split())}), and some of its tensors were not restored. Pass "
            "the model that was trained there, of the same class and config; where you changed its "
            f"modules after it was built, load {str(folder)!r} yourself."
        ) from None
    logger.info("Restored all %d tensors of the model from %s.", len(saved.state_dict()), folder)
