"""The section ``dat.finetuning`` of a run config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dat_ds.method import Section, Trait, above, at_least, fraction, positive_share


@dataclass(frozen=True, kw_only=True)
class ParameterRule(Section):
    """What parameters do differently by their names; of a list, the first that matches holds.

    Names are those of the network itself, as its ``named_parameters()`` tells them: without the
    ``body.`` that normalisation puts before them.
    """

    match: str = ""
    """Regular expression that is searched for in the names; ``^`` and ``$`` tie it to their ends.
    One that decides about no parameter is refused."""
    lr: float | None = above(0, None)
    """Multiple of the optimizer's rate, on top of ``layer_decay``. Default: 1."""
    weight_decay: float | None = at_least(0, None)
    """In the place of the optimizer's, also of vectors. Default: the optimizer's."""
    freeze: bool | None = None
    """``true``: they are not trained; ``false``: they are, whatever ``linear_probe`` and ``lora``
    say. Default: as those say."""

    def problems(self) -> Iterator[str]:
        """A rule without names, one that says nothing, and rates of what is not trained."""
        try:
            re.compile(self.match)
        except re.error as error:
            yield (
                f"match={self.match!r} is not a regular expression ({error}): write one such as "
                "'bias$'."
            )
        if not self.match:
            yield "match is missing: write a regular expression, such as 'bias$'."
        rates = [key for key in ("lr", "weight_decay") if getattr(self, key) is not None]
        if not rates and self.freeze is None:
            yield f"match={self.match!r} says nothing: write lr, weight_decay or freeze beside it."
        if rates and self.freeze:
            yield f"{rates[0]}={getattr(self, rates[0])} with freeze=true: keep one of them."


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters of linear layers (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685).

    A layer with weight ``W`` computes ``(W + alpha / rank * B A) x``; ``A`` and ``B``, of ``rank``
    rows and columns, and the classifier are trained, and nothing else. Saved models hold the
    merged weights. Needs ``pip install "dat-ds[finetune]"``. Default: null, no adapters.
    """

    rank: int = at_least(1, 8)
    """Rank of the adapters."""
    alpha: float = above(0, 16.0)
    """Scale of the adapters, over their rank."""
    targets: list[str] | None = None
    """Names of linear layers, whole or the ends of them at a dot (``mlp.fc1``). Default:
    ``qkv`` and ``proj`` of attention; where there is no ``qkv``, its query and value layers."""
    dropout: float = fraction(0.0)
    """Dropout probability of what the adapters read."""

    @property
    def scale(self) -> float:
        """Factor of ``B A``."""
        return self.alpha / self.rank

    def problems(self) -> Iterator[str]:
        """An empty list of layers."""
        if self.targets is not None and not self.targets:
            yield "targets=[] names no layer: leave it out, or write names such as 'attn.qkv'."


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig(Section):
    """Which parameters are trained, and how fast: see docs/finetuning.md."""

    layer_decay: float | None = positive_share(None)
    """Rate of each block over that of the block above it, whose input is its output; the classifier
    has the optimizer's rate (Clark et al., ICLR 2020, arXiv 2003.10555; Bao et al., ICLR 2022,
    arXiv 2106.08254). Default: all have the same."""
    linear_probe: bool = False
    """Train the classifier alone."""
    parameters: list[ParameterRule] = field(default_factory=list)
    """A list of rules by name."""
    lora: LoraConfig | None = None
    """Adapters."""

    @property
    def is_on(self) -> bool:
        """Whether it asks for anything."""
        return self != FinetuningConfig()

    def problems(self) -> Iterator[str]:
        """Wishes that exclude one another."""
        if self.linear_probe and self.lora is not None:
            yield "linear_probe=true trains the classifier alone, without lora: keep one of them."
        if self.linear_probe and self.layer_decay is not None and not self._unfreezes:
            yield (
                f"layer_decay={self.layer_decay:g} with linear_probe=true, which leaves one layer "
                "to train: remove it."
            )

    @property
    def _unfreezes(self) -> bool:
        return any(rule.freeze is False for rule in self.parameters)

    def facts(self, path: str) -> Iterator[tuple[Trait, str]]:
        """That a part of the parameters is frozen."""
        yield from super().facts(path)
        if self.linear_probe:
            yield Trait.FREEZES, f"{path}.linear_probe=true"
        if self.lora is not None:
            yield Trait.FREEZES, f"{path}.lora.rank={self.lora.rank}"
        for i, rule in enumerate(self.parameters):
            if rule.freeze:
                yield Trait.FREEZES, f"{path}.parameters[{i}].freeze=true"
