"""The objectives by name, and building one from plain settings."""

from collections.abc import Mapping
from typing import Any

from dat_ds.method import build_method, table_of
from dat_ds.objectives.alp import Alp
from dat_ds.objectives.at import AdversarialTraining, Dat
from dat_ds.objectives.base import Objective
from dat_ds.objectives.contrastive import Contrastive
from dat_ds.objectives.fare import Fare
from dat_ds.objectives.gat import Gat
from dat_ds.objectives.hat import Hat
from dat_ds.objectives.mart import Mart
from dat_ds.objectives.nuat import Nuat
from dat_ds.objectives.pgi import Pgi
from dat_ds.objectives.rotation import Rotation
from dat_ds.objectives.trades import Trades

OBJECTIVES = table_of(
    "objective",
    Objective,
    [
        AdversarialTraining,
        Dat,
        Trades,
        Mart,
        Alp,
        Hat,
        Gat,
        Nuat,
        Pgi,
        Rotation,
        Contrastive,
        Fare,
    ],
)
"""The choices of ``dat.objective``: a new objective is a file and a place in this list."""


def build_objective(config: Mapping[str, Any]) -> Objective:
    """Build an objective from the keys of ``dat.objective``.

    Args:
        config: ``name`` (default ``"at"``) and that objective's options; one that is None has its
            default.

    Raises:
        ConfigError: A ``ValueError`` with all problems: an unknown name or option, a value out of
            range.
    """
    return build_method(OBJECTIVES, config, "objective")
