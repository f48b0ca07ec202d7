"""Handing a trained model on in the formats of others."""

from dat_ds.export.run import Order, export
from dat_ds.export.table import FORMATS

__all__ = ["FORMATS", "Order", "export"]
