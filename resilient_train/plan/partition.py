"""Who writes what: state that several ranks of a node hold alike is made durable once.

Where all ranks of the job hold alike, more can be said: `resilient_train.plan.division`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from resilient_train.spec.shard import Entry

PRIVATE = "rng/"
"""Prefix of entries that belong to one rank even if their names and boxes look alike."""


def assign(images: Mapping[int, Sequence[Entry]], own: Collection[str] = ()) -> dict[int, tuple[Entry, ...]]:
    """For every rank the entries that it is to persist, so that each distinct box is written exactly once.

    Largest first, each to the least loaded of its holders (ties to the lowest rank): a deterministic function, so all
    keepers that see the same images agree.

    Args:
        images: rank -> what its image holds.
        own: names under which every rank holds something of its own, which it persists itself.
    """
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...], int], list[tuple[int, Entry]]] = {}
    for rank in sorted(images):
        for entry in images[rank]:
            whose = rank if entry.name in own else -1
            holders.setdefault((entry.name, entry.offset, entry.shape, whose), []).append((rank, entry))
    load = dict.fromkeys(images, 0)
    chosen: dict[int, list[Entry]] = {rank: [] for rank in images}
    for _, candidates in sorted(holders.items(), key=lambda item: (-item[1][0][1].nbytes, item[0])):
        rank, entry = min(candidates, key=lambda pair: (load[pair[0]], pair[0]))
        load[rank] += entry.nbytes
        chosen[rank].append(entry)
    return {rank: tuple(entries) for rank, entries in chosen.items()}


def first_of(images: Mapping[int, Sequence[Entry]], own: Collection[str] = ()) -> dict[int, tuple[Entry, ...]]:
    """The same, with each rank writing all that no lower one has: the first rank's image then has all names.

    Args:
        images: see `assign`; of what little `resilient_train.plan.division` does not divide.
        own: see `assign`.
    """
    seen: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    chosen = {}
    for rank in sorted(images):
        places = {entry: (entry.name, entry.offset, entry.shape) for entry in images[rank]}
        chosen[rank] = tuple(entry for entry in images[rank] if entry.name in own or places[entry] not in seen)
        seen |= set(places.values())
    return chosen


def may_differ(document: Any, name: str) -> bool:
    """Whether ranks may hold values of their own under one name, by the document that goes with it.

    Parameters and optimizer state may not; buffers of modules (BatchNorm's statistics) may, and tensors of other
    objects.
    """
    part, _, path = name.partition("/")
    described = document.get(part, {}) if isinstance(document, dict) else {}
    return described.get("kind") == "stateful" or path in described.get("buffers", ())
