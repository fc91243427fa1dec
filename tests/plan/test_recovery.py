"""Recovery against brute force: what is planned fills every element once, from somebody who has it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from resilient_train.errors import StateMismatch
from resilient_train.plan.interval import due, parse_interval
from resilient_train.plan.partition import assign
from resilient_train.plan.recovery import Found, Want, complete_keys, copies_by_entries, missing
from resilient_train.plan.retention import superseded
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cut, held_box
from resilient_train.spec.world import Key


def entry(name: str, shape: tuple[int, ...], box: Box, dtype: str = "F32") -> Entry:
    return Entry(name=name, dtype=dtype, shape=box.shape, global_shape=shape, offset=box.offset)


def shards(name: str, shape: tuple[int, ...], ranks: int, dim: int) -> list[Entry]:
    return [entry(name, shape, held_box(shape, (Cut(dim, ranks, 1),), r)) for r in range(ranks)]


def test_any_layout_to_any_other() -> None:
    """Random sharded and replicated tensors, random old and new world sizes: the copied values are the right ones."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(150):
        shape = tuple(chance.randint(0, 7) for _ in range(chance.randint(1, 3)))
        values = np.arange(int(np.prod(shape))).reshape(shape)
        old, new = chance.randint(1, 5), chance.randint(1, 5)
        images = [[e] for e in shards("t", shape, old, chance.randrange(len(shape)))]
        if chance.random() < 0.3:
            images = [[entry("t", shape, Box.whole(shape))] for _ in range(old)]
        assert missing(images) == []
        for target in shards("t", shape, new, chance.randrange(len(shape))):
            got = np.full(target.shape, -1)
            want = Want(name="t", dtype="F32", global_shape=shape, box=target.box)
            for copy in copies_by_entries([want], dict(enumerate(images)), prefer=chance.randrange(old)):
                held = values[copy.entry.box.slices_in(Box.whole(shape))]
                place = copy.box.slices_in(target.box)
                assert (got[place] == -1).all(), "an element was filled twice"
                got[place] = held[copy.box.slices_in(copy.entry.box)]
            assert (got == values[target.box.slices_in(Box.whole(shape))]).all()


def test_own_image_is_preferred() -> None:
    """Nothing is fetched from others that the preferred image has."""
    images = [[entry("t", (4,), Box.whole((4,)))] for _ in range(3)]
    want = Want(name="t", dtype="F32", global_shape=(4,), box=Box.whole((4,)))
    assert [copy.rank for copy in copies_by_entries([want], dict(enumerate(images)), prefer=2)] == [2]


def test_another_models_checkpoint_names_what_differs() -> None:
    """Missing, surplus, reshaped and retyped tensors are all named; generators' states are nobody's business."""
    images = [
        [
            entry("a", (4,), Box.whole((4,))),
            entry("b", (4,), Box.whole((4,)), "F16"),
            entry("extra", (2,), Box.whole((2,))),
            entry("rng/0/torch", (9,), Box.whole((9,)), "U8"),
        ]
    ]
    wants = [
        Want(name="a", dtype="F32", global_shape=(5,), box=Box.whole((5,))),
        Want(name="b", dtype="F32", global_shape=(4,), box=Box.whole((4,))),
        Want(name="new", dtype="F32", global_shape=(4,), box=Box.whole((4,))),
    ]
    with pytest.raises(StateMismatch) as caught:
        copies_by_entries(wants, dict(enumerate(images)))
    text = str(caught.value)
    assert "4 tensors differ" in text
    for name in ("a: shape [5] here, [4] there", "b: dtype F32 here, F16 there", "new", "extra"):
        assert name in text
    assert "rng" not in text


def test_images_that_disagree_are_refused() -> None:
    """Every rank's part must have the dtype and the shape, not only the first that is found."""
    first, second = Box((0,), (2,)), Box((2,), (2,))
    want = Want(name="t", dtype="F32", global_shape=(4,), box=Box.whole((4,)))
    for other in (entry("t", (4,), second, "I32"), entry("t", (5,), second)):
        with pytest.raises(StateMismatch, match="t: "):
            copies_by_entries([want], {0: [entry("t", (4,), first)], 1: [other]})


def test_only_complete_states_of_the_past_are_candidates() -> None:
    """A key counts when every rank's image is there and the job's history contains it."""
    found = [
        Found(key=key, rank=rank, world=world)
        for key, world, ranks in [
            (Key(1, 5), 2, (0, 1)),
            (Key(1, 6), 2, (0,)),
            (Key(2, 5), 3, (0, 1, 2)),
            (Key(3, 1), 1, (0,)),
        ]
        for rank in ranks
    ]
    assert complete_keys(found, {}) == [Key(3, 1), Key(2, 5), Key(1, 5)]
    assert complete_keys(found, {2: None, 1: 5}) == [Key(2, 5), Key(1, 5)]
    assert complete_keys(found, {2: 4, 1: 5}) == [Key(1, 5)]


def test_holes_are_named() -> None:
    """A tensor of which a shard is missing is not covered."""
    images = [[e] for e in shards("t", (6,), 3, 0)]
    assert missing(images[:2]) == ["t"]


def test_replicated_state_is_written_once_and_evenly() -> None:
    """Every box has exactly one writer; four replicas share the load."""
    entries = [entry(f"t{i}", (100 + i,), Box.whole((100 + i,))) for i in range(40)]
    shares = assign({rank: [*entries, entry(f"rng/{rank}/torch", (5,), Box.whole((5,)), "U8")] for rank in range(4)})
    names = [e.name for share in shares.values() for e in share if not e.name.startswith("rng/")]
    assert sorted(names) == sorted(e.name for e in entries)
    assert all(any(e.name == f"rng/{rank}/torch" for e in share) for rank, share in shares.items())
    loads = [sum(e.nbytes for e in share) for share in shares.values()]
    assert max(loads) - min(loads) <= 4 * 140


def test_retention_never_removes_the_last_good_one() -> None:
    """The newest stay; unfinished ones go only when they are older than a committed one."""
    keys = [Key(1, step) for step in range(5)]
    assert superseded(keys, [], 3, {}) == keys[:2]
    assert superseded(keys[:1], [Key(1, 0), Key(2, 9)], 1, {}) == []
    assert superseded([Key(2, 5)], [Key(1, 9), Key(2, 6)], 1, {}) == [Key(1, 9)]
    for n in range(6):
        assert len(superseded(keys[:n], [], 1, {})) == max(0, n - 1)


def test_a_checkpoint_that_the_job_went_back_behind_takes_nobodys_place() -> None:
    """It was damaged; it goes when what is kept is newer, and those of jobs before count."""
    old, sound, damaged, new = Key(1, 50), Key(2, 150), Key(2, 200), Key(3, 210)
    past = {2: 150, 3: None}
    assert superseded([old, sound, damaged, new], [], 3, past) == []
    assert superseded([old, sound, damaged, new], [], 2, past) == [old]
    assert superseded([old, sound, damaged, new], [], 1, past) == [old, sound, damaged]
    assert superseded([damaged], [], 1, past) == []


def test_intervals() -> None:
    """Steps, seconds and auto; auto backs off where writing takes long."""
    assert parse_interval(50) == (50, 0.0)
    assert parse_interval("300s") == (0, 300.0)
    assert parse_interval("auto") == (0, -1.0)
    for bad in (0, -3, "fast", "xs", "-1s", True, 1.5):
        with pytest.raises(ValueError, match="persist_every"):
            parse_interval(bad)
    assert due(auto=False, seconds=10, since_last=10, last_duration=99)
    assert not due(auto=True, seconds=0, since_last=29, last_duration=0.1)
    assert due(auto=True, seconds=0, since_last=30, last_duration=0.1)
    assert not due(auto=True, seconds=0, since_last=99, last_duration=10)
