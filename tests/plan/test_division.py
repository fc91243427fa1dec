"""Dividing what ranks hold alike: every byte has one writer, all write as much, and readers know who without asking."""

from __future__ import annotations

from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.errors import StateMismatch
from resilient_train.plan.division import columns_of, common_entries, copies_by_division
from resilient_train.plan.partition import first_of
from resilient_train.plan.recovery import Want, prove
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cut, Cuts, held_box

Shape = tuple[int, ...]
MESHES = st.lists(st.integers(1, 3), min_size=1, max_size=3)
SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple)
DOCUMENT = {"m": {"kind": "module", "buffers": ["mean"]}}


LEAST = 16


def entry(name: str, shape: Shape, cuts: Cuts | None, rank: int) -> Entry:
    box = Box.whole(shape) if cuts is None else held_box(shape, cuts, rank)
    return Entry(name=name, dtype="F32", shape=box.shape, global_shape=shape, offset=box.offset, cuts=cuts)


@st.composite
def states(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, Shape, Cuts]]]:
    """A mesh, and tensors that are placed on it in any way."""
    mesh = draw(MESHES)
    tensors = []
    for number in range(draw(st.integers(1, 5))):
        shape = draw(SHAPES)
        cuts = []
        for i, parts in enumerate(mesh):
            dim = draw(st.integers(-1, len(shape) - 1))
            if dim >= 0:
                cuts.append(Cut(dim, parts, prod(mesh[i + 1 :])))
        tensors.append((f"m/{number}", shape, tuple(cuts)))
    return mesh, tensors


@given(states(), st.data())
def test_every_element_is_written_once_and_found_again(
    state: tuple[list[int], list[tuple[str, Shape, Cuts]]], data: st.DataObject
) -> None:
    """By any number of ranks with any layout, out of the very parts that the writers have written."""
    mesh, tensors = state
    world = prod(mesh)
    held = {rank: [entry(*tensor, rank) for tensor in tensors] for rank in range(world)}
    written = {
        rank: [part for column in columns_of(held[rank], rank, world, LEAST) for part in column.parts(rank)]
        for rank in held
    }
    values = {name: np.arange(prod(shape)).reshape(shape) for name, shape, _ in tensors}
    filled = {name: np.zeros(shape, dtype=int) for name, shape, _ in tensors}
    for rank, parts in written.items():
        for part in parts:
            name, whole = part.entry.name, Box.whole(part.entry.global_shape)
            filled[name][part.entry.box.slices_in(whole)] += 1
            of = next(one for one in held[rank] if one.name == name)
            assert part.of == of
            bytes_ = values[name][of.box.slices_in(whole)].astype("<f4").tobytes()
            there = values[name][part.entry.box.slices_in(whole)].astype("<f4").tobytes()
            assert bytes_[part.begin : part.begin + part.entry.nbytes] == there
    assert all((counts == 1).all() for counts in filled.values())
    assert {name for parts in written.values() for name in (part.entry.name for part in parts)} == set(values)
    dim = data.draw(st.integers(0, 2))
    size = data.draw(st.integers(1, 4))
    common = held[data.draw(st.integers(0, world - 1))]
    for rank in range(size):
        cuts = {name: (Cut(dim, size, 1),) if dim < len(shape) else () for name, shape, _ in tensors}
        wants = [
            Want(name=name, dtype="F32", global_shape=shape, box=held_box(shape, cuts[name], rank))
            for name, shape, _ in tensors
        ]
        copies = copies_by_division(wants, common, world, LEAST, {0: held[0]})
        prove(wants, copies)
        assert all(copy.entry in [part.entry for part in written[copy.rank]] for copy in copies)


def test_replicas_write_equally_much() -> None:
    """Whatever the tensors' sizes: to a row of the largest."""
    tensors = [("m/a", (1000, 3), ()), ("m/b", (7,), ()), ("m/c", (), ()), ("m/d", (300, 10), ())]
    held = [entry(*tensor, 0) for tensor in tensors]
    loads = Counter[int]()
    for rank in range(8):
        (column,) = columns_of(held, rank, 8, LEAST)
        loads[rank] += sum(part.entry.nbytes for part in column.parts(rank))
    assert sum(loads.values()) == sum(one.nbytes for one in held)
    assert max(loads.values()) - min(loads.values()) <= 2 * 40


def test_a_thousand_ranks_open_64_images_at_most() -> None:
    """However much they hold alike, evenly spread over the ranks, and so over the nodes."""
    held = [entry("m/a", (10_000, 3), (), 0)]
    writers = [rank for rank in range(1024) if columns_of(held, rank, 1024, LEAST)[0].parts(rank)]
    assert writers == list(range(0, 1024, 16))


def test_little_is_not_scattered() -> None:
    """A thousand ranks do not write four bytes each."""
    held = [entry("m/steps", (1000,), (), 0)]
    assert [rank for rank in range(1000) if columns_of(held, rank, 1000, 1 << 20)[0].parts(rank)] == [0]


def test_elements_of_several_bytes_are_never_cut() -> None:
    """A scalar of a dtype that safetensors lacks is stored as the bytes of one element."""
    scalar = Entry(name="m/s", dtype="U8", shape=(64,), global_shape=(64,), offset=(0,), real_dtype="x", cuts=())
    parts = [part for rank in range(4) for part in columns_of([scalar], rank, 4, LEAST)[0].parts(rank)]
    assert [part.entry for part in parts] == [scalar]


def test_what_belongs_to_a_rank_or_may_differ_is_not_divided() -> None:
    """Random generators and buffers stay with whoever holds them; an unknown layout of anything else rules it out."""
    common = entry("m/0.weight", (4,), (), 0)
    others = [entry("rng/0/torch", (4,), None, 0), entry("m/mean", (4,), (), 0)]
    assert common_entries([common, *others], DOCUMENT, 2) == (common,)
    assert common_entries([common, entry("m/odd", (4,), None, 0)], DOCUMENT, 2) is None
    assert common_entries([entry("m/odd", (4,), (Cut(0, 3, 1),), 0)], DOCUMENT, 2) is None
    assert common_entries([entry("m/mean", (4,), (Cut(0, 1 << 60, 1),), 0)], DOCUMENT, 2) is None


def test_the_first_rank_has_all_names_of_the_rest() -> None:
    """So that one image tells what there is; what ranks hold for themselves each writes."""
    same, own = entry("m/mean", (4,), (), 0), entry("m/own", (4,), (), 0)
    shares = first_of({1: [same, own], 0: [same, own]}, {"m/own"})
    assert shares == {0: (same, own), 1: (own,)}


def test_a_rest_is_taken_from_ones_own_image_first() -> None:
    """Else from the first rank's; and what nobody wants is a mismatch."""
    mean = entry("m/mean", (4,), (), 0)
    want = Want(name="m/mean", dtype="F32", global_shape=(4,), box=Box.whole((4,)))
    assert [copy.rank for copy in copies_by_division([want], [], 4, LEAST, {0: [mean], 2: [mean]}, [2])] == [2]
    assert [copy.rank for copy in copies_by_division([want], [], 4, LEAST, {0: [mean], 2: []}, [2])] == [0]
    with pytest.raises(StateMismatch, match=r"m/0.weight \[4\]: in the checkpoint, not in this state"):
        copies_by_division([want], [entry("m/0.weight", (4,), (), 0)], 4, LEAST, {0: [mean]})
