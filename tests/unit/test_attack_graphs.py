"""Replayed attacks give what attacks give, with a stand-in for CUDA's recorder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dat_ds.attacks import (
    Attack,
    AttackGraphs,
    InputGradient,
    SampleGenerator,
    already_checked,
    attack_mode,
    build_attack,
)
from dat_ds.attacks.noise import RecordedStreams
from dat_ds.attacks.passes.graphs import Outcome
from dat_ds.attacks.pgd import Pgd

LINF = {"norm": "linf", "eps": "8/255"}
L1, L2 = {"norm": "l1", "eps": 10}, {"norm": "l2", "eps": 0.5}
STEPS = {"steps": 3, "step_size": "2/255"}
ATTACKS: dict[str, dict[str, Any]] = {
    "pgd": STEPS,
    "pgd, restarts": {**STEPS, "restarts": 2},
    "pgd, l1": {"steps": 3, "step_size": 1.0, "threat_model": L1},
    "pgd, l2": {"steps": 3, "step_size": 0.1, "threat_model": L2},
    "pgd, kl": {**STEPS, "loss": "kl"},
    "pgd, half the tokens": {**STEPS, "keep_tokens": 0.5},
    "pgd, cw": {**STEPS, "loss": "cw"},
    "pgd, dlr, targeted": {**STEPS, "loss": "dlr", "targeted": True},
    "pgd, folded": {**STEPS, "fold_batch_norm": True},
    "pgd, at a lower resolution": {**STEPS, "resolution": 8},
    "pgd, bf16": {**STEPS, "precision": "bf16"},
    "pgd, int8": {**STEPS, "precision": "int8"},
    "fgsm": {"name": "fgsm"},
    "fgsm_rs": {"name": "fgsm_rs"},
    "n_fgsm": {"name": "n_fgsm"},
    "mim": {"name": "mim", **STEPS},
    "apgd": {"name": "apgd", "steps": 4},
    "apgd, dlr-targeted": {"name": "apgd", "steps": 4, "loss": "dlr-targeted"},
    "multi_norm": {"name": "multi_norm", **STEPS, "other_norms": {"l2": 0.5}},
    "multi_norm, average": {
        "name": "multi_norm",
        **STEPS,
        "other_norms": {"l2": 0.5},
        "combine": "average",
    },
}


class Tape(TorchDispatchMode):
    """Takes down every operation with its tensors, as a graph does; a replay does them again.

    Whatever Python decided or computed on the way is what it was at the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, outputs))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again, into the memory of the first time."""
        for operation, args, kwargs, outputs in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(function: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
    """A recorder for a CPU."""
    with Tape() as tape:
        x_adv, counts = function()
    x_adv.fill_(float("nan"))  # a recorded graph holds no values yet
    return (x_adv, counts), tape.replay


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=4, channels=[8, 8, 16, 16])


def model_of(case: str) -> nn.Module:
    return cnn() if case in ("pgd, folded", "pgd, at a lower resolution") else vit()


def images(count: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator), torch.arange(count) % 4


def attack_of(config: dict[str, Any]) -> Attack:
    if config.get("targeted"):
        return Targeted(
            **fields_of(attack_of({k: config[k] for k in config.keys() - {"targeted"}}))
        )
    return build_attack({"threat_model": LINF, **config})


def fields_of(attack: Attack) -> dict[str, Any]:
    return {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}


class Targeted(Pgd):
    """PGD towards ``y``, which no run config asks for."""

    def own_options(self) -> dict[str, Any]:
        return {**super().own_options(), "targeted": True}


class Run:
    """Attacks with and without graphs on batches of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs = AttackGraphs(model, record=recorded)
        self.step = 0

    @contextlib.contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        with attack_mode(self.model):
            yield self.model

    def compare(self, attack: Attack, count: int = 5) -> None:
        """One attack on new images, which must come out the same either way."""
        x, y = images(count, seed=self.step)
        outcomes = []
        for replays in (False, True):
            gradient, generator = InputGradient(), SampleGenerator(0, self.step)
            if replays:
                x_adv = self.graphs(attack, self.frozen, x, y, generator, gradient)
            else:
                with self.frozen() as model:
                    x_adv = attack(model, x, y, generator, gradient=gradient)
            outcomes.append((x_adv, gradient))
        (expected, counted), (found, counted_too) = outcomes
        assert torch.equal(found, expected)
        assert counted_too == counted
        self.step += 1


@pytest.mark.parametrize("name", ATTACKS)
def test_a_replay_is_the_attack(name: str) -> None:
    run, attack = Run(model_of(name)), attack_of(ATTACKS[name])
    for num_recorded in (0, 1, 1, 1):  # the first of its kind runs as ever
        run.compare(attack)
        assert run.graphs.num_recorded == num_recorded
        with torch.no_grad():
            for parameter in run.model.parameters():  # as an optimizer does, in place
                parameter.add_(torch.randn_like(parameter), alpha=0.02)


def test_every_size_of_batch_has_its_own_recording() -> None:
    run, attack = Run(vit()), attack_of(STEPS)
    for count in (5, 5, 2, 5, 2, 5, 2):
        run.compare(attack, count)
    assert run.graphs.num_recorded == 2


def test_another_attack_is_recorded_anew_and_a_changing_one_not_at_all() -> None:
    run, scheduled = Run(vit()), attack_of({**STEPS, "eps_warmup": 0.5})
    for progress in (0.1, 0.2, 0.3, 0.4):
        for _ in range(3):  # micro-batches of one optimizer step
            run.compare(scheduled.at(progress))
            run.step -= 1
        run.step += 1
    assert run.graphs.num_recorded == 0
    for progress in (0.5, 0.6, 0.7):
        run.compare(scheduled.at(progress))
    assert run.graphs.num_recorded == 1
    for _ in range(3):
        run.compare(attack_of({"name": "fgsm"}))
    assert run.graphs.num_recorded == 2


def test_weights_in_other_memory_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    run, attack = Run(vit()), attack_of(STEPS)

    def moved() -> None:
        weight = run.model.head.weight
        weight.data = weight.data.clone().mul_(1.1)

    for _ in range(3):
        for count in range(1, 6):
            run.compare(attack, count)
            run.step -= 1
        run.step += 1
    assert run.graphs.num_recorded == 5
    moved()  # one move, however many kinds of batches there are
    for _ in range(3):
        run.compare(attack)
    assert run.graphs.num_recorded == 6
    for _ in range(5):
        moved()
        run.compare(attack)
    for _ in range(3):  # given up for good
        run.compare(attack)
    assert run.graphs.num_recorded == 6
    assert caplog.text.count("cuda_graphs=true does nothing any more") == 1


def test_gradients_that_the_host_may_take_again_are_refused() -> None:
    run, (x, y) = Run(vit()), images()
    gradient = InputGradient(retry_non_finite=True)
    with pytest.raises(ValueError, match="cannot take gradients again"):
        run.graphs(attack_of(STEPS), run.frozen, x, y, SampleGenerator(0, 0), gradient)


class NothingFromTheHost(TorchDispatchMode):
    """Refuse what a CUDA graph cannot hold: copies to and from the host."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, outputs)) if isinstance(t, Tensor)]
        if len({t.device for t in tensors}) > 1:
            raise RuntimeError(f"{operation} crosses devices")
        return outputs


@pytest.mark.parametrize("name", [name for name in ATTACKS if "precision" not in ATTACKS[name]])
def test_recorded_attacks_ask_nothing_of_the_host(name: str) -> None:
    # Tensors on the meta device hold no values: whatever would read one raises.
    model = model_of(name).to("meta").eval().requires_grad_(False)
    x, y = (tensor.to("meta") for tensor in images())
    streams, gradient = RecordedStreams(50, len(x), x.device), InputGradient()
    with NothingFromTheHost(), already_checked():
        attack_of(ATTACKS[name])(Behind(model), x, y, streams, gradient=gradient)
    assert gradient.num_samples >= len(x)


def test_fat_does_ask_the_host() -> None:
    model = vit().to("meta").eval().requires_grad_(False)
    x, y = (tensor.to("meta") for tensor in images())
    attack = attack_of({"name": "fat", **STEPS})
    with already_checked(), pytest.raises(RuntimeError, match="meta"):
        attack(Behind(model), x, y, RecordedStreams(50, len(x), x.device))


class Behind:
    """A frozen module as the engine hands it to attacks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)
