"""Which rank reads which shards of a stream, and from which shard a micro-batch comes.

A stream has a fixed number of shards and a fixed number of units (micro-batches) in every step, whatever the world.
They are taken in turns: unit ``u`` of step ``s`` comes from shard ``(s * units + u) % shards``.  As one number divides
the other, shards and units fall into ``min(shards, units)`` *lanes* that never mix: shard and unit are in the lane
that their number names modulo the number of lanes.  Lanes are dealt to the ranks in blocks, as ``torch.chunk`` and
``DTensor`` cut a dimension, so a rank has whole lanes: no two ranks read one shard.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One forward and backward of one rank."""

    unit: int
    """Which unit of the step; -1 for a filler."""
    shard: int
    """Where it comes from; -1 for a filler."""
    weight: float
    """What the mean loss of the unit is multiplied with; 0 for a filler."""
    last: bool
    """Whether gradients are to be synchronised after it."""


def count_lanes(shards: int, units: int) -> int:
    """The number of lanes.

    Raises:
        ValueError: unless one of the numbers divides the other.
    """
    lanes = min(shards, units)
    if lanes < 1 or shards % lanes or units % lanes:
        raise ValueError(f"{shards} shards and {units} micro-batches a step: one number must divide the other")
    return lanes


def turns(step: int, *, shards: int, units: int, first: int, count: int, ranks: int) -> list[Turn]:
    """The turns of one rank in one step, equally many on every rank.

    With weights ``ranks / units``, a gradient that is summed over turns and *averaged* over ranks is the mean over all
    units of the step.

    Args:
        step: its number.
        shards: of the stream.
        units: of a step.
        first: the rank's first lane.
        count: how many lanes it has.
        ranks: number of ranks that have lanes of their own, if there are enough.
    """
    lanes = count_lanes(shards, units)
    most = -(-lanes // ranks)
    result = []
    for round_ in range(units // lanes):
        for place in range(most):
            last = round_ == units // lanes - 1 and place == most - 1
            if place >= count:
                result.append(Turn(unit=-1, shard=-1, weight=0.0, last=last))
                continue
            unit = round_ * lanes + first + place
            shard = (step * units + unit) % shards
            result.append(Turn(unit=unit, shard=shard, weight=ranks / units, last=last))
    return result
