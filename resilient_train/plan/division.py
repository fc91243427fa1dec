"""Who makes what durable where all ranks hold alike: every byte once per job, divided evenly, by arithmetic alone.

Theory of operation.  Ranks that hold the same chunk of one tensor hold the same chunks of all tensors that are laid out
like it.  One after the other, by name, these make a *column* of bytes, which all its ranks have.  It is cut into even
parts, between rows, and as many of its ranks write one each.  Nothing but the layout goes into that: a keeper needs no
other keeper to know its part, and a reader knows whose image holds what without opening it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

from resilient_train.plan.partition import PRIVATE, may_differ
from resilient_train.plan.recovery import Copy, Want, check_fit, copies_of
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cuts, box_of, chunks_within, holders, is_regular

LEAST = 1 << 20
"""Bytes of a part below which a column is cut into fewer; written into what is divided, so that it can be changed."""
MOST_WRITERS = 64
"""Parts that a column is cut into at most: whoever wants all of it opens an image for each.  Fixed, like the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a rank writes of one tensor."""

    entry: Entry
    """As it is written."""
    of: Entry
    """What the rank holds."""
    begin: int = 0
    """First byte of it that is written."""


def common_entries(entries: Sequence[Entry], document: Any, world: int) -> tuple[Entry, ...] | None:
    """What all ranks hold alike, of what one of them holds; None where it cannot be told who holds what.

    The rest is what belongs to one rank, or may differ between those that hold it.

    Args:
        entries: of one rank's image, of ranks that hold alike.
        document: that goes with it.
        world: number of ranks.
    """
    shared = [entry for entry in entries if not entry.name.startswith(PRIVATE)]
    if any(cuts is None or not is_regular(cuts, world) for cuts in {entry.cuts for entry in shared}):
        return None
    return tuple(entry for entry in shared if not may_differ(document, entry.name))


class Column:
    """What the holders of the same chunks hold of all tensors that are laid out alike."""

    def __init__(self, tensors: Sequence[Entry], cuts: Cuts, chunks: Sequence[int], world: int, least: int) -> None:
        """Args:
        tensors: the tensors of this layout, as any rank holds them.
        cuts: the layout, regular for ``world``.
        chunks: which chunks, one for each cut.
        world: number of ranks.
        least: `LEAST`, as it was when this was written.
        """
        self.cuts, self.chunks = cuts, tuple(chunks)
        self.ranks = tuple(holders(cuts, chunks, world))
        self._entries = [_held(e, cuts, chunks) for e in sorted(tensors, key=lambda e: e.name)]
        self._index = {entry.name: index for index, entry in enumerate(self._entries)}
        self._ends = list(accumulate(entry.nbytes for entry in self._entries))
        total = self._ends[-1] if self._ends else 0
        count = max(1, min(len(self.ranks), total // least, MOST_WRITERS))
        self._writers = [self.ranks[number * len(self.ranks) // count] for number in range(count)]
        # From which row of which tensor on each of them writes; what has no elements goes along with what is before it.
        inner = [self._place(total * number // count) for number in range(1, count)]
        self._begins = [(0, 0), *inner, (len(self._entries), 0)]

    @property
    def name(self) -> str:
        """The same for all that hold it, and another column's is another."""
        pairs = zip(self.cuts, self.chunks, strict=True)
        return ",".join(f"{cut.dim}.{cut.parts}.{cut.stride}={chunk}" for cut, chunk in pairs) or "whole"

    @property
    def names(self) -> list[str]:
        """The tensors, in their order."""
        return list(self._index)

    def _place(self, at: int) -> tuple[int, int]:
        """The row in which byte ``at`` stands: (index of its tensor, row)."""
        index = bisect_right(self._ends, at)
        entry = self._entries[index]
        return index, (at - self._ends[index] + entry.nbytes) * _rows(entry) // entry.nbytes

    def parts(self, rank: int) -> list[Part]:
        """What ``rank`` writes."""
        if rank not in self._writers:
            return []
        number = self._writers.index(rank)
        (first, _), (last, _) = self._begins[number], self._begins[number + 1]
        found = []
        for index in range(first, min(last + 1, len(self._entries))):
            begin, end = self._rows_of(number, index)
            if begin < end:
                entry = self._entries[index]
                at = begin * (entry.nbytes // _rows(entry))
                found.append(Part(entry=_rows_from(entry, begin, end), of=entry, begin=at))
        return found

    def within(self, name: str, box: Box) -> Iterator[tuple[int, Entry]]:
        """Who has written something of ``box``, which lies within what the ranks hold of a tensor: (rank, entry)."""
        index = self._index[name]
        entry = self._entries[index]
        if _rows(entry) > 1:
            first = box.offset[0] - entry.offset[0]
            wanted = (first, first + box.shape[0])
        else:
            wanted = (0, 1)
        number = bisect_right(self._begins, (index, wanted[0])) - 1
        while self._begins[number] < (index, wanted[1]):
            begin, end = self._rows_of(number, index)
            if begin < end:
                yield self._writers[number], _rows_from(entry, begin, end)
            number += 1

    def _rows_of(self, number: int, index: int) -> tuple[int, int]:
        """From which row up to which a writer writes a tensor."""
        (first, row), (last, end) = self._begins[number], self._begins[number + 1]
        return row if index == first else 0, end if index == last else _rows(self._entries[index])


def columns_of(common: Sequence[Entry], rank: int, world: int, least: int) -> list[Column]:
    """The columns that a rank holds; ``common`` is what it, or any other rank, holds alike with the others."""
    by_cuts = _by_cuts(common)
    return [Column(tensors, cuts, [cut.chunk(rank) for cut in cuts], world, least) for cuts, tensors in by_cuts.items()]


def copies_by_division(
    wants: Sequence[Want],
    common: Sequence[Entry],
    world: int,
    least: int,
    images: Mapping[int, Sequence[Entry]],
    prefer: Sequence[int] = (),
) -> list[Copy]:
    """What to copy so that every wanted box is filled exactly once, out of images that were divided.

    Takes as long as there are parts that this rank wants, and tensors in their columns, however many ranks there are.

    Args:
        wants: the boxes this rank needs.
        common: what all ranks held alike, as any of them held it.
        world: number of ranks that held it.
        least: `LEAST`, as it was when this was written.
        images: by rank, what some images hold, and of that what is not ``common`` counts: the first rank's, which has
            something of every name, and those that are preferred.
        prefer: the ranks whose images to use for what is not ``common``, best first, where they have it.

    Raises:
        StateMismatch: if tensors are missing, surplus, or have another shape or dtype; every one is named.
        CheckpointDamaged: if something is not covered.
    """
    named = {entry.name: entry for entry in common}
    others: dict[str, list[tuple[int, Entry]]] = {}
    for rank in (*prefer, *(rank for rank in sorted(images) if rank not in prefer)):
        for entry in images[rank]:
            if entry.name not in named:
                others.setdefault(entry.name, []).append((rank, entry))
    held = {name: [entry] for name, entry in named.items()}
    held |= {name: [entry for _, entry in places] for name, places in others.items()}
    check_fit(wants, held, set(held))
    by_cuts, columns = _by_cuts(common), dict[tuple[Cuts, tuple[int, ...]], Column]()
    # A model's layers repeat each other: what is wanted of tensors of one shape is planned once.
    planned: dict[tuple[tuple[int, ...], Cuts, Box], list[_Chunk]] = {}
    copies: list[Copy] = []
    for want in wants:
        if want.name not in named:
            copies += copies_of(want, _places(want, others[want.name], world))
            continue
        entry = named[want.name]
        cuts = entry.cuts or ()
        place = entry.global_shape, cuts, want.box
        if place not in planned:
            planned[place] = [*_chunks(*place, world)]
        for chunks, box, wanted, alone in planned[place]:
            if alone is not None:
                whole = replace(entry, offset=box.offset, shape=box.shape)
                copies.append(Copy(name=want.name, rank=alone, entry=whole, box=wanted))
                continue
            if (cuts, chunks) not in columns:
                columns[cuts, chunks] = Column(by_cuts[cuts], cuts, chunks, world, least)
            for rank, part in columns[cuts, chunks].within(want.name, wanted):
                shared = part.box.intersect(want.box)
                if shared is not None:
                    copies.append(Copy(name=want.name, rank=rank, entry=part, box=shared))
    return copies


_Chunk = tuple[tuple[int, ...], Box, Box, int | None]
"""A chunk's numbers, its box, what is wanted of it, and the rank that holds it if there is only one."""


def _chunks(shape: Sequence[int], cuts: Cuts, wanted: Box, world: int) -> Iterator[_Chunk]:
    """The chunks of which something is wanted."""
    single = prod(cut.parts for cut in cuts) == world
    for chunks in chunks_within(shape, cuts, wanted):
        box = box_of(shape, cuts, chunks)
        common = box.intersect(wanted)
        if common is not None:
            yield chunks, box, common, next(holders(cuts, chunks, world)) if single else None


def _places(want: Want, known: Sequence[tuple[int, Entry]], world: int) -> Iterator[tuple[int, Entry]]:
    """Who has something of a tensor that is not divided: those that are known, then the lowest holder of each chunk,
    who has written it."""
    yield from known
    _, first = known[0]
    for chunks in chunks_within(first.global_shape, first.cuts or (), want.box):
        yield next(holders(first.cuts or (), chunks, world)), _held(first, first.cuts or (), chunks)


def _by_cuts(entries: Sequence[Entry]) -> dict[Cuts, list[Entry]]:
    found: dict[Cuts, list[Entry]] = {}
    for entry in entries:
        assert entry.cuts is not None
        found.setdefault(entry.cuts, []).append(entry)
    return found


def _held(entry: Entry, cuts: Cuts, chunks: Sequence[int]) -> Entry:
    box = box_of(entry.global_shape, cuts, chunks)
    return replace(entry, offset=box.offset, shape=box.shape)


def _rows(entry: Entry) -> int:
    """Number of rows between which a tensor may be cut; an element of several bytes is never cut."""
    whole = not entry.nbytes or not entry.shape or (entry.real_dtype and len(entry.shape) == 1)
    return 1 if whole else entry.shape[0]


def _rows_from(entry: Entry, begin: int, end: int) -> Entry:
    if end - begin == _rows(entry):
        return entry
    offset, shape = (entry.offset[0] + begin, *entry.offset[1:]), (end - begin, *entry.shape[1:])
    return replace(entry, offset=offset, shape=shape, cuts=None)
