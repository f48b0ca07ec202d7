"""Checks of a model with a batch of its images, as one table.

Shapes: ``B`` images; images ``(B, C, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from dat_ds.attacks import ThreatModel, already_checked, attack_mode
from dat_ds.attacks.gradient import Model
from dat_ds.contracts import as_images
from dat_ds.errors import UserError
from dat_ds.evaluation.checks import data, gradients, outputs, strength, unit_test
from dat_ds.evaluation.checks.finding import Check, Finding, Measured
from dat_ds.evaluation.checks.probe import Names, Probe

_NEEDS_PIXELS = "images outside the pixel range cannot be attacked within it"
_MASKED = (
    "The gradient misleads attacks that follow it, so robust accuracy under them is too high "
    "(gradient masking)."
)
_BPDA = (
    "Attack a differentiable stand-in: replace the offending layer in the backward by the identity "
    "or a smooth approximation (BPDA), and add a black-box attack to the ensemble."
)

MODEL_CHECKS: tuple[Check[Probe], ...] = (
    Check(
        "images",
        data.measure_images,
        "The images are not pixels in the range of the threat model, so eps means something else.",
        "Give raw pixels in the range; put the normalisation inside the model.",
    ),
    Check(
        "training_mode",
        data.measure_training_mode,
        "BatchNorm then normalises by the batch, and dropout draws. The evaluation switches every "
        "module to eval mode; whoever else measures this model may not.",
        "Call model.eval() before handing the model over.",
    ),
    Check(
        "accuracy",
        data.measure_accuracy,
        "The model does not classify these images, so its robustness says nothing: weights, "
        "normalisation, or labels do not fit.",
        "Check that the weights are the trained ones, and the data those of the model.",
    ),
    Check(
        "predictions",
        data.measure_predictions,
        "A nearly constant prediction cannot be attacked, and is not robustness.",
        "Check the weights and the normalisation; look at the predicted classes.",
    ),
    Check(
        "label_order",
        data.measure_label_order,
        "The classes of the data are in another order than the model's outputs. Wrong labels make "
        "natural accuracy too low, and attacks lead away from a class that was not predicted.",
        "Sort the classes as in training; map the labels with the class names of both.",
    ),
    Check(
        "normalisation",
        data.measure_normalisation,
        "The images seem to be normalised twice, not at all, or by other statistics than in "
        "training; a doubled normalisation also multiplies eps.",
        "Normalise exactly once, inside the model, with the statistics of training.",
    ),
    Check(
        "probabilities",
        outputs.measure_probabilities,
        "The outputs are probabilities or their logarithms. Losses that expect logits apply "
        "softmax again: of probabilities their gradients vanish where the model is confident.",
        "Return the logits: drop the last softmax, log-softmax or sigmoid.",
    ),
    Check(
        "logit_scale",
        outputs.measure_logit_scale,
        "With logits of this scale, cross-entropy in float32 is flat or nearly constant, so an "
        "attack on it stalls; only losses blind to scale work.",
        "Take the temperature or the factor out of the outputs; attack the DLR loss as well.",
    ),
    Check(
        "clipped_logits",
        outputs.measure_clipped_logits,
        "Logits that saturate at a bound, or tie, have no gradient there, and losses of their "
        "differences are constant.",
        "Return the logits before clamp, ReLU, tanh or rounding.",
    ),
    Check(
        "randomness",
        outputs.measure_randomness,
        "The model draws random numbers (or its gradient does). A single forward decides by luck, "
        "and gradients of one draw are noisy.",
        "Fix the draws, or average logits and gradients over many (EOT) and evaluate the average.",
    ),
    Check(
        "batch_dependence",
        outputs.measure_batch_dependence,
        "The logits of an image depend on the images beside it, or on its place among them, so "
        "accuracy depends on the size and order of batches.",
        "Use running statistics in BatchNorm (training=False); take nothing across the batch.",
    ),
    Check(
        "gradient",
        gradients.measure_gradient,
        "No attack by gradients can work: it returns its start, and counts it as robust.",
        "Take torch.no_grad, detach, NumPy and comparisons out of the forward. " + _BPDA,
    ),
    Check(
        "zero_gradient",
        gradients.measure_zero_gradient,
        _MASKED,
        "Look for rounding, saturation, or sign functions in the forward. " + _BPDA,
    ),
    Check(
        "gradient_agreement",
        gradients.measure_gradient_agreement,
        "The gradient is not the slope of the logits: part of the graph is cut, or has a backward "
        "of its own. " + _MASKED,
        "Look for detach, straight-through estimators and custom backwards. " + _BPDA,
    ),
    Check(
        "input_quantisation",
        gradients.measure_input_quantisation,
        "The logits are piecewise constant in the pixels: the input is rounded, quantised, encoded "
        "or compressed. " + _MASKED,
        _BPDA,
    ),
    Check(
        "continuity",
        gradients.measure_continuity,
        "Changes as small as rounding make the logits jump: the model hashes its input, or rounds "
        "it at the very values that the pixels have.",
        "Find what compares or rounds pixels, and evaluate the model without it.",
    ),
    Check(
        "label_leak",
        gradients.measure_label_leak,
        "The model treats these very images unlike their nearest neighbours: it knows them, and "
        "perhaps their labels. Natural accuracy is then not its own.",
        "Find what the outputs depend on beside the pixels; evaluate on images that are new to it.",
    ),
    Check(
        "verification",
        strength.measure_verification,
        "What the attack reported as misclassified is not when shown again, so counts of broken "
        "images cannot be trusted.",
        "Remove randomness and dependence on the batch; count only verified images.",
    ),
    Check(
        "unbounded_attack",
        strength.measure_unbounded_attack,
        "With eps of half the pixel range all images can become the same, and no model can be "
        "right about them: the attack does not find what exists.",
        _BPDA,
    ),
    Check(
        "convergence",
        strength.measure_convergence,
        "More steps still break more images: the attack has not converged, and robust accuracy is "
        "too high.",
        "Use more steps and restarts until accuracy stays; prefer APGD.",
    ),
    Check(
        "attack_unit_test",
        unit_test.measure_attack_unit_test,
        "The attack misses adversarial examples that are known to exist, so images that withstand "
        "it may not be robust (Zimmermann et al. 2022).",
        "Strengthen or adapt the attack until it passes this test, then evaluate again.",
    ),
    Check(
        "black_box",
        strength.measure_black_box,
        "A search without gradients succeeds where gradients failed. " + _MASKED,
        _BPDA,
    ),
    Check(
        "transfer",
        strength.measure_transfer,
        "Images made for another network succeed where the direct attack failed. " + _MASKED,
        _BPDA,
    ),
    Check(
        "estimated_gradient",
        strength.measure_estimated_gradient,
        "Gradients estimated from differences succeed where the model's own failed. " + _MASKED,
        _BPDA,
    ),
)
"""Checks in order: cheap ones first, in case time runs out."""

_ATTACKING = (
    strength.measure_verification,
    strength.measure_unbounded_attack,
    strength.measure_convergence,
    unit_test.measure_attack_unit_test,
    strength.measure_black_box,
    strength.measure_transfer,
    strength.measure_estimated_gradient,
)
_MAY_FAIL = (RuntimeError, ValueError, IndexError, UserError)


def check_model(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    train_class_names: Sequence[str] | None = None,
    training: Sequence[str] | None = None,
    seconds: float = 100.0,
) -> list[Finding]:
    """Look for what makes an evaluation of this model untrustworthy.

    Leaves the model as it was.

    Args:
        model: Pixels ``(B, C, H, W)`` to logits ``(B, K)``.
        x: Some images, 64 or more; the checks that attack take at most 32 of them.
        y: Their classes ``(B,)`` int64.
        threat: Allowed perturbations.
        seed: Seed of all random numbers.
        class_names: Names of the classes of the data, in order.
        train_class_names: Those of the data that the model was trained on.
        training: Names of the modules that were in training mode when the model was delivered,
            where whoever calls has put them in eval mode since. None: those that are in it now.
        seconds: Time to take, roughly. It decides how many images are attacked; checks that
            attack are skipped when it is over.

    Returns:
        One finding for each of :data:`MODEL_CHECKS`, in that order.

    Raises:
        DataError: For what are not images.
    """
    x = as_images(x, model)
    layers = layers_in_training(model, training)
    names = Names(class_names, train_class_names)
    with attack_mode(model), already_checked():
        probe = Probe(
            model,
            x,
            y,
            threat,
            seed=seed,
            names=names,
            layers_in_training=layers,
            seconds=seconds,
        )
        return list(_findings(probe))


def _findings(probe: Probe) -> Iterator[Finding]:
    out_of_range = False
    for check in MODEL_CHECKS:
        if check.measure in _ATTACKING and out_of_range:
            measured = Measured("skipped", _NEEDS_PIXELS)
        elif check.measure in _ATTACKING and probe.seconds_left < 0:
            measured = Measured("skipped", "the time for checks is over")
        else:
            measured = _measured(check.measure, probe)
        if check.name == "images":
            out_of_range = measured.status == "failed"
        yield check.finding(measured)


def _measured(measure: Callable[[Probe], Measured], probe: Probe) -> Measured:
    try:
        return measure(probe)
    except _MAY_FAIL as error:
        return Measured("skipped", f"it could not be run: {str(error).partition(chr(10))[0]}")


def layers_in_training(model: object, training: Sequence[str] | None = None) -> list[str]:
    """Names of the layers that are in training mode, or were, and behave differently there.

    Args:
        model: The model; one that is not a module has no layers.
        training: Names of the modules that were in training mode; None for those that are.
    """
    if not isinstance(model, nn.Module):
        return []
    names = dict(model.named_modules())
    if training is None:
        training = [name for name, module in names.items() if module.training]
    return [name or "model" for name in training if name in names and _differs(names[name])]


def _differs(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
