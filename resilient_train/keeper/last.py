"""Which state is the last one, and which of its images a keeper makes durable: all keepers decide alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from resilient_train.keeper.shelf import Shelf, source_of
from resilient_train.keeper.survey import Finding
from resilient_train.plan.parity import restorable
from resilient_train.plan.recovery import Found, ranks_by_key
from resilient_train.spec.world import Key
from resilient_train.storage.peer import HeldParity


@dataclass(frozen=True, slots=True, kw_only=True)
class Last:
    """The last state, as far as it concerns this node."""

    key: Key | None
    """Which; None if no state is complete anywhere."""
    world: int
    """Number of ranks that it is the state of."""
    images: Mapping[int, int]
    """rank -> slot, of the images that this node makes durable."""
    rebuild: tuple[int, ...] = ()
    """Ranks whose images are lost, and which this node makes again from parities to make them durable."""


def last_state(shelf: Shelf, finding: Finding, own: str) -> Last:
    """The newest state that is complete over all nodes, or that another node has begun to make durable, and which of
    its images the keeper at ``own`` writes: its originals, copies whose originals are gone, and what it makes again."""
    mine = [(own, i.slot, i.stamp.key, i.stamp.rank, i.stamp.world, bool(source_of(i.owner))) for i in shelf.images()]
    theirs = [
        (endpoint, image.slot, image.key, image.rank, image.world, image.replica)
        for endpoint, images in finding.images.items()
        for image in images
    ]
    images = mine + theirs
    parities = {**finding.parities, own: shelf.parities()}
    found = (Found(key=key, rank=rank, world=world) for _, _, key, rank, world, _ in images)
    keys = [key for key in finding.chosen.values() if key is not None and key.lineage]
    for key, world, ranks in ranks_by_key(found, {}):
        if ranks | _makers(parities, key, ranks).keys() >= set(range(world)):
            keys.append(key)
            break
    if not keys:
        return Last(key=None, world=0, images={})
    newest, world = max(keys), 0
    holders: dict[int, list[tuple[bool, str, int]]] = {}
    for endpoint, slot, key, rank, size, replica in images:
        if key == newest:
            holders.setdefault(rank, []).append((replica, endpoint, slot))
            world = size
    makers = _makers(parities, newest, holders)
    first = {rank: min(places) for rank, places in holders.items()}
    return Last(
        key=newest,
        world=world,
        images={rank: slot for rank, (_, where, slot) in first.items() if where == own},
        rebuild=tuple(sorted(rank for rank, where in makers.items() if where == own)),
    )


def _makers(parities: Mapping[str, list[HeldParity]], key: Key, there: Collection[int]) -> dict[int, str]:
    """Which lost images of a state can be made again, and by whom: the first keeper that has a parity of it."""
    of_key = {where: [one.parity for one in held if one.key == key] for where, held in parities.items()}
    lost = restorable([parity for held in of_key.values() for parity in held], there)
    return {
        rank: min(
            where
            for where, held in of_key.items()
            if any(part.rank == rank for parity in held for parts in parity.pieces.values() for part in parts)
        )
        for rank in lost
    }
