"""What the tests of run configs share."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from dat_ds.config import load_config
from dat_ds.errors import ConfigError

ADAMW = {"optimizer": {"type": "AdamW"}}


def ours(**sections: Any) -> dict[str, Any]:
    """A valid config but for ``sections`` of ``dat``."""
    return {**copy.deepcopy(ADAMW), "dat": sections}


def one_bit(kind: str, **params: Any) -> dict[str, Any]:
    """DeepSpeed's section for an optimizer that it removed."""
    return {"optimizer": {"type": kind, "params": params}}


def problems(config: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(config, **options)
    return str(caught.value).split("\n")


def deepspeed_config_module() -> Any:
    pytest.importorskip("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed.runtime.config as module

    return module
