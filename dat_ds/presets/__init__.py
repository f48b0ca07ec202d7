"""Complete run configs of published recipes, one JSON file each, and how they are found."""

from dat_ds.presets.fit import check_fits
from dat_ds.presets.load import PRESETS, read_preset, table, text_of, with_data

__all__ = ["PRESETS", "check_fits", "read_preset", "table", "text_of", "with_data"]
