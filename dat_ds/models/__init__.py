"""Models that take pixels in [0, 1] and give logits: building, normalising, saving, loading."""

import importlib
from typing import TYPE_CHECKING, Any

from dat_ds.models.method import MODELS, ModelMethod

if TYPE_CHECKING:
    from dat_ds.models.build import build_model
    from dat_ds.models.loading import load, save_weights
    from dat_ds.models.normalize import Normalize, PixelModel
    from dat_ds.models.sizes import check_takes_images

__all__ = [
    "MODELS",
    "ModelMethod",
    "Normalize",
    "PixelModel",
    "build_model",
    "check_takes_images",
    "load",
    "save_weights",
]

_HOMES = {
    "Normalize": "normalize",
    "PixelModel": "normalize",
    "build_model": "build",
    "check_takes_images": "sizes",
    "load": "loading",
    "save_weights": "loading",
}


def __getattr__(name: str) -> Any:
    """Import timm and transformers only where a model is built or loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
