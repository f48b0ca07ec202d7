"""The only package that imports deepspeed: set-up, steps, checkpoints and the training loop."""

import dat_ds.engine.environment  # noqa: F401  # isort: skip  # before deepspeed is imported
from dat_ds.engine.adversarial import AdversarialEngine
from dat_ds.engine.build import initialize

__all__ = ["AdversarialEngine", "initialize"]
