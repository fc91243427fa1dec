"""Layouts that are computed hold against brute force, and against torch."""

from __future__ import annotations

import itertools
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from resilient_train.spec.layout import Box, uncovered
from resilient_train.spec.sharding import Cut, chunks_within, held_box, holders, is_covered, is_regular
from resilient_train.worker.tensors import cuts_of

MESHES = st.lists(st.integers(1, 3), min_size=1, max_size=3)
SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Cut, ...], int]:
    """(shape, cuts, world): some dimensions of a mesh cut a tensor, in any order."""
    mesh, shape = draw(MESHES), draw(SHAPES)
    cuts = []
    for i, parts in enumerate(mesh):
        dim = draw(st.integers(-1, len(shape) - 1))
        if dim >= 0:
            cuts.append(Cut(dim, parts, prod(mesh[i + 1 :])))
    return tuple(shape), tuple(draw(st.permutations(cuts))), prod(mesh)


def points(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, e) for o, e in zip(box.offset, box.end, strict=True))))


@given(layouts(), st.data())
def test_the_chunks_within_a_box_are_those_with_elements_in_it(
    layout: tuple[tuple[int, ...], tuple[Cut, ...], int], data: st.DataObject
) -> None:
    """The same as asking every rank for its box."""
    shape, cuts, world = layout
    offset = tuple(data.draw(st.integers(0, n)) for n in shape)
    box = Box(offset, tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))
    found = list(chunks_within(shape, cuts, box))
    assert len(found) == len(set(found))
    expected = {
        tuple(cut.chunk(rank) for cut in cuts)
        for rank in range(world)
        if points(held_box(shape, cuts, rank)) & points(box)
    }
    assert set(found) == expected


@given(layouts(), st.data())
def test_holders_are_the_ranks_with_these_chunks(
    layout: tuple[tuple[int, ...], tuple[Cut, ...], int], data: st.DataObject
) -> None:
    """Each of them once; a rank that holds them itself comes first."""
    _, cuts, world = layout
    assert is_regular(cuts, world)
    first = data.draw(st.integers(0, world - 1))
    chunks = [cut.chunk(data.draw(st.integers(0, world - 1))) for cut in cuts]
    found = list(holders(cuts, chunks, world, first))
    expected = {rank for rank in range(world) if [cut.chunk(rank) for cut in cuts] == chunks}
    assert len(found) == len(expected)
    assert set(found) == expected
    assert found[0] == first or first not in expected


@given(layouts(), st.data())
def test_ranks_cover_a_tensor_if_their_boxes_do(
    layout: tuple[tuple[int, ...], tuple[Cut, ...], int], data: st.DataObject
) -> None:
    """Never said of ranks whose boxes leave something out."""
    shape, cuts, world = layout
    ranks = data.draw(st.lists(st.integers(0, world - 1)))
    held = set().union(set(), *(points(held_box(shape, cuts, rank)) for rank in ranks))
    if is_covered(cuts, ranks):
        assert held == points(Box.whole(shape))


def test_ranks_that_take_turns_spread_evenly_over_the_holders() -> None:
    """Eight ranks that all need what four of eight hold begin with two each."""
    begins = [next(holders((Cut(0, 2, 4),), [1], 8, rank)) for rank in range(8)]
    assert sorted(begins) == [4, 4, 5, 5, 6, 6, 7, 7]


def test_irregular_meshes_are_known_for_what_they_are() -> None:
    """Two dimensions that share ranks' digits, and a world that is no multiple of the mesh."""
    assert not is_regular((Cut(0, 4, 1), Cut(1, 2, 2)), 8)
    assert not is_regular((Cut(0, 2, 3),), 8)
    assert is_regular((Cut(0, 2, 1),), 8)


@given(MESHES, st.data())
def test_boxes_are_those_of_torch(mesh: list[int], data: st.DataObject) -> None:
    """Of replicated, sharded and FSDP-over-TP tensors on meshes of up to three dimensions."""
    shape = tuple(216 * data.draw(st.integers(0, 1)) for _ in range(2))  # FSDP over TP wants even chunks.
    kinds = [data.draw(st.sampled_from(("replicate", 0, 1, "strided"))) for _ in mesh]
    placements: list[Placement] = []
    for i, kind in enumerate(kinds):
        later = prod(n for n, k in zip(mesh[i + 1 :], kinds[i + 1 :], strict=True) if k in (0, "strided"))
        if kind == "replicate":
            placements.append(Replicate())
        else:
            placements.append(_StridedShard(0, split_factor=later) if kind == "strided" else Shard(int(kind)))
    strides = [prod(mesh[i + 1 :]) for i in range(len(mesh))]
    cuts = cuts_of("t", placements, tuple(mesh), strides)
    for rank in range(prod(mesh)):
        at = [rank // stride % n for n, stride in zip(mesh, strides, strict=True)]
        box = held_box(shape, cuts, rank)
        local, offset = _compute_local_shape_and_global_offset(shape, tuple(mesh), at, placements)
        assert box.shape == tuple(local)
        assert box.offset == tuple(offset) or not box.size


@given(st.integers(0, 17), st.integers(1, 6))
def test_shards_are_torch_chunks(length: int, parts: int) -> None:
    """One mesh dimension: the same cut as torch.chunk, empty shards included."""
    chunks = list(torch.arange(length).chunk(parts)) if length else []
    for rank in range(parts):
        box = held_box((length,), (Cut(0, parts, 1),), rank)
        held = list(range(length))[box.slices_in(Box.whole((length,)))[0]]
        assert held == (chunks[rank].tolist() if rank < len(chunks) else [])


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3))
def test_two_mesh_dimensions_cover_a_tensor_once(rows: int, columns: int, outer: int, inner: int) -> None:
    """Sharding the same or different dimensions: all boxes together are the tensor, without overlap."""
    for dims in [(0, 1), (0, 0), (1, 0)]:
        cuts = (Cut(dims[0], outer, inner), Cut(dims[1], inner, 1))
        boxes = [held_box((rows, columns), cuts, rank) for rank in range(outer * inner)]
        assert uncovered(Box.whole((rows, columns)), boxes) == []
        assert sum(box.size for box in boxes) == rows * columns
