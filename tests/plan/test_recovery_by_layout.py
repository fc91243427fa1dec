"""Recovery by arithmetic alone, against brute force over every rank's box."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.errors import CheckpointDamaged, StateMismatch
from resilient_train.plan.recovery import (
    Copy,
    Found,
    Holders,
    Want,
    copies_by_entries,
    copies_by_layout,
    not_covered,
    prove,
    ranks_by_key,
)
from resilient_train.spec.layout import Box, uncovered
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cut, Cuts, held_box
from resilient_train.spec.world import Key

MESHES = st.lists(st.integers(1, 3), min_size=1, max_size=3)


def entry(name: str, shape: tuple[int, ...], cuts: Cuts, rank: int) -> Entry:
    box = held_box(shape, cuts, rank)
    return Entry(name=name, dtype="F32", shape=box.shape, global_shape=shape, offset=box.offset, cuts=cuts)


@st.composite
def cuts_over(draw: st.DrawFn, mesh: list[int], dims: int) -> Cuts:
    """Any placements on a mesh, the order of cutting included."""
    cuts = []
    for i, parts in enumerate(mesh):
        dim = draw(st.integers(-1, dims - 1))
        if dim >= 0:
            cuts.append(Cut(dim, parts, prod(mesh[i + 1 :])))
    return tuple(draw(st.permutations(cuts)))


@given(st.data())
def test_any_mesh_to_any_other_from_whoever_is_left(data: st.DataObject) -> None:
    """Every element is filled once, with the right value, out of an image that is left; or nobody has it.

    The same as by the headers of all images, wherever those are all there.
    """
    shape = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    values = np.arange(prod(shape)).reshape(shape)
    old, new = data.draw(MESHES), data.draw(MESHES)
    cuts, its = data.draw(cuts_over(old, len(shape))), data.draw(cuts_over(new, len(shape)))
    world = prod(old)
    ranks = data.draw(st.sets(st.integers(0, world - 1), min_size=1)) if data.draw(st.booleans()) else range(world)
    near = data.draw(st.permutations(sorted(ranks)))[: data.draw(st.integers(0, world))]
    held = Holders(world=world, ranks=ranks, near=near)
    entries = [entry("t", shape, cuts, min(ranks))]
    boxes = [held_box(shape, cuts, rank) for rank in ranks]
    holes = not_covered(entries, held)
    assert holes or not uncovered(Box.whole(shape), boxes)
    if holes:
        return
    for rank in range(prod(new)):
        box = held_box(shape, its, rank)
        want = Want(name="t", dtype="F32", global_shape=shape, box=box)
        copies = copies_by_layout([want], entries, held, rank)
        prove([want], copies)
        got = np.full(box.shape, -1)
        for copy in copies:
            assert copy.rank in ranks
            assert copy.entry == entry("t", shape, cuts, copy.rank)
            got[copy.box.slices_in(box)] = values[copy.entry.box.slices_in(Box.whole(shape))][
                copy.box.slices_in(copy.entry.box)
            ]
        assert (got == values[box.slices_in(Box.whole(shape))]).all()
        if len(ranks) == world:
            listed = copies_by_entries([want], {r: [entry("t", shape, cuts, r)] for r in range(world)})
            assert {c.box for c in listed} == {c.box for c in copies}


def test_the_near_is_read_before_the_far_and_the_load_is_shared() -> None:
    """Of eight replicas one's own node has two; who has none near begins each with another."""
    want = [Want(name="t", dtype="F32", global_shape=(8,), box=Box.whole((8,)))]
    entries = [entry("t", (8,), (), 0)]
    assert [c.rank for c in copies_by_layout(want, entries, Holders(world=8, ranks=range(8), near=(5, 4)), 0)] == [5]
    chosen = [copies_by_layout(want, entries, Holders(world=8, ranks=range(8)), rank)[0].rank for rank in range(8)]
    assert sorted(chosen) == list(range(8))


def test_what_differs_is_taken_from_one_rank_by_all() -> None:
    """Of buffers every rank takes those of the first that is left, unless it has its own."""
    want = [Want(name="t", dtype="F32", global_shape=(8,), box=Box.whole((8,)))]
    entries = [entry("t", (8,), (), 0)]
    held = Holders(world=4, ranks=(1, 2, 3), near=(3,))
    assert [copies_by_layout(want, entries, held, r, {"t"})[0].rank for r in range(3)] == [1, 1, 1]
    assert [copies_by_layout(want, entries, held, r, {"t"}, own=True)[0].rank for r in range(4)] == [1, 1, 2, 3]


def test_what_nobody_else_held_is_not_covered() -> None:
    """A tensor of an unknown layout is covered by nobody; generators belong to one rank and are no part of it."""
    entries = [entry("a", (4,), (Cut(0, 2, 1),), 0), replace(entry("b", (4,), (), 0), cuts=None)]
    entries.append(replace(entry("rng/0/torch", (9,), (), 0), cuts=None))
    assert not_covered(entries, Holders(world=2, ranks=(0, 1))) == ["b"]
    assert not_covered(entries, Holders(world=2, ranks=(0,))) == ["a", "b"]


def test_another_models_state_is_refused_by_name() -> None:
    """As where all headers are read."""
    want = Want(name="t", dtype="F32", global_shape=(5,), box=Box.whole((5,)))
    with pytest.raises(StateMismatch, match=r"t: shape \[5\] here, \[8\] there"):
        copies_by_layout([want], [entry("t", (8,), (), 0)], Holders(world=1, ranks=(0,)), 0)


def block(start: int, size: int, part: Box | None = None) -> Copy:
    held = Entry(name="t", dtype="F32", shape=(8,), global_shape=(8,), offset=(0,))
    if part is not None:
        held = replace(held, shape=part.shape, offset=part.offset)
    return Copy(name="t", rank=0, entry=held, box=Box((start,), (size,)))


@pytest.mark.parametrize(
    ("copies", "said"),
    [
        ([block(0, 4)], "has no source"),
        ([block(0, 4), block(3, 5)], "filled twice"),
        ([block(0, 9)], "where it is not"),
        ([block(0, 4), block(4, 4, Box((0,), (4,)))], "where it is not"),
        ([block(0, 8), replace(block(0, 8), name="other")], "nobody wants"),
    ],
)
def test_a_plan_that_is_wrong_is_not_carried_out(copies: list[Copy], said: str) -> None:
    """Holes, elements with two sources, and sources that do not hold what is copied are all found, and named."""
    want = Want(name="t", dtype="F32", global_shape=(8,), box=Box.whole((8,)))
    with pytest.raises(CheckpointDamaged, match=said):
        prove([want], copies)
    prove([want], [block(4, 4), block(0, 4)])


def test_a_state_is_told_with_the_ranks_that_are_left_of_it() -> None:
    """Newest first, of the job's past only."""
    found = [Found(key=Key(1, step), rank=rank, world=2) for step, rank in ((5, 0), (5, 1), (6, 1), (7, 0))]
    told = [(key.step, world, set(ranks)) for key, world, ranks in ranks_by_key(found, {1: 6})]
    assert told == [(6, 2, {1}), (5, 2, {0, 1})]
