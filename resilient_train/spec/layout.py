"""Boxes: which part of a tensor somebody holds, and whether parts cover the whole.

A box is an axis-aligned block of a tensor's index space.  All questions about sharded state (who has what, what is
missing, what to copy from where) are questions about boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """The block ``offset[d] <= index[d] < offset[d] + shape[d]``; () is the single element of a scalar."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar's box, 0 for an empty shard."""
        return prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """First index behind the box in each dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of a complete tensor."""
        return cls((0,) * len(shape), tuple(shape))

    def intersect(self, other: Box) -> Box | None:
        """The common block, or None if there is none (boxes without elements have none)."""
        offset = tuple(map(max, self.offset, other.offset))
        shape = tuple(min(a, b) - o for a, b, o in zip(self.end, other.end, offset, strict=True))
        return Box(offset, shape) if all(n > 0 for n in shape) else None

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """This box as slices of a tensor that holds ``outer``."""
        starts = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))

    def span_in(self, outer: Box) -> tuple[int, int]:
        """(first element, number of elements up to the last) of this box among the elements of ``outer``, row-major.

        They are this box's elements alone if there are `size` of them.
        """
        first = last = 0
        for begin, end, start, n in zip(self.offset, self.end, outer.offset, outer.shape, strict=True):
            first = first * n + begin - start
            last = last * n + end - 1 - start
        return first, last - first + 1

    def rows_in(self, outer: Box) -> tuple[int, int]:
        """(elements in a row, elements from one row to the next) of this box among the elements of ``outer``.

        Rows at even distances, from the first element of `span_in` on, that hold all of this box.  They hold nothing
        else unless it is narrower than ``outer`` in two dimensions behind the first one in which it has several.
        """
        several = next((d for d, n in enumerate(self.shape) if n > 1), len(self.shape))
        narrow = (
            d for d, (n, most) in enumerate(zip(self.shape, outer.shape, strict=True)) if d > several and n < most
        )
        inner = next(narrow, None)
        if inner is None:
            return self.size, self.size
        row = Box(self.offset[inner:], self.shape[inner:]).span_in(Box(outer.offset[inner:], outer.shape[inner:]))[1]
        return row, prod(outer.shape[inner:])

    def minus(self, other: Box) -> list[Box]:
        """What is left of this box without ``other``, as disjoint boxes."""
        common = self.intersect(other)
        if common is None:
            return [self] if self.size else []
        left: list[Box] = []
        offset, shape = list(self.offset), list(self.shape)
        for d in range(len(shape)):
            before = common.offset[d] - offset[d]
            after = offset[d] + shape[d] - common.end[d]
            if before:
                left.append(Box(tuple(offset), (*shape[:d], before, *shape[d + 1 :])))
            if after:
                start = (*offset[:d], common.end[d], *offset[d + 1 :])
                left.append(Box(start, (*shape[:d], after, *shape[d + 1 :])))
            offset[d], shape[d] = common.offset[d], common.shape[d]
        return left


def uncovered(target: Box, parts: Iterable[Box]) -> list[Box]:
    """The parts of ``target`` that no box of ``parts`` holds, as disjoint boxes."""
    left = [target] if target.size else []
    for part in parts:
        left = [piece for box in left for piece in box.minus(part)]
        if not left:
            break
    return left
