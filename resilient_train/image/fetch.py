"""Which blocks of an image to read for the bytes that are wanted, in pieces that can be read side by side."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from resilient_train.spec.peers import MOST_ROWS
from resilient_train.spec.shard import BLOCK, ImageLayout

RUN = 8
"""Blocks that are read at once: enough to keep a disk or a server busy, few enough to stay in the caches."""
ALONG = 1
"""Blocks that nobody wants but that are read along, because another request would cost more."""
REQUEST = 32
"""What it costs to ask for rows, in bytes: about what they are in a message."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes of an image and where they are wanted."""

    at: int
    """First byte, from the beginning of the image."""
    size: int
    """How many."""
    address: int
    """Where they belong."""
    row: int = 0
    """Only so many at the beginning of every ``stride`` bytes are really wanted; 0: all.  The others may be brought
    along, or what stands at their addresses left alone."""
    stride: int = 0
    """See ``row``."""
    spread: int = 0
    """Bytes from where one row belongs to where the next does, and nothing between them is touched; 0: as many as
    ``stride``, and what is between them does not matter."""

    @property
    def wanted(self) -> int:
        """Bytes that are really wanted."""
        if not self.row:
            return self.size
        count, rest = divmod(self.size, self.stride)
        return count * self.row + min(rest, self.row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """``count`` times ``size`` bytes, one every ``stride`` bytes."""

    at: int
    """First byte, from the beginning of the run."""
    size: int
    """Bytes of each."""
    stride: int
    """Bytes from the beginning of one to that of the next."""
    count: int
    """How many."""
    address: int
    """Where the first belongs."""
    spread: int
    """Bytes from there to where the next one belongs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive blocks, to be read at once."""

    first: int
    """Number of the first block."""
    last: int
    """Number of the last one."""
    size: int
    """Bytes of all of them."""
    segments: list[tuple[int, int]]
    """(address or 0, size) of everything in them, in order; nothing if rows belong elsewhere than they stand."""
    rows: list[Rows] = field(default_factory=list)
    """What is wanted of them, in order."""

    @property
    def wanted(self) -> int:
        """Bytes of the rows."""
        return sum(rows.size * rows.count for rows in self.rows)

    @property
    def sparse(self) -> bool:
        """Whether to ask for the rows costs clearly less than to move everything."""
        return len(self.rows) <= MOST_ROWS and self.wanted + REQUEST * len(self.rows) < 0.95 * self.size


def plan_runs(ranges: Iterable[Range], layout: ImageLayout) -> list[Run]:
    """Runs that bring every range to its place.

    A byte that is wanted in several places is in several runs.

    Args:
        ranges: within the checksummed bytes of the image.
        layout: the image's.
    """
    runs: list[Run] = []
    left = _apart(ranges)
    while left:
        chosen, again, end = [], [], 0
        for wanted in left:
            if wanted.at >= end:
                chosen.append(wanted)
                end = wanted.at + wanted.size
            else:
                again.append(wanted)
        runs += _disjoint(chosen, layout)
        left = again
    return runs


def wanted_blocks(ranges: Iterable[Range], layout: ImageLayout) -> list[tuple[int, int]]:
    """(first, last) of the longest rows of blocks of which something is wanted."""
    return _rows(_apart(ranges), layout.data_start, along=0)


def bounds(first: int, last: int, layout: ImageLayout) -> tuple[int, int]:
    """(first byte, byte behind) of the blocks ``first`` to ``last`` in an image."""
    return layout.data_start + first * BLOCK, min(layout.data_start + (last + 1) * BLOCK, layout.crc_start)


def split(ranges: Iterable[Range], parts: Sequence[tuple[int, int]]) -> tuple[list[list[Range]], list[Range]]:
    """Ranges cut at the borders of parts: those within each part, and those outside of all.

    Args:
        ranges: of an image.
        parts: (first byte, byte behind) of disjoint parts of it, in order.
    """
    inside: list[list[Range]] = [[] for _ in parts]
    outside: list[Range] = []
    for wanted in ranges:
        at, end = wanted.at, wanted.at + wanted.size
        index = max(0, bisect_right(parts, at, key=lambda part: part[0]) - 1)
        while at < end:
            if index == len(parts):
                stop, place = end, outside
            elif at < parts[index][0]:
                stop, place = min(end, parts[index][0]), outside
            else:
                stop, place = max(at, min(end, parts[index][1])), inside[index]
                index += 1
            if at < stop and wanted.spread:
                place += [_range(rows) for rows in _rows_between(wanted, at, stop, 0)]
            elif at < stop:
                place.append(Range(at, stop - at, wanted.address + at - wanted.at))
            at = stop
    return inside, outside


def _apart(ranges: Iterable[Range]) -> list[Range]:
    """The ranges in order; rows with whole blocks between them that nobody wants are ranges of their own."""
    found: list[Range] = []
    for wanted in ranges:
        if wanted.row and wanted.stride - wanted.row >= (2 + ALONG) * BLOCK:
            for index, at in enumerate(range(wanted.at, wanted.at + wanted.size, wanted.stride)):
                size = min(wanted.row, wanted.at + wanted.size - at)
                found.append(Range(at, size, wanted.address + index * (wanted.spread or wanted.stride)))
        elif wanted.size:
            found.append(wanted)
    return sorted(found)


def _disjoint(ranges: list[Range], layout: ImageLayout) -> Iterator[Run]:
    """Runs for ranges that do not overlap and are in order."""
    index = 0
    for first, last in _runs_of_blocks(ranges, layout.data_start):
        at = layout.data_start + first * BLOCK
        end = min(layout.data_start + (last + 1) * BLOCK, layout.crc_start)
        segments: list[tuple[int, int]] = []
        rows: list[Rows] = []
        start, apart = at, False
        while index < len(ranges) and ranges[index].at < end:
            wanted = ranges[index]
            begin, stop = max(wanted.at, at), min(wanted.at + wanted.size, end)
            if begin > at:
                segments.append((0, begin - at))
            segments.append((wanted.address + begin - wanted.at, stop - begin))
            rows += _rows_between(wanted, begin, stop, start)
            apart |= wanted.spread > 0
            at = stop
            if wanted.at + wanted.size > end:
                break  # The next run has the rest.
            index += 1
        if at < end:
            segments.append((0, end - at))
        yield Run(first=first, last=last, size=end - start, segments=[] if apart else segments, rows=rows)


def _range(rows: Rows) -> Range:
    size = rows.stride * (rows.count - 1) + rows.size
    return Range(rows.at, size, rows.address, rows.size, rows.stride, rows.spread)


def _rows_between(wanted: Range, begin: int, stop: int, start: int) -> Iterator[Rows]:
    """What is wanted of the bytes ``begin`` to ``stop`` of an image, in a run that begins at ``start``."""
    row, stride = (wanted.row, wanted.stride) if wanted.row else (wanted.size, wanted.size)

    spread = wanted.spread or stride

    def rows(at: int, size: int, count: int) -> Rows:
        before, within = divmod(at - wanted.at, stride)
        address = wanted.address + before * spread + within
        return Rows(at=at - start, size=size, stride=stride, count=count, address=address, spread=spread)

    at = begin
    if behind := (at - wanted.at) % stride:
        if behind < row:
            yield rows(at, min(row - behind, stop - at), 1)
        at = min(stop, at + stride - behind)
    count, rest = divmod(stop - at, stride)
    count += rest >= row
    if count:
        yield rows(at, row, count)
    if 0 < rest < row:
        yield rows(stop - rest, rest, 1)


def _runs_of_blocks(ranges: list[Range], start: int) -> Iterator[tuple[int, int]]:
    for first, last in _rows(ranges, start, ALONG):
        for begin in range(first, last + 1, RUN):
            yield begin, min(begin + RUN - 1, last)


def _rows(ranges: list[Range], start: int, along: int) -> list[tuple[int, int]]:
    """(first, last) of rows of blocks, with gaps of at most ``along`` blocks in them."""
    spans: list[tuple[int, int]] = []
    for wanted in ranges:
        first, last = (wanted.at - start) // BLOCK, (wanted.at + wanted.size - 1 - start) // BLOCK
        if spans and first <= spans[-1][1] + 1 + along:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last))
        else:
            spans.append((first, last))
    return spans
