"""Distributed adversarial training of large vision models inside DeepSpeed."""

import importlib
from typing import TYPE_CHECKING, Any

from dat_ds.errors import UserError

if TYPE_CHECKING:
    from dat_ds.attacks import ThreatModel
    from dat_ds.config import RunConfig, load_config
    from dat_ds.engine import AdversarialEngine, initialize
    from dat_ds.method import import_methods

__version__ = "0.2.0"
__all__ = [
    "AdversarialEngine",
    "RunConfig",
    "ThreatModel",
    "UserError",
    "__version__",
    "import_methods",
    "initialize",
    "load_config",
]

_HOMES = {
    "AdversarialEngine": "dat_ds.engine",
    "RunConfig": "dat_ds.config",
    "ThreatModel": "dat_ds.attacks",
    "import_methods": "dat_ds.method",
    "initialize": "dat_ds.engine",
    "load_config": "dat_ds.config",
}
_ROOMS = ("attacks", "compression", "config", "data", "evaluation", "models", "objectives", "optim")


def __getattr__(name: str) -> Any:
    """Import what is asked for, and with it torch or deepspeed, only where it is used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
