"""Leave-no-trace context for running an attack on a model that is being trained."""

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import nn

from dat_ds.casting import HALF, casting_at_layers
from dat_ds.errors import ModelError
from dat_ds.patching import stays_in_evaluation

ModelMode = Literal["eval", "train"]
MODEL_MODES: tuple[str, ...] = get_args(ModelMode)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Restore the global generators of the CPU and of ``device`` on exit."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=_rng_device_type(device)):
        yield


def _rng_device_type(device: torch.device) -> str:
    return device.type if device.type != "cpu" else "cuda"


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers (BatchNorm statistics among them), until exit.

    The buffers themselves are never written to, so a graph made inside stays valid for a backward
    after the exit.
    """
    saved = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module, name, buffer in saved:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in saved:
            module._buffers[name] = buffer


@contextlib.contextmanager
def attack_mode(model: object, model_mode: ModelMode = "eval") -> Iterator[None]:
    """Freeze ``model`` while an attack runs; restore everything exactly, even on error.

    Inside, gradients are enabled, parameters do not require them, every module is in
    ``model_mode`` (but for frozen BatchNorm, which stays in evaluation), and layers with 16-bit
    weights cast the float32 pixels that they are given. On
    exit each module's ``training`` flag, each parameter's ``requires_grad`` and the global random
    number generators are as they were; so are all buffers after ``"train"``, while ``"eval"``
    relies on modules not to write to theirs.

    Args:
        model: A module; for any other callable only the gradient mode is set.
        model_mode: ``"eval"`` (running BatchNorm statistics, no dropout: the attacker's view of
            the deployed model) or ``"train"`` (batch statistics, dropout active).

    Raises:
        ModelError: For a model that was made under ``torch.inference_mode``.
    """
    if model_mode not in MODEL_MODES:
        raise ValueError(f"model_mode={model_mode!r} is not one of {', '.join(MODEL_MODES)}.")
    # Gradients do not exist in inference mode, and enable_grad does not bring them back.
    leave = torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else None
    if leave is not None:
        with leave, attack_mode(model, model_mode):
            yield
        return
    if not isinstance(model, nn.Module):
        with torch.enable_grad():
            yield
        return
    # One walk over the module tree: at small models' speed, several of them show.
    modes = [(module, module.training) for module in model.modules()]
    parameters = list(
        dict.fromkeys(p for m, _ in modes for p in m._parameters.values() if p is not None)
    )
    if any(p.is_inference() for p in parameters):
        raise ModelError(
            "The model was made under torch.inference_mode, so autograd cannot use its parameters: "
            "make it outside, or under torch.no_grad."
        )
    flags = [p.requires_grad for p in parameters]
    device = parameters[0].device if parameters else torch.device("cpu")
    training = model_mode == "train"
    try:
        for module, _ in modes:
            module.training = training and not stays_in_evaluation(module)
        for p in parameters:
            p.requires_grad_(False)
        # Evaluation mode neither updates buffers nor draws, unless a model does so on its own.
        keep_buffers = preserved_buffers(model) if training else contextlib.nullcontext()
        is_half = any(p.dtype in HALF for p in parameters)
        casting = casting_at_layers(model) if is_half else contextlib.nullcontext()
        with preserved_rng(device), keep_buffers, casting, torch.enable_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training  # model.train() would un-freeze frozen BatchNorm
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
