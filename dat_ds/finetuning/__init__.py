"""Fine-tuning: which parameters are trained, how fast, and through which adapters."""

from dat_ds.finetuning.section import FinetuningConfig, LoraConfig, ParameterRule

__all__ = ["FinetuningConfig", "LoraConfig", "ParameterRule"]
