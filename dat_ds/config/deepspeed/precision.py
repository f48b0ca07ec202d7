"""In which precision DeepSpeed runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dat_ds.config.deepspeed.keys import AUTOCAST_DEFAULTS, FP16_DEFAULTS

FLOAT16 = ("float16", "fp16", "half", "torch.float16")


def enabled(config: Mapping[str, Any], key: str) -> bool:
    """Whether a section of DeepSpeed's part is there and enabled."""
    section = config.get(key)
    return isinstance(section, Mapping) and bool(section.get("enabled"))


def precision_of(config: Mapping[str, Any]) -> str:
    """``"float32"``, ``"bf16"``, ``"fp16"`` or ``"autocast"``: how DeepSpeed runs the model."""
    if enabled(config, "torch_autocast"):
        return "autocast"
    if enabled(config, "bf16") or enabled(config, "bfloat16"):
        return "bf16"
    return "fp16" if enabled(config, "fp16") else "float32"


def check_precision_keys(config: dict[str, Any], problems: list[str]) -> None:
    """Refuse precisions together, and what would round pixels; write out defaults."""
    keys = ("bf16", "bfloat16", "fp16", "torch_autocast")
    found = [key for key in keys if enabled(config, key)]
    if len(found) > 1:
        problems.append(f"{' and '.join(found)} are enabled together: enable one of them.")
    if "torch_autocast" in found:
        config["torch_autocast"] = {**AUTOCAST_DEFAULTS, **config["torch_autocast"]}
    if "fp16" in found:
        config["fp16"] = {**FP16_DEFAULTS, **config["fp16"]}
        if config["fp16"]["auto_cast"]:
            problems.append(
                "fp16.auto_cast=true is refused: it would round the pixels before normalisation. "
                "Remove it; the model casts after normalising."
            )
