"""Adversarial training for Hugging Face's Trainer: one callback."""

from dat_ds.integrations.hf.callback import AdversarialTrainingCallback

__all__ = ["AdversarialTrainingCallback"]
