"""Which rank holds which box of a tensor, computed instead of listed.

A mesh numbers its ranks row by row, so a rank's place along one mesh dimension is ``rank // stride % parts``, whatever
the other dimensions are.  A mesh dimension that cuts a tensor is therefore told by three numbers, and a tensor's layout
over any number of ranks by one such `Cut` for each mesh dimension that cuts it.  Mesh dimensions that do not cut it
replicate it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from resilient_train.spec.layout import Box


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """Rank ``r`` holds chunk ``r // stride % parts`` of ``parts`` along one dimension of the tensor."""

    dim: int
    """The tensor's dimension."""
    parts: int
    """Number of chunks: ``ceil(n / parts)`` elements each, the last ones shorter or empty (``torch.chunk``)."""
    stride: int
    """Distance of ranks that are neighbours along the mesh dimension."""

    def chunk(self, rank: int) -> int:
        """Number of the chunk that a rank holds."""
        return rank // self.stride % self.parts


Cuts = tuple[Cut, ...]
"""In the order in which they cut; each cuts what the ones before it left."""


def box_of(shape: Sequence[int], cuts: Cuts, chunks: Sequence[int]) -> Box:
    """The box that is left of a tensor of ``shape`` when every cut keeps one chunk, by their numbers."""
    offset, left = [0] * len(shape), list(shape)
    for cut, number in zip(cuts, chunks, strict=True):
        start, size = _chunk(left[cut.dim], cut.parts, number)
        offset[cut.dim] += start
        left[cut.dim] = size
    return Box(tuple(offset), tuple(left))


def held_box(shape: Sequence[int], cuts: Cuts, rank: int) -> Box:
    """The box that ``rank`` holds."""
    return box_of(shape, cuts, [cut.chunk(rank) for cut in cuts])


def _chunk(length: int, parts: int, number: int) -> tuple[int, int]:
    """(first index, length) of one chunk."""
    size = -(-length // parts)
    start = min(length, size * number)
    return start, min(length, start + size) - start


def chunks_within(shape: Sequence[int], cuts: Cuts, box: Box) -> Iterator[tuple[int, ...]]:
    """The chunks, one number for each cut, of which something lies within ``box``.

    Takes as long as there are such chunks, however many ranks there are.
    """
    by_dim = [
        list(_along(shape[dim], [cut.parts for cut in cuts if cut.dim == dim], begin, end))
        for dim, (begin, end) in enumerate(zip(box.offset, box.end, strict=True))
    ]
    if not box.size:
        return
    places = [(cut.dim, sum(other.dim == cut.dim for other in cuts[:i])) for i, cut in enumerate(cuts)]
    for numbers in itertools.product(*by_dim):
        yield tuple(numbers[dim][place] for dim, place in places)


def _along(length: int, parts: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, ...]]:
    """Numbers of the nested chunks of one dimension that have elements in ``begin`` to ``end``."""
    if not parts:
        yield ()
        return
    size = -(-length // parts[0])
    if not size:
        return
    for number in range(begin // size, -(-end // size)):
        start = number * size
        inside = min(size, length - start)
        for rest in _along(inside, parts[1:], max(0, begin - start), min(inside, end - start)):
            yield (number, *rest)


@dataclass(frozen=True, slots=True)
class _Free:
    """A mesh dimension along which ranks hold the same."""

    parts: int
    stride: int


def is_regular(cuts: Cuts, world: int) -> bool:
    """Whether the cuts are dimensions of a mesh of ``world`` ranks that are numbered row by row."""
    return _free(cuts, world) is not None


def _free(cuts: Cuts, world: int) -> list[_Free] | None:
    """The mesh dimensions that do not cut; None if the cuts are no dimensions of a mesh of ``world`` ranks."""
    free, stride = [], 1
    for cut in sorted(cuts, key=lambda cut: (cut.stride, cut.parts)):
        if cut.stride % stride:
            return None
        if cut.stride > stride:
            free.append(_Free(cut.stride // stride, stride))
        stride = cut.stride * cut.parts
    if world % stride:
        return None
    if world > stride:
        free.append(_Free(world // stride, stride))
    return free


def holders(cuts: Cuts, chunks: Sequence[int], world: int, first: int = 0) -> Iterator[int]:
    """All ranks that hold these chunks, beginning with the one whose place among them is most like that of ``first``.

    Ranks that begin with themselves spread evenly over the holders.

    Args:
        cuts: regular for ``world``.
        chunks: a number for each cut.
        world: number of ranks.
        first: any rank.
    """
    base = sum(cut.stride * number for cut, number in zip(cuts, chunks, strict=True))
    free = _free(cuts, world) or []
    turned = []
    for dim in free:
        mine = first // dim.stride % dim.parts
        turned.append([(mine + i) % dim.parts * dim.stride for i in range(dim.parts)])
    for places in itertools.product(*reversed(turned)):
        yield base + sum(places)


def is_covered(cuts: Cuts, ranks: Sequence[int]) -> bool:
    """Whether ``ranks`` together hold every chunk."""
    return len({tuple(cut.chunk(rank) for cut in cuts) for rank in ranks}) == prod(cut.parts for cut in cuts)
