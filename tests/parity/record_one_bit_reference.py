"""Record how DeepSpeed 0.19.6's own 1-bit optimizers train, and compare ours with it.

    pip install --no-deps --target FOLDER deepspeed==0.19.6
    python -m tests.parity.record_one_bit_reference FOLDER [--write]

Its optimizers and its engine run unchanged on two gloo ranks; only the backend, which needs cupy,
is replaced by float32 arithmetic that says what it computed. ``--write`` replaces the committed
record. Its first step only sets buffers up (the gradient is dropped, the step is counted), so ours
takes the same batches from the second on, with a freeze one step earlier.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.distributed.harness import run_ranks

RECORD = Path(__file__).with_name("one_bit_reference.safetensors")
RANKS, STEPS, FREEZE, BATCH = 2, 80, 20, 16
RECORDED_EVERY = 4
FEATURES, HIDDEN, CLASSES = 6, 8, 5
LR, WARMUP = 0.01, 10
"""The rate rises over the first steps and is constant afterwards."""

CASES: dict[str, dict[str, Any]] = {
    "OneBitAdam": {"freeze_step": FREEZE, "weight_decay": 0.01},
    "OneBitLamb": {"freeze_step": FREEZE, "weight_decay": 0.01, "coeff_beta": 0.9},
    # The variance is measured every 1, 2, 4, 8 steps; then ranks agree every 1, 2, 4.
    "ZeroOneAdam": {
        "var_freeze_step": 40,
        "var_update_scaler": 4,
        "local_step_scaler": 8,
        "local_step_clipper": 4,
    },
}
"""Parameters by DeepSpeed's type name; its decay in 0/1 Adam differs from ours on purpose."""


class Task(nn.Module):
    """A classifier with one hidden layer, whose 96 weights are a multiple of what it pads to.

    Args:
        pieces: Sizes of the parameters that hold the weights. DeepSpeed's 1-bit Adam and 0/1 Adam
            compress every parameter with a scale of its own, its 1-bit LAMB all of them together.
    """

    def __init__(self, pieces: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = 0.5 * torch.randn(HIDDEN * (FEATURES + 1 + CLASSES), generator=generator)
        self.pieces = nn.ParameterList(nn.Parameter(p.clone()) for p in weights.split(pieces))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        flat = torch.cat(list(self.pieces))
        first, bias, second = flat.split([HIDDEN * FEATURES, HIDDEN, HIDDEN * CLASSES])
        hidden = torch.tanh(x @ first.view(FEATURES, HIDDEN) + bias)
        return nn.functional.cross_entropy(hidden @ second.view(HIDDEN, CLASSES), y)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().clone() for p in self.pieces])


def task(name: str) -> Task:
    return Task((48, 8, 40) if name == "OneBitLamb" else (96,))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Inputs and the noisy labels of a fixed teacher, different on every rank."""
    generator = torch.Generator().manual_seed(1 + step * RANKS + rank)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    noise = 0.5 * torch.randn(BATCH, CLASSES, generator=generator)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(0))
    return x, (x @ teacher + noise).argmax(dim=1)


def rate(step: int) -> float:
    """Learning rate of ``step``, from 0."""
    return LR * min(1.0, (step + 1) / WARMUP)


class NcclBackend:
    """What DeepSpeed's backend of this name computes, without its packing of bits."""

    def __init__(self, mpu: Any = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def compressed_allreduce(
        self, buffer: Tensor, worker_error: Tensor, server_error: Tensor, local_rank: int
    ) -> Tensor:
        padded = torch.zeros(worker_error.numel())
        padded[: buffer.numel()] = buffer.flatten()
        mine = _compress(padded.add_(worker_error), worker_error)
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        share = torch.stack(everyones).mul_(1 / self.size).sum(0).chunk(self.size)[self.rank]
        chunk = _compress(share.add_(server_error), server_error)
        chunks = [torch.empty_like(chunk) for _ in range(self.size)]
        dist.all_gather(chunks, chunk)
        # In place too: its 1-bit LAMB does not look at what is returned.
        buffer.copy_(torch.cat(chunks)[: buffer.numel()].view_as(buffer))
        return buffer


def _compress(tensor: Tensor, error: Tensor) -> Tensor:
    """One scale and the signs (zero counts as positive); what is lost goes to ``error``."""
    scale = torch.linalg.norm(tensor) / math.sqrt(tensor.numel())
    compressed = scale * torch.where(tensor >= 0, 1.0, -1.0)
    error.copy_(tensor - compressed)
    return compressed


def train_theirs(folder: str) -> dict[str, Tensor]:
    """Weights ``(STEPS + 1, 96)`` before and after every step of DeepSpeed 0.19.6, by case."""
    sys.path.insert(0, folder)
    backend = types.ModuleType("deepspeed.runtime.comm.nccl")
    backend.NcclBackend = NcclBackend  # type: ignore[attr-defined]
    sys.modules[backend.__name__] = backend
    import deepspeed
    import deepspeed.comm.comm

    assert deepspeed.__version__ == "0.19.6", deepspeed.__version__
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(verbose=False)
    trajectories = {}
    for name, params in CASES.items():
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 0.0,
            "optimizer": {"type": name, "params": {"lr": LR, **params}},
            "zero_optimization": {"stage": 0},
        }
        model = task(name)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        trajectory = [model.weights()]
        for step in range(STEPS):
            for group in engine.optimizer.param_groups:
                group["lr"] = rate(step)
            engine.backward(engine(*batch(step, dist.get_rank())))
            engine.step()
            trajectory.append(model.weights())
        trajectories[name] = torch.stack(trajectory)
    return trajectories


def train_ours() -> dict[str, Tensor]:
    """As :func:`train_theirs`, with ours set to do what DeepSpeed 0.19.6 does."""
    from dat_ds.optim import OneBitAdam, OneBitLamb, ZeroOneAdam

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    optimizers: dict[str, Any] = {
        "OneBitAdam": OneBitAdam,
        "OneBitLamb": OneBitLamb,
        "ZeroOneAdam": ZeroOneAdam,
    }
    trajectories = {}
    for name, params in CASES.items():
        model, options = task(name), dict(params)
        if name == "OneBitLamb":
            options["adapt_vectors"] = True
        if "freeze_step" in options:
            options["freeze_step"] -= 1
        else:
            options["var_freeze_step"] += 1  # theirs measures the variance once more
        optimizer = optimizers[name](
            model.parameters(),
            bias_correction=False,
            preconditioned=False,
            block_size=0,
            scale="rms",
            **options,
        )
        if name == "ZeroOneAdam":
            optimizer.num_steps = 1  # its intervals are multiples of the step's number
        trajectory = [model.weights(), model.weights()]
        for step in range(1, STEPS):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            model(*batch(step, dist.get_rank())).backward()
            if optimizer.needs_averaged_gradients:
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad.div_(RANKS)
            optimizer.step()
            trajectory.append(model.weights())
        trajectories[name] = torch.stack(trajectory)
    return trajectories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", help="where deepspeed 0.19.6 is installed, apart")
    parser.add_argument("--write", action="store_true", help=f"replace {RECORD.name}")
    args = parser.parse_args()
    theirs = run_ranks(train_theirs, RANKS, os.path.abspath(args.folder))[0]
    ours = run_ranks(train_ours, RANKS)[0]
    for name in CASES:
        difference = (ours[name] - theirs[name]).abs().max()
        moved = (theirs[name][-1] - theirs[name][0]).abs().max()
        print(
            f"{name}: {STEPS} steps, largest difference of a weight {difference:.2g}, "
            f"largest way of a weight {moved:.2g}"
        )
    if args.write:
        save_file({name: theirs[name][::RECORDED_EVERY].clone() for name in CASES}, RECORD)


if __name__ == "__main__":
    main()
