"""Strength and speed of our attacks beside other libraries', on one model, batch and budget."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from dat_ds.assembly import build_data_of
from dat_ds.attacks import SampleGenerator, ThreatModel, apgd, pgd
from dat_ds.config import load_config, threat_of
from dat_ds.models import load

Attacker = Callable[[Tensor, Tensor, int], Tensor]
"""``(x, y, seed) -> x_adv``."""
AUTOATTACK_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""Norms by the names that AutoAttack's library gives them."""


FOOLBOX_PGD = {
    "linf": "LinfProjectedGradientDescentAttack",
    "l2": "L2ProjectedGradientDescentAttack",
}
"""Names of foolbox's PGD by norm."""


def network_of_run(folder: Path) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    """Model, test images, their labels, and threat model of a finished run.

    Raises:
        UserError: If it is none.
    """
    run = load_config(folder / "config.json", here=False)
    test = build_data_of(run).test
    x, y = default_collate([test[i] for i in range(len(cast(Sized, test)))])
    return load(folder), x, y, threat_of(run.dat)


def foolbox_accuracies(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, steps: int, restarts: int
) -> tuple[float, float]:
    """Clean accuracy, and accuracy under the worst of several restarts of foolbox's own PGD.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``, in eval mode.
        x: Images.
        y: Class indices ``(B,)``.
        threat: Allowed perturbations, in a norm of :data:`FOOLBOX_PGD`.
        steps: Gradient steps, of foolbox's default size.
        restarts: Random starts.
    """
    foolbox = importlib.import_module("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(threat.lower, threat.upper))
    correct = wrapped(x).argmax(-1) == y
    natural = float(correct.double().mean())
    torch.manual_seed(0)
    attack = getattr(foolbox.attacks, FOOLBOX_PGD[threat.norm])(steps=steps)
    for _ in range(restarts):
        correct &= ~attack(wrapped, x, y, epsilons=threat.eps)[2]
    return natural, float(correct.double().mean())


def pgd_table(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, steps: int, starts: int
) -> str:
    """Mean loss under PGD of the same budget, and time per step, by library.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``, in eval mode.
        x: Images.
        y: Class indices ``(B,)``.
        threat: Allowed perturbations.
        steps: Gradient steps, of ``2.5 eps / steps`` each.
        starts: Random starts; libraries take turns, so that a slow moment meets all of them.

    Returns:
        A markdown table; a library that is not installed is named below it.
    """
    attackers, missing = _pgd_by_library(model, threat, steps)
    losses: dict[str, list[float]] = {name: [] for name in attackers}
    seconds: dict[str, list[float]] = {name: [] for name in attackers}
    for seed in range(starts):
        for name, attack in attackers.items():
            torch.manual_seed(seed)
            begin = time.perf_counter()
            x_adv = attack(x, y, seed)
            seconds[name].append((time.perf_counter() - begin) / steps)
            with torch.no_grad():
                losses[name].append(float(F.cross_entropy(model(x_adv), y)))
    lines = ["| library | mean loss | std over starts | ms per step (median) |"]
    lines.append("|---|---|---|---|")
    for name in attackers:
        loss, milliseconds = torch.tensor(losses[name]), 1000 * torch.tensor(seconds[name])
        lines.append(
            f"| {name} | {loss.mean():.5f} | {loss.std():.5f} | {milliseconds.median():.1f} |"
        )
    return "\n".join([*lines, *missing])


def apgd_table(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, steps: int) -> str:
    """Robust accuracy in percent under our APGD and AutoAttack's own, one random start each.

    Args:
        model: Pixels ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``, in eval mode.
        x: Images.
        y: Class indices ``(B,)``.
        threat: Allowed perturbations.
        steps: Gradient steps.

    Returns:
        A markdown table, or what to install for it.
    """
    base = _library("pyautoattack.autopgd_base")
    if base is None:
        return "AutoAttack is not installed: pip install pyautoattack."
    norm = AUTOATTACK_NORMS[threat.norm]
    lines = ["| loss | dat_ds | AutoAttack | s | s |", "|---|---|---|---|---|"]
    for loss in ("ce", "dlr"):
        theirs = base.APGDAttack(
            model, n_iter=steps, norm=norm, eps=threat.eps, loss=loss, device=str(x.device)
        )
        begin = time.perf_counter()
        generator = SampleGenerator(0, 0)
        ours = apgd(model, x, y, threat=threat, steps=steps, loss=loss, generator=generator)
        middle = time.perf_counter()
        found = theirs.perturb(x, y)
        end = time.perf_counter()
        shares = [100 * _robust_share(model, x_adv, x, y) for x_adv in (ours, found)]
        lines.append(
            f"| {loss} | {shares[0]:.2f} | {shares[1]:.2f} | {middle - begin:.1f} | "
            f"{end - middle:.1f} |"
        )
    return "\n".join(lines)


def _pgd_by_library(
    model: nn.Module, threat: ThreatModel, steps: int
) -> tuple[dict[str, Attacker], list[str]]:
    size, eps, norm = 2.5 * threat.eps / steps, threat.eps, threat.norm

    def ours(x: Tensor, y: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)  # like theirs, torch's own
        return pgd(model, x, y, threat=threat, steps=steps, step_size=size, generator=generator)

    attackers: dict[str, Attacker] = {"dat_ds": ours}
    missing = []
    if norm == "l1":
        return attackers, ["torchattacks and foolbox have no l1 PGD to compare with."]
    if (torchattacks := _library("torchattacks")) is not None:
        kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
        attack = kind(model, eps=eps, alpha=size, steps=steps, random_start=True)
        attackers["torchattacks"] = lambda x, y, seed: attack(x, y)
    else:
        missing.append("torchattacks is not installed: pip install --no-deps torchattacks.")
    if (foolbox := _library("foolbox")) is not None:
        run = getattr(foolbox.attacks, FOOLBOX_PGD[norm])(abs_stepsize=size, steps=steps)
        wrapped = foolbox.PyTorchModel(model, bounds=(threat.lower, threat.upper))
        attackers["foolbox"] = lambda x, y, seed: run(wrapped, x, y, epsilons=eps)[1]
    else:
        missing.append("foolbox is not installed: pip install foolbox.")
    return attackers, missing


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@torch.no_grad()
def _robust_share(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of images that are classified correctly before and after."""
    robust = (model(x_adv).argmax(1) == y) & (model(x).argmax(1) == y)
    return float(robust.double().mean())
