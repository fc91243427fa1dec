"""By which way bytes go from node to node in a restore: keepers' connections, or the ranks' process group.

Theory of operation.  Which way is faster depends on links, backends and hosts, and is known only where it was tried.
So of a restore that is large enough a little is brought one way, as much the other way, each way by all ranks at once;
the rest goes the faster way.  What a rank gets from another is one flow of runs (`resilient_train.image.fetch.Run`),
and what of it is tried is a function of how many there are, so that both ends know it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

LEAST = 128 << 20
"""Bytes for one rank from which on something is tried: less is there in the time that it takes to find out."""
MOST_TRIED = 4
"""Runs, of at most 8 MiB, of a flow that are tried each way."""
MOST_FLOWS = 8
"""Flows from, and flows to, one rank at a time: what is on its way of each takes memory, also of devices."""
_PART = 8
"""At most one of so many runs is tried each way."""


class Stages(NamedTuple):
    """How many runs of a flow go which way, one behind the other."""

    keepers: int
    """To see how fast keepers are."""
    opening: int
    """By the process group, which may have to connect its ranks first; not counted."""
    group: int
    """To see how fast the process group is."""


def stages(runs: int) -> Stages:
    """How a flow of so many runs is tried; what is left goes the faster way."""
    tried = min(MOST_TRIED, runs // _PART)
    return Stages(tried, min(1, tried), tried)


class Sample(NamedTuple):
    """What a rank has tried."""

    size: int
    """Bytes that it got."""
    seconds: float
    """How long that took."""


def rate(samples: Sequence[Sample]) -> float:
    """Bytes per second of all ranks together, which are done when the last one is; 0 if nothing was tried."""
    slowest = max((sample.seconds for sample in samples), default=0.0)
    return sum(sample.size for sample in samples) / slowest if slowest > 0 else 0.0


def servers(wanted: Sequence[int], near: Sequence[Sequence[int]], rank: int) -> dict[int, int]:
    """Which rank hands over each image.

    Args:
        wanted: images that are not on this node.
        near: by rank, the images on its node.
        rank: who wants them; ranks begin elsewhere, so that those of one node share what is asked of it.

    Returns:
        By image; those that no rank has near are missing.
    """
    holders: dict[int, list[int]] = {image: [] for image in wanted}
    for holder, images in enumerate(near):
        for image in images:
            if image in holders:
                holders[image].append(holder)
    return {image: of[(rank + image) % len(of)] for image, of in holders.items() if of}


class Flow(NamedTuple):
    """What one rank gets from another."""

    server: int
    """Who hands it over."""
    receiver: int
    """Who gets it."""
    runs: int
    """How many runs it has."""


def turns(flows: Iterable[Flow]) -> dict[Flow, int]:
    """When each flow has its turn: of those with the same, no rank has more than `MOST_FLOWS` to send or to receive."""
    sending: Counter[tuple[int, int]] = Counter()
    receiving: Counter[tuple[int, int]] = Counter()
    earliest: Counter[tuple[str, int]] = Counter()
    found = {}
    for flow in sorted(flows):
        turn = max(earliest["from", flow.server], earliest["to", flow.receiver])
        while sending[flow.server, turn] >= MOST_FLOWS or receiving[flow.receiver, turn] >= MOST_FLOWS:
            turn += 1
        sending[flow.server, turn] += 1
        receiving[flow.receiver, turn] += 1
        while sending[flow.server, earliest["from", flow.server]] >= MOST_FLOWS:
            earliest["from", flow.server] += 1
        while receiving[flow.receiver, earliest["to", flow.receiver]] >= MOST_FLOWS:
            earliest["to", flow.receiver] += 1
        found[flow] = turn
    return found


def first_rounds(lengths: Iterable[tuple[int, int]]) -> list[int]:
    """The round that each turn begins with: a round takes one run of every flow, and a turn as many as its longest.

    Args:
        lengths: (turn, number of runs) of every flow.
    """
    longest: Counter[int] = Counter()
    for turn, runs in lengths:
        longest[turn] = max(longest[turn], runs)
    return [*accumulate((longest[turn] for turn in range(max(longest, default=-1))), initial=0)]
