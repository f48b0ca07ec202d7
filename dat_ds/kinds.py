"""Kinds of a model's head and of activation checkpointing, shared by config, objectives, models."""

from typing import Literal

Head = Literal["classes", "rotation", "projection", "features"]
"""Outputs of a model, as its objective asks for them."""

Checkpointing = Literal["none", "non_reentrant", "reentrant"]
"""Values of ``dat.model.activation_checkpointing``."""
