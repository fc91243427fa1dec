"""Which state is the last one, and who writes which of its images."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_train.plan.last import Kept, KeptParities, Last, last_state
from resilient_train.plan.parity import cut
from resilient_train.spec.parity import Parity
from resilient_train.spec.world import Key

PLACES = ("h:1", "h:2", "h:3")


def image(place: str, slot: int, step: int, rank: int, *, copied: bool = False) -> Kept:
    return Kept(place=place, slot=slot, key=Key(1, step), rank=rank, world=3, copied=copied)


def decide(images: list[Kept], parities: KeptParities, chosen: Iterable[Key] = ()) -> dict[str, Last]:
    """What each keeper decides."""
    return {place: last_state(images, parities, chosen, place) for place in PLACES}


def parity_of(step: int, ranks: Iterable[int]) -> tuple[Key, Parity]:
    """One with the images of these ranks, each of another node, whole: of a group of two it holds one."""
    return Key(1, step), Parity(pieces={f"n{rank}": cut([(rank, 8192)], 1)[0] for rank in ranks})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_all_keepers_that_see_the_same_write_every_image_of_one_state_once(data: st.DataObject) -> None:
    """Wherever its originals, copies and parities are; a state is taken if each image is there or can be made again."""
    images, parities = [], {place: list[tuple[Key, Parity]]() for place in PLACES}
    for slot in range(data.draw(st.integers(0, 14))):
        step, rank = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2))
        images.append(image(data.draw(st.sampled_from(PLACES)), slot, step, rank, copied=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(0, 4))):
        ranks = data.draw(st.sets(st.integers(0, 2), min_size=1, max_size=2))
        parities[data.draw(st.sampled_from(PLACES))].append(parity_of(data.draw(st.integers(1, 2)), ranks))
    decisions = decide(images, parities)
    (key,) = {last.key for last in decisions.values()}
    written = [rank for last in decisions.values() for rank in (*last.images, *last.rebuild)]
    assert sorted(written) == ([] if key is None else [0, 1, 2])
    whole = [step for step in (1, 2) if all_of(step, images, parities)]
    assert key == (Key(1, whole[-1]) if whole else None)
    by_slot = {one.slot: one for one in images}
    for place, last in decisions.items():
        for rank, slot in last.images.items():
            one = by_slot[slot]
            assert (one.place, one.rank, one.key) == (place, rank, key)
            originals = [other for other in images if (other.key, other.rank, other.copied) == (key, rank, False)]
            assert not one.copied or not originals, "a copy is written where the original is gone"


def all_of(step: int, images: list[Kept], parities: KeptParities) -> bool:
    """Whether each rank's image of a state is there, or in a parity the rest of which is there."""
    there = {one.rank for one in images if one.key.step == step}
    folded = [
        {part.rank for parts in parity.pieces.values() for part in parts}
        for held in parities.values()
        for key, parity in held
        if key.step == step
    ]
    return all(rank in there or any(rank in ranks and ranks - {rank} <= there for ranks in folded) for rank in range(3))


def test_what_another_keeper_has_begun_to_save_is_the_last_state() -> None:
    """It may hold what is not to be seen any more."""
    images = [image("h:1", 1, 5, 0), image("h:2", 1, 4, 1)]
    assert decide(images, {}, [Key(1, 5)])["h:1"] == Last(key=Key(1, 5), world=3, images={0: 1})
    assert decide([], {}, [Key(1, 5)])["h:1"] == Last(key=Key(1, 5), world=0, images={})
