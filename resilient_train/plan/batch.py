"""Which rank computes which samples of a global batch.

The global batch of a step is cut into units of ``micro_batch`` samples.  Every rank makes the same number of passes
``K = ceil(units / ranks)``; in pass k, rank r computes unit ``k * ranks + r``, or a filler of weight 0 where there is
no such unit.  Which samples form a unit depends on seed and step only, so a change of the world moves work between
ranks and changes nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers (the finaliser of splitmix64, chained)."""
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + (value & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(position: int, length: int, key: int) -> int:
    """The ``position``-th element of a pseudo-random permutation of ``range(length)`` chosen by ``key``.

    A four-round Feistel network on the next even number of bits; results beyond ``length`` are permuted again
    (cycle walking), so that nothing of the size of the data set is ever stored.
    """
    if not 0 <= position < length:
        raise ValueError(f"position {position} is outside of range({length})")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for round_key in range(4):
            left, right = right, left ^ (mix(key, round_key, right) & mask)
        position = left << half | right
        if position < length:
            return position


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward and backward of one rank."""

    unit: int
    """Which unit of the global batch; -1 for a filler."""
    begin: int
    """First sample of the unit within the global batch."""
    count: int
    """Number of samples."""
    weight: float
    """What the mean loss of these samples is multiplied with; 0 for a filler."""
    last: bool
    """Whether gradients are to be synchronised after this pass."""


def passes(global_batch: int, micro_batch: int, rank: int, ranks: int) -> list[Pass]:
    """The passes of one data rank for one step, equally many on every rank.

    With weights ``ranks * n / global_batch``, a gradient that is summed over passes and *averaged* over ranks is the
    mean over the global batch.
    """
    units = -(-global_batch // micro_batch)
    count = -(-units // ranks)
    result = []
    for k in range(count):
        unit = k * ranks + rank
        last = k == count - 1
        if unit >= units:
            # As large as a unit: the other ranks compute as long anyway, and some layers refuse single samples.
            result.append(Pass(unit=-1, begin=0, count=min(micro_batch, global_batch), weight=0.0, last=last))
            continue
        begin = unit * micro_batch
        n = min(micro_batch, global_batch - begin)
        result.append(Pass(unit=unit, begin=begin, count=n, weight=ranks * n / global_batch, last=last))
    return result


def sample(step: int, within: int, *, length: int, global_batch: int, seed: int, shuffle: bool) -> int:
    """The data set's index of sample ``within`` of global batch ``step``, counted over concatenated epochs."""
    position = step * global_batch + within
    epoch, place = divmod(position, length)
    return permute(place, length, mix(seed, epoch)) if shuffle else place
