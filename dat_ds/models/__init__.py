"""Models that take pixels in [0, 1] and give logits: building, normalising, saving, loading."""

from dat_ds.models.build import build_model
from dat_ds.models.load import load, save_weights
from dat_ds.models.normalize import Normalize, PixelModel

__all__ = ["Normalize", "PixelModel", "build_model", "load", "save_weights"]
