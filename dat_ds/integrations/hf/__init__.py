"""Adversarial training for Hugging Face's Trainer: one callback."""

from dat_ds.integrations.hf.callback import AdversarialTrainingCallback
from dat_ds.integrations.hf.trainer import AdversarialTrainer

__all__ = ["AdversarialTrainer", "AdversarialTrainingCallback"]
