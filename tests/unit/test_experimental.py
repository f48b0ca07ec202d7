"""What no GPU has run says so where it is switched on, and in its documentation."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from torch import nn

from dat_ds.attacks import AttackGraphs, ThreatModel
from dat_ds.attacks.passes import graphs, quantized
from dat_ds.attacks.pgd import Pgd
from dat_ds.config.reference import reference
from dat_ds.minmax.inner import Access, InnerMaximisation
from dat_ds.ranks import Ranks

FP8 = "experimental: dat.attack.precision='fp8' has not run on a GPU yet."
GRAPHS = "experimental: dat.engine.cuda_graphs=true has not run on a GPU yet."


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Messages of the package, whether or not a command line has silenced it before."""
    logger = logging.getLogger("dat_ds")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    return caplog


@pytest.mark.parametrize(
    ("precision", "replays", "rank", "said"),
    [
        ("fp8", False, 0, [FP8]),
        (None, True, 0, [GRAPHS]),
        ("fp8", True, 0, [FP8, GRAPHS]),
        ("fp8", True, 1, []),
        ("int8", False, 0, []),
        (None, False, 0, []),
    ],
)
def test_it_says_so_once_on_rank_0(
    log: pytest.LogCaptureFixture, precision, replays: bool, rank: int, said: list[str]
) -> None:
    ranks = Ranks(rank, 1, torch.device("cpu"), None)
    access = Access(ranks, lambda mode: contextlib.nullcontext(nn.Identity()), overflows=False)
    attack = Pgd(threat=ThreatModel("linf", 0.1), precision=precision)
    replay = AttackGraphs(nn.Identity()) if replays else None
    InnerMaximisation(access, attack, graphs=replay)
    assert [r.getMessage() for r in log.records if "experimental" in r.getMessage()] == said


def test_its_documentation_says_so() -> None:
    assert "experimental" in (quantized.__doc__ or "").lower()
    assert "experimental" in (graphs.__doc__ or "").lower()
    rows = [line for line in reference().splitlines() if line.startswith("| `cuda_graphs`")]
    rows += [line for line in reference().splitlines() if "`fp8` is" in line]
    assert len(rows) >= 2
    assert all("xperimental: no GPU has run it yet" in row for row in rows)
