"""Random numbers for attacks, either from a ``torch.Generator`` or counter-based.

A counter-based source gives every sample its own stream, a pure function of
``(seed, step, global sample index, draw)``. It needs no saved state, and the numbers depend
neither on the number of ranks nor on the micro-batch nor on the device.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

START = "start"
_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, which is what torch's int64 holds."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(z: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), on Python integers."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * _MULTIPLIERS[0]) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLIERS[1]) & _MASK
    return z ^ (z >> 31)


def _mix_tensor_(z: Tensor) -> Tensor:
    """:func:`_mix` on an int64 tensor, in place; shifts are made logical by a mask."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        z.mul_(_signed(multiplier))
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def _absorbed(*parts: int) -> int:
    """Hash integers into 64 bits."""
    key = 0
    for part in parts:
        key = _mix(key ^ _mix(part + _GOLDEN_GAMMA))
    return key


def stream_key(*parts: int) -> int:
    """Hash integers into one 63-bit key; a different order gives a different key."""
    return _absorbed(*parts) >> 1


def _parts_of(stream: str) -> tuple[int, ...]:
    """Parts of the hash from a stream's name; none for an attack's random starts."""
    if stream == START:
        return ()
    return (int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little"),)


@dataclass
class SampleGenerator:
    """Counter-based source of one batch's random numbers.

    Args:
        seed: Seed of the run.
        step: Optimizer step, so that every step draws anew.
        first_index: Index, within the step's global batch, of the batch's first sample.
        indices: Those of all its samples, where they do not follow one another.
        stream: Purpose of the numbers: draws of different streams have nothing in common, whatever
            their seeds. ``"start"`` is an attack's random start.
    """

    seed: int
    step: int
    first_index: int = 0
    indices: Sequence[int] | None = None
    stream: str = START
    _draws: int = field(default=0, init=False, repr=False)

    @property
    def num_draws(self) -> int:
        """How often numbers were drawn."""
        return self._draws

    def bits(self, batch: int, numel: int, device: torch.device) -> Tensor:
        """Next 64 random bits for ``numel`` elements of each sample: int64 ``(batch, numel)``."""
        counter = torch.arange(1, numel + 1, device=device) * _signed(_GOLDEN_GAMMA)
        return _mix_tensor_(self._streams(batch, device).unsqueeze(1) + counter)

    def keys(self, batch: int) -> Tensor:
        """Next draw's key of each sample: int64 ``(batch,)``.

        It is ``stream_key(seed, step, index, draw)``; of another stream than ``"start"`` a hash of
        its name stands after ``step``.

        Raises:
            ValueError: For a draw of more samples than there are indices.
        """
        if self.indices is None:
            keys = torch.arange(self.first_index, self.first_index + batch)
        elif batch <= len(self.indices):
            keys = torch.tensor(self.indices[:batch], dtype=torch.int64)
        else:
            raise ValueError(
                f"A draw for {batch} samples of a batch of {len(self.indices)}: draw once for each "
                "image, several times if need be."
            )
        _mix_tensor_(keys.add_(_signed(_GOLDEN_GAMMA)))
        keys.bitwise_xor_(_signed(_absorbed(self.seed, self.step, *_parts_of(self.stream))))
        _mix_tensor_(keys).bitwise_xor_(_signed(_mix(self._draws + _GOLDEN_GAMMA)))
        self._draws += 1
        return (_mix_tensor_(keys) >> 1).bitwise_and_((1 << 63) - 1)

    def _streams(self, batch: int, device: torch.device) -> Tensor:
        """:meth:`keys` on the device."""
        return self.keys(batch).to(device)


class RecordedStreams(SampleGenerator):
    """The draws of another source, from keys in memory that a recorded computation finds again.

    Args:
        num_draws: How often the computation draws.
        batch: Samples of each draw.
        device: Where the keys lie.
    """

    def __init__(self, num_draws: int, batch: int, device: torch.device) -> None:
        super().__init__(seed=0, step=0)
        self._keys = torch.zeros((num_draws, batch), dtype=torch.int64, device=device)

    def fill(self, source: SampleGenerator) -> None:
        """Take the keys of the next draws of ``source``."""
        num_draws, batch = self._keys.shape
        if num_draws:
            keys = torch.stack([source.keys(batch) for _ in range(num_draws)])
            # From pinned memory the host need not wait for the device.
            keys = keys.pin_memory() if self._keys.is_cuda else keys
            self._keys.copy_(keys, non_blocking=True)

    def rewind(self) -> None:
        """Start again with the first draw."""
        self._draws = 0

    def _streams(self, batch: int, device: torch.device) -> Tensor:
        self._draws += 1
        return self._keys[self._draws - 1, :batch]


Generator = torch.Generator | SampleGenerator


def _unit_interval(bits: Tensor) -> Tensor:
    """Map 64 random bits to float32 in (0, 1), symmetric about 1/2: ``(top 23 bits + 1/2)/2^23``.

    With 23 bits the half is exact in float32, so neither end is ever produced.
    """
    return ((bits >> 41) & ((1 << 23) - 1)).float().add_(0.5).mul_(2.0**-23)


def fresh_generator(device: torch.device) -> torch.Generator:
    """A generator seeded by the operating system: attacks never touch the global generator."""
    generator = torch.Generator(device=device)
    generator.seed()
    return generator


def rand_like(x: Tensor, generator: Generator) -> Tensor:
    """Uniform in [0, 1), same shape and dtype as ``x`` ``(B, ...)``, independent per element."""
    if isinstance(generator, SampleGenerator):
        bits = generator.bits(len(x), x[:1].numel(), x.device)
        return _unit_interval(bits).view(x.shape).to(x.dtype)
    return torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def randn_like(x: Tensor, generator: Generator) -> Tensor:
    """Standard normal, same shape and dtype as ``x`` ``(B, ...)``, independent per element."""
    if isinstance(generator, SampleGenerator):
        # Box-Muller, with both uniforms strictly inside (0, 1).
        radius = rand_like(x, generator).log_().mul_(-2.0).sqrt_()
        return radius.mul_(rand_like(x, generator).mul_(2 * math.pi).cos_())
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
