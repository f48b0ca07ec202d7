"""Memory and operations of a model's passes, found on tensors without elements.

The model runs on fake tensors, which have shapes and dtypes and nothing else: every operation is
dispatched as it would be, and none computes. What is alive at each moment is summed up by storage.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dat_ds.attacks.passes.precision import PRECISIONS, autocast
from dat_ds.errors import ModelError
from dat_ds.models.batch_norm import has_batch_norm

_NEEDS_DATA = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Sums up the storages that operations inside make, for as long as each is alive.

    Attributes:
        now: Bytes alive.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any] | None] = {}
        self._seen: Callable[[int], None] = lambda now: None

    def leave_out(self, tensors: Iterator[Tensor]) -> None:
        """Do not count these, which were there before."""
        for tensor in tensors:
            self._alive[tensor.untyped_storage()._cdata] = None

    def watch(self, seen: Callable[[int], None]) -> None:
        """Call ``seen`` with the bytes alive after each operation that makes a tensor."""
        self._seen = seen

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count what it has made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen(self.now)


@dataclass(frozen=True)
class Passes:
    """Memory of one forward and its backward; parameters and their gradients are left out.

    Attributes:
        saved: Bytes of the tensors that the forward keeps for the backward.
        timeline: ``(gradients, bytes)`` in order: how many elements of parameters' gradients were
            finished, and the most bytes alive with just so many.
    """

    saved: int
    timeline: tuple[tuple[int, int], ...]

    @property
    def peak(self) -> int:
        """The most bytes alive."""
        return max(size for _, size in self.timeline)

    def between(self, other: Passes, share: float) -> Passes:
        """Passes of another batch, on the line through these and ``other``.

        Args:
            other: The same passes with another batch.
            share: 0 for these, 1 for the others; beyond them, extrapolated.
        """
        theirs = dict(other.timeline)
        line = tuple(
            (done, round(size + share * (theirs.get(done, size) - size)))
            for done, size in self.timeline
        )
        return Passes(round(self.saved + share * (other.saved - self.saved)), line)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of an image, a multiplication and an addition counted as two.

    Attributes:
        convolutions: Those of convolutions.
        products: Those of matrix products, attention's among them.
    """

    convolutions: float
    products: float

    @property
    def total(self) -> float:
        """Both."""
        return self.convolutions + self.products

    def __add__(self, other: Operations) -> Operations:
        """Both passes."""
        return Operations(self.convolutions + other.convolutions, self.products + other.products)

    def __mul__(self, times: float) -> Operations:
        """So many passes."""
        return Operations(times * self.convolutions, times * self.products)


@dataclass(frozen=True)
class Precisions:
    """How the passes of an update and of an attack run.

    Attributes:
        dtype: Of the model's floating-point parameters.
        autocast: To which forwards autocast; None for none.
        attack: ``dat.attack.precision``; None for the model's.
        attack_mode: Mode of the modules during the attack.
        device_type: Of the device that they stand for, ``"cpu"`` or ``"cuda"``.
    """

    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    attack: str | None = None
    attack_mode: str = "eval"
    device_type: str = "cpu"


class TracedModel:
    """A model whose passes are traced.

    Args:
        model: Built on the meta device; it is turned into one of fake tensors.
        image_shape: ``(C, H, W)``.
        precisions: How it runs.
    """

    def __init__(
        self, model: nn.Module, image_shape: tuple[int, int, int], precisions: Precisions
    ) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._shape, self._precisions = image_shape, precisions
        self._model = model.to(precisions.dtype)
        with self._mode:
            _fill(self._model)
        self._known: dict[tuple[str, int], Passes] = {}

    @property
    def has_batch_norm(self) -> bool:
        """Whether one image alone is taken twice."""
        return has_batch_norm(self._model)

    @property
    def trainable(self) -> list[int]:
        """Elements of each parameter that is trained, a shared one once."""
        return [p.numel() for p in self._model.parameters() if p.requires_grad]

    @property
    def frozen(self) -> list[int]:
        """Elements of each parameter that is not."""
        return [p.numel() for p in self._model.parameters() if not p.requires_grad]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of its buffers, such as BatchNorm's statistics."""
        return sum(b.numel() * b.element_size() for b in self._model.buffers())

    def update(self, images: int) -> Passes:
        """The outer forward in training mode, and its backward to the parameters."""
        return self._traced("update", images, self._run_update)

    def attack(self, images: int) -> Passes:
        """One step of an attack: a forward with frozen parameters, and its backward to pixels."""
        return self._traced("attack", images, self._run_attack)

    def forward_operations(self) -> Operations:
        """Operations of a forward alone."""

        def run(live: LiveBytes, timeline: dict[int, int], images: int) -> int:
            with torch.no_grad(), self._autocast():
                self._model(torch.empty(images, *self._shape))
            return 0

        return self._operations(run)

    def update_operations(self) -> Operations:
        """Operations of :meth:`update`."""
        return self._operations(self._run_update)

    def attack_operations(self) -> Operations:
        """Operations of :meth:`attack`."""
        return self._operations(self._run_attack)

    # ---- internals

    def _operations(self, run: Callable[[LiveBytes, dict[int, int], int], int]) -> Operations:
        """Operations of a pass, of one of two images: BatchNorm refuses one alone."""
        images = 2
        counter = FlopCounterMode(display=False)
        # It knows no fused attention of CPUs, which is taken apart into products here.
        products = sdpa_kernel(SDPBackend.MATH)
        with self._traceable(), self._mode, products, torch.enable_grad(), counter:
            run(LiveBytes(), {}, images)
        counts = counter.get_flop_counts()["Global"]
        convolutions = sum(n for op, n in counts.items() if "convolution" in str(op))
        total = counter.get_total_flops()
        return Operations(convolutions / images, (total - convolutions) / images)

    @contextlib.contextmanager
    def _traceable(self) -> Iterator[None]:
        """Leaves random numbers as they are; raises a ModelError for a model that needs data."""
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        except _NEEDS_DATA as error:
            words = str(error).strip() or type(error).__name__
            raise ModelError(
                f"{type(self._model).__name__} cannot be traced without data, since what it "
                f"computes decides what it computes next ({words.splitlines()[0]}): measure it "
                "instead, by a run on the device."
            ) from error

    def _traced(
        self, name: str, images: int, run: Callable[[LiveBytes, dict[int, int], int], int]
    ) -> Passes:
        if (name, images) not in self._known:
            live = LiveBytes()
            timeline: dict[int, int] = {}
            live.leave_out(self._tensors())
            with self._traceable(), self._mode, torch.enable_grad(), live:
                saved = run(live, timeline, images)
            self._known[name, images] = Passes(saved, tuple(sorted(timeline.items())))
        return self._known[name, images]

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._model.parameters()
        yield from self._model.buffers()

    def _run_update(self, live: LiveBytes, timeline: dict[int, int], images: int) -> int:
        done = 0

        def seen(now: int) -> None:
            timeline[done] = max(now, timeline.get(done, 0))

        def finished(parameter: Tensor) -> None:
            nonlocal done
            done += parameter.numel()
            parameter.grad = None
            seen(live.now)

        live.watch(seen)
        self._model.train()
        hooks = [
            p.register_post_accumulate_grad_hook(finished)  # type: ignore[no-untyped-call]
            for p in self._model.parameters()
            if p.requires_grad
        ]
        try:
            with self._counted_saved() as saved, self._autocast():
                outputs = self._model(torch.empty(images, *self._shape))
            torch.autograd.backward(_first(outputs).float().square().mean())
        finally:
            for hook in hooks:
                hook.remove()
        return saved()

    def _run_attack(self, live: LiveBytes, timeline: dict[int, int], images: int) -> int:
        live.watch(lambda now: timeline.__setitem__(0, max(now, timeline.get(0, 0))))
        flags = [(p, p.requires_grad) for p in self._model.parameters()]
        self._model.train(self._precisions.attack_mode == "train")
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            x = torch.empty(images, *self._shape).requires_grad_()
            with self._attack_autocast():
                with self._counted_saved() as saved, self._autocast():
                    outputs = _first(self._model(x))
                # Not autograd.grad, which refuses reentrant checkpoints.
                torch.autograd.backward(outputs, torch.empty_like(outputs))
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return saved()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precisions.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self._precisions.autocast)

    def _attack_autocast(self) -> contextlib.AbstractContextManager[Any]:
        name = self._precisions.attack
        if name is None or name not in PRECISIONS:
            return contextlib.nullcontext()
        if self._precisions.device_type == "cpu":
            return autocast(torch.device("cpu"), name)  # type: ignore[arg-type]
        return torch.autocast("cpu", dtype=PRECISIONS[name])

    @contextlib.contextmanager
    def _counted_saved(self) -> Iterator[Callable[[], int]]:
        """Counts what forwards inside keep for their backward, each storage once."""
        own = {tensor.untyped_storage()._cdata for tensor in self._tensors()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield lambda: sum(kept.values())


def _first(outputs: Any) -> Tensor:
    """The tensor of outputs that losses are taken of."""
    return next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


def _fill(model: nn.Module) -> None:
    """Give every parameter and buffer on the meta device a fake storage, shared ones once."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(fake(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), fake(buffer))
