"""Settings that must be in place before deepspeed is imported."""

import os

import torch

if not torch.accelerator.is_available():
    # Said explicitly, because DeepSpeed warns when it finds out by itself.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
