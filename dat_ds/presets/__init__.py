"""Complete run configs, one JSON file each: published recipes, and points to start from."""

from dat_ds.presets.load import PRESETS, STARTING_POINTS, read_preset, table, text_of, with_data

__all__ = [
    "PRESETS",
    "STARTING_POINTS",
    "read_preset",
    "table",
    "text_of",
    "with_data",
]
