"""Boxes: intersection, difference and coverage against brute force; shards against torch."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from resilient_train.spec.layout import Box, uncovered

BOXES = st.builds(
    lambda pairs: Box(tuple(o for o, _ in pairs), tuple(n for _, n in pairs)),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=2),
)


def points(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, e) for o, e in zip(box.offset, box.end, strict=True))))


@given(BOXES, BOXES)
def test_intersection_holds_exactly_the_common_points(a: Box, b: Box) -> None:
    """Intersection is that of the point sets."""
    common = a.intersect(b)
    assert (points(common) if common else set()) == points(a) & points(b)


@given(BOXES, BOXES)
def test_difference_is_disjoint_and_exact(a: Box, b: Box) -> None:
    """a without b: every point once, none of b."""
    pieces = a.minus(b)
    assert sum(piece.size for piece in pieces) == len(points(a) - points(b))
    assert set().union(*map(points, pieces)) == points(a) - points(b) if pieces else points(a) <= points(b)


@given(BOXES, st.lists(BOXES, max_size=4))
def test_uncovered_is_what_nobody_holds(target: Box, parts: list[Box]) -> None:
    """Coverage agrees with the point sets."""
    left = set().union(set(), *map(points, uncovered(target, parts)))
    assert left == points(target) - set().union(set(), *map(points, parts))


@given(st.data())
def test_rows_hold_a_box(data: st.DataObject) -> None:
    """All of it, in order, and nothing else unless it is cut in two dimensions behind the first that it has several of;
    no two rows overlap."""
    outer = Box.whole(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    begins = [data.draw(st.integers(0, n - 1)) for n in outer.shape]
    box = Box(tuple(begins), tuple(data.draw(st.integers(1, n - b)) for b, n in zip(begins, outer.shape, strict=True)))
    first, count = box.span_in(outer)
    row, stride = box.rows_in(outer)
    assert 0 < row <= stride
    every = list(itertools.product(*map(range, outer.shape)))
    mine = {every.index(point) for point in points(box)}
    held = {at for at in range(first, first + count) if (at - first) % stride < row}
    assert mine <= held
    several = next((d for d, n in enumerate(box.shape) if n > 1), len(box.shape))
    if sum(n < m for n, m in zip(box.shape[several + 1 :], outer.shape[several + 1 :], strict=True)) < 2:
        assert mine == held


def test_a_scalar_is_one_element() -> None:
    """The box of a scalar has one element and covers itself."""
    scalar = Box.whole(())
    assert scalar.size == 1
    assert uncovered(scalar, [scalar]) == []
    assert uncovered(scalar, []) == [scalar]
