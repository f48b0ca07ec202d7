"""One forward of a Trainer's micro-step, turned into the outer forward of adversarial training.

Shapes: ``B`` this rank's micro-batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dat_ds import zero3
from dat_ds.attacks import attack_mode
from dat_ds.attacks.modes import ModelMode
from dat_ds.casting import LayerCasts, refuse_mixed_dtypes
from dat_ds.errors import ConfigError
from dat_ds.integrations.hf import internals
from dat_ds.integrations.hf.pixels import PixelScale, rounding_of, unpacked
from dat_ds.integrations.hf.settings import Settings
from dat_ds.minmax import (
    Access,
    BatchReader,
    FiniteWatch,
    InnerMaximisation,
    MicroBatch,
    Moment,
    NonFinite,
    OuterForward,
    PerturbedWeights,
    PhaseTimer,
    StepMetrics,
    fill_up,
    refusal_of_unlabelled,
    refuse_sharded,
)
from dat_ds.minmax.outer import OuterBatch
from dat_ds.ranks import Ranks

logger = logging.getLogger("dat_ds")

_OUTPUTS = {"classes": ("logits",), "features": ("image_embeds", "pooler_output")}
_NO_LABELS = (
    "The batch has no labels: give the data a column 'label' or 'labels'. (A compute_loss_func "
    "takes them away before the model sees them: use AdversarialTrainer, which keeps them.)"
)
_ADVICE = {
    torch.bfloat16: "train with bf16=True and without DeepSpeed's bf16, weights in float32",
    torch.float16: "train with fp16=True and without DeepSpeed's fp16, weights in float32",
}
_NOT_FOR_THE_MODEL = ("labels", "num_items_in_batch", "pixel_values")


class PixelView:
    """A Hugging Face model as attacks and evaluations see it: pixels in, one tensor out.

    Args:
        module: The bare model.
        pixels: Scale of its ``pixel_values``.
        head: Of the objective; chooses among the model's outputs.
        options: Further keyword arguments of every call.
    """

    def __init__(
        self,
        module: nn.Module,
        pixels: PixelScale,
        head: str,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = module
        self._pixels = pixels
        self._head = head
        self._options = {**(options or {}), "return_dict": True}

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of pixels ``x``, float32.

        Raises:
            ConfigError: If an operation of the model's own takes 16-bit weights with float32.
        """
        filled = fill_up(x, self.module) if self.module.training else x
        try:
            outputs = self.module(pixel_values=self.input_of(filled), **self._options)
        except RuntimeError as error:
            refuse_mixed_dtypes(self.module, error, _ADVICE)
            raise
        return self.output_of(outputs) if filled is x else self.output_of(outputs)[: len(x)]

    def input_of(self, x: Tensor) -> Tensor:
        """``pixel_values`` of ``x``, float32: the layers of a 16-bit model cast them."""
        dtypes = (p.dtype for p in self.module.parameters() if p.dtype.is_floating_point)
        values = self._pixels.to_values(x)
        return values.to(torch.promote_types(values.dtype, next(dtypes, values.dtype)))

    def output_of(self, outputs: Any) -> Tensor:
        """Output that the objective compares.

        Raises:
            ConfigError: Where the model does not put it out.
        """
        names = _OUTPUTS[self._head]
        for name in names:
            found = outputs.get(name)
            if isinstance(found, Tensor):
                return found
        raise ConfigError(
            f"{type(self.module).__name__} puts out {', '.join(outputs)}, and none of "
            f"{', '.join(names)}, which the objective needs: train a model such as "
            + (
                "ViTForImageClassification."
                if self._head == "classes"
                else "CLIPVisionModelWithProjection."
            )
        )


class AdversarialForward:
    """Hooks for one forward of the bare model at a time.

    :meth:`arm` puts a hook before the next forward in training. It takes the batch's images,
    attacks them by calling the bare module, and lets the model see the outer batch; a second hook
    then puts the objective's loss and the adversarial outputs into what the model returns. Each
    removes itself before it does its work, so the attack's own forwards meet none, and an error
    leaves none behind.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        pixels: PixelScale,
        ranks: Ranks,
        *,
        micro_batch: int,
        optimizer: Any,
        reference: PixelView | None,
        helper: nn.Module | None,
        overflows: bool,
        other_labels: Callable[[], Tensor | None],
        user_computes_loss: bool,
        packs: bool,
    ) -> None:
        """Hook nothing yet.

        Args:
            module: The bare model.
            settings: Settings of the callback.
            pixels: Scale of its ``pixel_values``.
            ranks: The processes of the run.
            micro_batch: Images of a rank in a micro-step.
            optimizer: The Trainer's, which knows the loss scale and, under ZeRO-3, the parameters.
            reference: The model as it was at the start, where the objective needs it.
            helper: HAT's naturally trained model.
            overflows: Whether the model computes in float16.
            other_labels: Labels of the batch where the model is not given them.
            user_computes_loss: Leave the loss to who gets the model's outputs.
            packs: Whether pixels come as the data loader's packed bits.

        Raises:
            ConfigError: For perturbed weights that are never on the device at once.
        """
        self._module = module
        self._settings = settings
        self._pixels = pixels
        self._ranks = ranks
        self._optimizer = optimizer
        self._reference = reference
        self._handles: list[RemovableHandle] = []
        self._casts = LayerCasts(module)
        self._batch_norm = contextlib.ExitStack()
        self._moment = Moment(seed=settings.dat.seed, step=0)
        self._view = PixelView(module, pixels, settings.objective.head)
        self._checked = False
        self._awaited: list[bool] = []
        self._other_labels = other_labels
        self._user_computes_loss = user_computes_loss
        self._packs = packs
        dat, objective = settings.dat, settings.objective
        is_sharded = zero3.is_sharded(module)
        budget = dat.engine.resident_parameters_gib * 2**30
        self._keeps_parameters = is_sharded and zero3.gathered_bytes(module) <= budget
        self._inner = InnerMaximisation(
            Access(ranks, self._opened, overflows),
            settings.attack,
            model_mode=settings.model_mode,
            precision=dat.attack.precision,
            aligns=dat.objective.grad_align > 0,
        )
        self._reader = BatchReader(
            objective,
            ranks,
            settings.threat,
            without_label=refusal_of_unlabelled(objective, settings.attack),
            unlabelled_weight=settings.unlabelled_weight,
            reference=self._original,
            source=f" ({pixels})",
        )
        if objective.head == "classes":
            # Known before the first forward, whose own loss would end in an index error.
            config: Any = module.config
            self._reader.gate.num_classes = int(config.num_labels)
        self._outer = OuterForward(
            module,
            objective,
            settings.threat,
            ranks,
            micro_batch=micro_batch,
            helper=helper,
            grad_align=dat.objective.grad_align,
            splits_batch_norm=dat.objective.batch_norm == "split",
        )
        if settings.weight_perturbation is not None and is_sharded and not self._keeps_parameters:
            refuse_sharded(module)
        self._weights = PerturbedWeights(
            settings.weight_perturbation,
            module,
            ranks,
            start=dat.weight_perturbation.start,
            whole=self._resident,
        )
        self._finite = FiniteWatch()
        self._overflows = overflows
        self._warned_of_loss = False
        self._metrics = self._new_metrics()
        self._num_micro_steps = 0

    def arm(self, moment: Moment) -> None:
        """Attack the next forward of the module in training mode, and that one alone."""
        self.disarm()
        self._weights.restore()
        self._moment = moment
        self._handles.append(
            # Ahead of all others: ZeRO-3's hooks gather and trace what the outer forward uses.
            self._module.register_forward_pre_hook(
                _uncompiled(self._before), prepend=True, with_kwargs=True
            )
        )

    def disarm(self) -> None:
        """Leave nothing on the module."""
        while self._handles:
            self._handles.pop().remove()
        self._batch_norm.close()

    def check_micro_step(self) -> None:
        """Refuse a micro-step that did not train on the objective's loss.

        Raises:
            ConfigError: If the module was not called, or the backward passed by its loss.
        """
        self._weights.restore()  # where the loss never went backward
        if self._handles:
            self.disarm()
            raise ConfigError(
                "A step of the Trainer went by without a forward of its model in training mode: "
                "nothing was attacked. Adversarial training needs a compute_loss that calls "
                "model(**inputs)."
            )
        was_used = all(self._awaited)
        self._awaited.clear()
        if not was_used:
            raise ConfigError(
                "The loss that was trained on is not the model's output 'loss', where the "
                "objective's is: compute_loss of this Trainer computes its own. Use the Trainer's "
                "compute_loss, or AdversarialTrainer(compute_loss_func=...)."
            )
        self._inner.after_backward(self._metrics.gradient)

    def take_means(self) -> dict[str, float]:
        """Accuracies, terms and shares since the last call, over all ranks; a collective."""
        self.check_batches()
        metrics, count = self._metrics, self._num_micro_steps
        self._metrics, self._num_micro_steps = self._new_metrics(), 0
        if count == 0:
            return {}
        # In float32, as the Trainer sums up the losses that it logs.
        sums = self._ranks.sum(metrics.sums().float())
        means = metrics.means(sums, self._ranks.count * count)
        return {
            name.removesuffix("_acc") + "_accuracy" if name.endswith("_acc") else name: value
            for name, value in means.items()
            if value is not None
            and name != "loss"  # which the Trainer logs
            and not (self._inner.is_natural and name.startswith("attack_"))
        }

    def check_batches(self) -> None:
        """Tell of faulty images, labels and losses since the last time; a collective.

        Raises:
            DataError: On every rank, if a rank saw a faulty image or label.
        """
        self._reader.watch.check()
        if self._overflows or self._warned_of_loss:
            return
        found = self._ranks.gather(self._finite.first())
        faults = [(rank, item) for rank, item in enumerate(found) if isinstance(item, NonFinite)]
        if not faults:
            return
        self._warned_of_loss = True
        rank, first = min(faults, key=lambda fault: fault[1].step)
        if self._ranks.is_main:
            logger.warning(
                "The loss is %s in step %d, micro-step %d, on rank %d; this is said once. The "
                "Trainer goes on, and logs other numbers in the place of such losses "
                "(logging_nan_inf_filter). Usual causes: a learning rate that is too high, or too "
                "short a warm-up.",
                first.loss,
                first.step,
                first.micro_steps[0],
                rank,
            )

    def detach(self) -> None:
        """Leave nothing on the module, and its weights as they were."""
        self.disarm()
        self._casts.remove()
        self._weights.restore()

    # ---- hooks

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        self.disarm()
        values, labels, options = self._read(args, kwargs)
        view = self._view = PixelView(module, self._pixels, self._settings.objective.head, options)
        x = self._pixels.to_pixels(values)
        weight = _weight_of(labels, kwargs.get("num_items_in_batch"))
        part, batch = self._attacked(x, labels, weight, rounding_of(values.dtype))
        inputs = view.input_of(fill_up(batch.images, module))

        def after(
            _module: nn.Module, _args: Any, given: dict[str, Any], outputs: Any
        ) -> dict[str, Any] | None:
            self.disarm()
            if outputs is None:
                self._weights.restore()
            if outputs is None or given.get("pixel_values") is not inputs:
                return None
            return self._rewrite(view, part, batch, outputs, weight)

        self._batch_norm.enter_context(self._outer.normalised(batch))
        self._handles.append(
            module.register_forward_hook(_uncompiled(after), with_kwargs=True, always_call=True)
        )
        return (), {**options, "return_dict": True, "pixel_values": inputs}

    def _read(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Values of the images, labels, and what else the model is given."""
        values = kwargs.get("pixel_values", args[0] if args else None)
        if not isinstance(values, Tensor) or values.ndim != 4:
            raise ConfigError(
                "The model was not called with pixel_values (B, C, H, W), so there is nothing to "
                f"attack; it got {', '.join(kwargs) or 'nothing by name'}."
            )
        options = {k: v for k, v in kwargs.items() if k not in _NOT_FOR_THE_MODEL and v is not None}
        for key, value in options.items():
            if isinstance(value, Tensor):
                raise ConfigError(
                    f"The model was called with {key}, a tensor beside pixel_values: adversarial "
                    "training is for models of images alone. Remove it from the batch."
                )
        if self._packs:
            values = unpacked(values)
        labels = kwargs.get("labels")
        labels = self._other_labels() if labels is None else labels
        self._pixels.check_kind(values)
        if not self._checked:
            self._pixels.check(values, self._settings.threat)
            self._checked = True
        if labels is None:
            if self._settings.objective.head == "classes":
                raise ConfigError(_NO_LABELS)
            labels = values.new_zeros(len(values), dtype=torch.int64)
        return values, labels, options

    # ---- the inner maximisation

    def _attacked(
        self, x: Tensor, y: Tensor, weight: Any, rounding: float
    ) -> tuple[MicroBatch, OuterBatch]:
        """The micro-batch, and the images of its outer forward; weights are perturbed for it."""
        part = self._reader.read(x, y, self._moment, rounding=rounding)
        ((part, found),) = self._inner.maximise([part], self._metrics.gradient)
        probes = self._inner.probes(part)
        self._inner.await_backward(part, found)
        batch = self._outer.batch(part, found, probes)
        if self._weights.applies(self._moment.progress):

            def outer_loss() -> Tensor:
                with self._outer.normalised(batch):
                    outputs = self._view(batch.images)
                with _exact(outputs):
                    loss: Tensor = self._outer.terms(batch, outputs, part).terms["loss"] * weight
                return loss

            self._weights.apply(outer_loss, internals.loss_scale(self._optimizer))
        return part, batch

    @contextlib.contextmanager
    def _opened(self, model_mode: ModelMode) -> Iterator[PixelView]:
        """The model as an attack may use it; no trace is left."""
        try:
            with self._resident(), attack_mode(self._module, model_mode):
                yield self._view
        except BaseException:
            # A forward that broke off leaves ZeRO-3 parameters gathered, and marked as in use.
            zero3.release_parameters(self._module)
            raise

    def _resident(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a forward leaves ZeRO-3 parameters gathered, where memory allows it."""
        if not self._keeps_parameters:
            return contextlib.nullcontext()
        return zero3.resident_parameters(self._module, internals.bare_optimizer(self._optimizer))

    def _new_metrics(self) -> StepMetrics:
        return StepMetrics(PhaseTimer(self._ranks.device), self._inner.input_gradient())

    @torch.no_grad()
    def _original(self, x: Tensor) -> Tensor:
        """Outputs of the model as it was at the start."""
        assert self._reference is not None
        return self._reference(x)

    # ---- the outer loss

    def _rewrite(
        self, view: PixelView, part: MicroBatch, batch: OuterBatch, outputs: Any, weight: Any
    ) -> dict[str, Any]:
        """The model's outputs with the objective's loss, for the adversarial images alone."""
        found = view.output_of(outputs)
        with _exact(found):
            outer = self._outer.terms(batch, found[: len(batch.images)], part)
        if not self._overflows:
            self._finite.see_loss(outer, part)
        self._metrics.add(
            outer,
            part,
            factor=1.0,
            classifies=self._settings.objective.classifies,
            natural=self._inner.is_natural,
        )
        self._num_micro_steps += 1
        rewritten: dict[str, Any] = type(outputs)()
        if not self._user_computes_loss:
            loss = outer.terms["loss"] * weight
            self._await_backward_of(loss)
            rewritten["loss"] = loss
        name = next(name for name in outputs if outputs[name] is found)
        rewritten[name] = outer.logits_adv
        return rewritten

    def _await_backward_of(self, loss: Tensor) -> None:
        slot = len(self._awaited)
        self._awaited.append(False)

        def note(gradient: Tensor | None) -> None:
            # DDP goes backward through all outputs, with None where the loss passed one by.
            self._awaited[slot] = gradient is not None
            if self._settings.weight_perturbation is not None:
                # At the end of this backward: DeepSpeed steps before the Trainer's next event.
                torch.autograd.Variable._execution_engine.queue_callback(self._weights.restore)

        loss.register_hook(note)  # type: ignore[no-untyped-call]


def _exact(outputs: Tensor) -> contextlib.AbstractContextManager[object]:
    """Without the autocast of the model's forward, for the objective of its outputs."""
    return torch.autocast(outputs.device.type, enabled=False)


def _weight_of(labels: Tensor, num_items: Any) -> Any:
    """Factor from a mean over the micro-batch to what the Trainer expects of the loss.

    Where it gives the number of label values of all micro-batches and ranks, it expects the sum
    over images in the proportion of their values to that number, and takes care of the ranks.
    """
    return 1.0 if num_items is None else labels.numel() / num_items


def _uncompiled(hook: Callable[..., Any]) -> Any:
    """``hook`` as it is under ``torch.compile``, which compiles the model's forward alone."""
    return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
