"""Distributed adversarial training of large vision models inside DeepSpeed."""

from typing import TYPE_CHECKING, Any

from dat_ds.attacks import ThreatModel
from dat_ds.config import RunConfig, load_config
from dat_ds.errors import UserError

if TYPE_CHECKING:
    from dat_ds.engine import AdversarialEngine, initialize

__version__ = "0.1.0"
__all__ = [
    "AdversarialEngine",
    "RunConfig",
    "ThreatModel",
    "UserError",
    "__version__",
    "initialize",
    "load_config",
]

_FROM_ENGINE = ("AdversarialEngine", "initialize")


def __getattr__(name: str) -> Any:
    """Import the engine, and with it deepspeed, only where it is used."""
    if name not in _FROM_ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dat_ds import engine

    return getattr(engine, name)
