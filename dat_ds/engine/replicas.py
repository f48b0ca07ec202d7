"""Whether ranks that should hold the same weights do: a checksum of each parameter, compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from dat_ds.engine import hooks
from dat_ds.engine.adversarial import AdversarialEngine

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ReplicaDifference:
    """Weights that ranks do not agree on.

    Attributes:
        parameter: Name of the first.
        ranks: Those whose values are not the most common ones.
        largest: Largest difference of an entry of theirs from those; infinite where one is not
            finite.
        num_parameters: Parameters on which ranks disagree.
    """

    parameter: str
    ranks: tuple[int, ...]
    largest: float
    num_parameters: int


@torch.no_grad()
def replica_difference(engine: AdversarialEngine) -> ReplicaDifference | None:
    """Compare the parameters that every rank holds whole; a collective.

    Under ZeRO 0 to 2 these are all, under ZeRO-3 those that DeepSpeed leaves whole
    (``stage3_param_persistence_threshold``). Buffers are each rank's own: BatchNorm's statistics
    are those of its images. So are weights where an optimizer averages now and then.

    Returns:
        None where all agree, bit for bit, or where there is nothing to compare.
    """
    ranks = engine.ranks
    if ranks.count == 1 or engine.replicas_differ:
        return None
    whole = {
        name: parameter.detach()
        for name, parameter in engine.module.named_parameters()
        if not hooks.is_partitioned(parameter)
    }
    if not whole:
        return None
    own = torch.stack([_checksum(tensor) for tensor in whole.values()]).tolist()
    by_rank = cast("list[list[int]]", ranks.gather(own))
    differing = [i for i, sums in enumerate(zip(*by_rank, strict=True)) if len(set(sums)) > 1]
    if not differing:
        return None
    first = differing[0]
    name, tensor = list(whole.items())[first]
    sums = [of_rank[first] for of_rank in by_rank]
    common = sums.index(Counter(sums).most_common(1)[0][0])
    reference = tensor.clone()
    dist.broadcast(reference, src=common)
    largest = float((tensor.double() - reference.double()).abs().nan_to_num(torch.inf).amax())
    distances = cast("list[float]", ranks.gather(largest))
    return ReplicaDifference(
        name,
        tuple(rank for rank, value in enumerate(sums) if value != sums[common]),
        max(distances),
        len(differing),
    )


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bits of all entries, read as integers, ``()``; exact in any order."""
    integers = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    return integers.sum(dtype=torch.int64)
