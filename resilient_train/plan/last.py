"""Which state is the last one, and which of its images a keeper makes durable: all keepers decide alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from resilient_train.plan.parity import restorable
from resilient_train.plan.recovery import Found, ranks_by_key
from resilient_train.spec.parity import Parity
from resilient_train.spec.world import Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An image in some keeper's memory."""

    place: str
    """Which keeper's."""
    slot: int
    """That keeper's id of it."""
    key: Key
    """Which state it is a part of."""
    rank: int
    """Whose part."""
    world: int
    """Of how many."""
    copied: bool
    """Whether another keeper has, or had, the original."""


KeptParities = Mapping[str, Sequence[tuple[Key, Parity]]]
"""Place -> the parities there, each with its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Last:
    """The last state, as far as it concerns a keeper."""

    key: Key | None
    """Which; None if no state is complete anywhere."""
    world: int
    """Number of ranks that it is the state of."""
    images: Mapping[int, int]
    """rank -> slot, of the images that this keeper makes durable."""
    rebuild: tuple[int, ...] = ()
    """Ranks whose images are lost, and which this keeper makes again from parities to make them durable."""


def last_state(images: Sequence[Kept], parities: KeptParities, chosen: Iterable[Key], own: str) -> Last:
    """The newest state that is complete over all keepers, or that one has begun to make durable.

    Of its images the keeper at ``own`` writes its originals, copies whose originals are gone, and what it makes again.

    Args:
        images: all that there are.
        parities: all that there are.
        chosen: what other keepers have decided on already.
        own: the place of the keeper that asks.
    """
    keys = list(chosen)
    for key, world, ranks in ranks_by_key((Found(key=i.key, rank=i.rank, world=i.world) for i in images), {}):
        if ranks | _makers(parities, key, ranks).keys() >= set(range(world)):
            keys.append(key)
            break
    if not keys:
        return Last(key=None, world=0, images={})
    newest = max(keys)
    of_newest = [image for image in images if image.key == newest]
    holders: dict[int, list[tuple[bool, str, int]]] = {}
    for image in of_newest:
        holders.setdefault(image.rank, []).append((image.copied, image.place, image.slot))
    makers = _makers(parities, newest, holders)
    first = {rank: min(places) for rank, places in holders.items()}
    return Last(
        key=newest,
        world=of_newest[-1].world if of_newest else 0,
        images={rank: slot for rank, (_, where, slot) in first.items() if where == own},
        rebuild=tuple(sorted(rank for rank, where in makers.items() if where == own)),
    )


def _makers(parities: KeptParities, key: Key, there: Collection[int]) -> dict[int, str]:
    """Which lost images of a state can be made again, and by whom: the first keeper that has a parity of it."""
    of_key = {where: [parity for of, parity in held if of == key] for where, held in parities.items()}
    lost = restorable([parity for held in of_key.values() for parity in held], there)
    return {
        rank: min(
            where
            for where, held in of_key.items()
            if any(part.rank == rank for parity in held for parts in parity.pieces.values() for part in parts)
        )
        for rank in lost
    }
