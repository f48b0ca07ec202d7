"""Robust objectives: what the outer minimisation minimises. They see logits, nothing else."""

from dat_ds.objectives.objective import (
    DEFAULT_NATURAL_WEIGHT,
    OBJECTIVES,
    Objective,
    build_objective,
)

__all__ = ["DEFAULT_NATURAL_WEIGHT", "OBJECTIVES", "Objective", "build_objective"]
