"""One forward of a Trainer's micro-step, turned into the outer forward of adversarial training.

Shapes: ``B`` this rank's micro-batch, ``K`` classes; images ``(B, C, H, W)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dat_ds.attacks import InputGradient, SampleGenerator, attack_mode
from dat_ds.errors import ConfigError
from dat_ds.integrations.hf.pixels import PixelScale, unpacked
from dat_ds.integrations.hf.settings import Settings
from dat_ds.minmax.outer import OuterBatch, num_correct, outer_batch
from dat_ds.models.batch_norm import split_batch_norm
from dat_ds.objectives.grad_align import alignment_probes

_OUTPUTS = {"classes": ("logits",), "features": ("image_embeds", "pooler_output")}
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
        """Outputs of pixels ``x``, float32, which are cast only after they were normalised."""
        outputs = self.module(pixel_values=self.input_of(x), **self._options)
        return self.output_of(outputs)

    def input_of(self, x: Tensor) -> Tensor:
        """``pixel_values`` of ``x`` in the dtype of the model's parameters."""
        dtypes = (p.dtype for p in self.module.parameters() if p.dtype.is_floating_point)
        return self._pixels.to_values(x).to(next(dtypes, torch.float32))

    def output_of(self, outputs: Any) -> Tensor:
        """What the objective compares.

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


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in the run a micro-step is.

    Attributes:
        step: Optimizer steps done.
        progress: Share of the run that is done, in [0, 1].
        first_image: Index of the micro-batch's first image within the step's global batch.
    """

    step: int
    progress: float
    first_image: int


@dataclass
class Counts:
    """Sums over the micro-steps since the last log, on the device."""

    correct: dict[str, Any] = field(default_factory=dict)
    num_images: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0

    def add(self, kind: str, logits: Tensor, y: Tensor) -> None:
        """Count correctly classified images of a kind."""
        correct, count = num_correct(logits.detach(), y)
        self.correct[kind] = self.correct.get(kind, 0) + correct
        self.num_images[kind] = self.num_images.get(kind, 0) + count

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Add an objective's terms but for the loss, which the Trainer logs."""
        self.num_steps += 1
        for name, value in terms.items():
            if name != "loss":
                self.terms[name] = self.terms.get(name, 0) + value

    def means(self) -> dict[str, float]:
        """Accuracies and mean terms over all ranks; a collective."""
        if self.num_steps == 0:
            return {}
        kinds = list(self.correct)
        sums = [self.correct[k] for k in kinds] + [self.num_images[k] for k in kinds]
        sums += [*self.terms.values(), self.num_steps]
        device = next((s.device for s in sums if isinstance(s, Tensor)), None)
        total = torch.stack([torch.as_tensor(s, device=device).float() for s in sums])
        if num_ranks() > 1:
            dist.all_reduce(total)
        *values, steps = total.tolist()
        n = len(kinds)
        means = {f"{kind}_accuracy": values[i] / values[n + i] for i, kind in enumerate(kinds)}
        terms = values[2 * n :]
        return means | {name: v / steps for name, v in zip(self.terms, terms, strict=True)}


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
        *,
        reference: PixelView | None,
        helper: nn.Module | None,
        overflows: bool,
        other_labels: Callable[[], Tensor | None],
        user_computes_loss: bool,
    ) -> None:
        """Hook nothing yet.

        Args:
            module: The bare model.
            settings: What to train.
            pixels: Scale of its ``pixel_values``.
            reference: The model as it was at the start, where the objective needs it.
            helper: HAT's naturally trained model.
            overflows: Whether the model computes in float16.
            other_labels: Labels of the batch where the model is not given them.
            user_computes_loss: Leave the loss to who gets the model's outputs.
        """
        self._module = module
        self._overflows = overflows
        self._settings = settings
        self._pixels = pixels
        self._reference = reference
        self._helper = helper
        self._handles: list[RemovableHandle] = []
        self._batch_norm = contextlib.ExitStack()
        self._moment = Moment(step=0, progress=0.0, first_image=0)
        self._checked = False
        self._awaited: list[bool] = []
        self._counts = Counts()
        self._other_labels = other_labels
        self._user_computes_loss = user_computes_loss

    def arm(self, moment: Moment) -> None:
        """Attack the next forward of the module in training mode, and that one alone."""
        self.disarm()
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

    def take_means(self) -> dict[str, float]:
        """Accuracies and terms since the last call, over all ranks; a collective."""
        means = self._counts.means()
        self._counts = Counts()
        return means

    # ---- hooks

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        self.disarm()
        values, labels, options = self._read(args, kwargs)
        view = PixelView(module, self._pixels, self._settings.objective.head, options)
        x = self._pixels.to_pixels(values, self._settings.threat)
        batch, y = self._outer_batch(view, x, labels)
        weight = _weight_of(len(x), kwargs.get("num_items_in_batch"))
        inputs = view.input_of(batch.images)

        def after(
            _module: nn.Module, _args: Any, given: dict[str, Any], outputs: Any
        ) -> dict[str, Any] | None:
            self.disarm()
            if outputs is None or given.get("pixel_values") is not inputs:
                return None
            return self._rewrite(view, batch, y, outputs, weight)

        if self._settings.dat.objective.batch_norm == "split" and len(batch.sizes) > 1:
            self._batch_norm.enter_context(split_batch_norm(module, list(batch.sizes.values())))
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
        values = unpacked(values)
        labels = kwargs.get("labels")
        labels = self._other_labels() if labels is None else labels
        if not self._checked:
            self._pixels.check(values, self._settings.threat)
            self._check_labels(labels)
            self._checked = True
        if labels is None:
            labels = values.new_zeros(len(values), dtype=torch.int64)
        return values, labels, options

    def _check_labels(self, labels: Tensor | None) -> None:
        if self._settings.objective.head != "classes":
            return
        if labels is None:
            raise ConfigError(
                "The batch has no labels: give the data a column 'label' or 'labels'. (A "
                "compute_loss_func takes them away before the model sees them: use "
                "AdversarialTrainer, which keeps them.)"
            )
        if labels.is_floating_point():
            sums = labels.float().sum(dim=-1)
            if labels.ndim != 2 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
                raise ConfigError(
                    "labels are floating-point and no probabilities (rows that sum to 1): several "
                    "labels an image, and regression, are not supported. Give class indices."
                )
        elif int(labels.min()) < 0:
            raise ConfigError(
                f"labels hold {int(labels.min())}: images without a label are not supported under "
                "Hugging Face's Trainer. Filter them out of the training data."
            )

    # ---- the inner maximisation

    def _outer_batch(self, view: PixelView, x: Tensor, y: Tensor) -> tuple[OuterBatch, Tensor]:
        settings, moment = self._settings, self._moment
        objective, seed = settings.objective, settings.dat.seed
        # Streams of their own, as in the engine: views + 2, probes + 1, random starts + 0.
        views = SampleGenerator(seed + 2, moment.step, moment.first_image)
        x, y = objective.inputs(x, y, generator=views, reference=self._original)
        first = moment.first_image * objective.num_views
        if settings.attack is None:
            return outer_batch(objective, x, x, threat=settings.threat), y
        attack = settings.attack.at(moment.progress)
        generator = SampleGenerator(seed, moment.step, first)
        mode = attack.model_mode
        with attack_mode(view.module, mode):
            x_adv = attack(view, x, y, generator, gradient=self._input_gradient())
        probes = None
        if settings.dat.objective.grad_align:
            source = SampleGenerator(seed + 1, moment.step, first)
            with attack_mode(view.module, mode):
                probes = alignment_probes(
                    view, x, y, threat=attack.ball, generator=source, model_mode=mode
                )
        return outer_batch(objective, x, x_adv, threat=attack.ball, probes=probes), y

    def _input_gradient(self) -> InputGradient:
        attack = self._settings.attack
        overflows = self._overflows or (attack is not None and attack.precision == "fp16")
        return InputGradient(retry_non_finite=overflows, agree=any_rank)

    @torch.no_grad()
    def _original(self, x: Tensor) -> Tensor:
        """Outputs of the model as it was at the start."""
        assert self._reference is not None
        return self._reference(x)

    # ---- the outer loss

    def _rewrite(
        self, view: PixelView, batch: OuterBatch, y: Tensor, outputs: Any, weight: Any
    ) -> dict[str, Any]:
        """The model's outputs with the objective's loss, for the adversarial images alone."""
        settings = self._settings
        found = view.output_of(outputs)
        with torch.autocast(found.device.type, enabled=False):
            outer = batch.terms(
                found, y, helper=self._helper, grad_align=settings.dat.objective.grad_align
            )
        if settings.objective.classifies:
            if settings.attack is not None:
                self._counts.add("robust", outer.logits_adv, y)
            natural = outer.logits_adv if settings.attack is None else outer.logits
            if natural is not None:
                self._counts.add("natural", natural, y)
        self._counts.add_terms(outer.terms)
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

        loss.register_hook(note)  # type: ignore[no-untyped-call]


def _weight_of(num_images: int, num_items: Any) -> Any:
    """Factor from a mean over the micro-batch to what the Trainer expects of the loss.

    Where it gives the number of labels of all micro-batches and ranks, it expects their sum over
    that number, and takes care of the ranks.
    """
    return 1.0 if num_items is None else num_images / num_items


def _uncompiled(hook: Callable[..., Any]) -> Any:
    """``hook`` as it is under ``torch.compile``, which compiles the model's forward alone."""
    return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]


def num_ranks() -> int:
    """Data-parallel processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def any_rank(flag: Tensor) -> bool:
    """Whether ``flag``, a 0-dim bool tensor, is true on any rank; synchronises the host."""
    if num_ranks() == 1:
        return bool(flag)
    total = flag.to(torch.int32)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bool(total)
