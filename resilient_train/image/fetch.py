"""Which blocks of an image to read for the bytes that are wanted, in pieces that can be read side by side."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from resilient_train.spec.shard import BLOCK, ImageLayout

RUN = 8
"""Blocks that are read at once: enough to keep a disk or a server busy, few enough to stay in the caches."""
ALONG = 1
"""Blocks that nobody wants but that are read along, because another request would cost more."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes of an image and where they are wanted."""

    at: int
    """First byte, from the beginning of the image."""
    size: int
    """How many."""
    address: int
    """Where they belong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive blocks, to be read at once."""

    first: int
    """Number of the first block."""
    last: int
    """Number of the last one."""
    segments: list[tuple[int, int]]
    """(address or 0, size) of everything in them, in order."""


def plan_runs(ranges: Iterable[Range], layout: ImageLayout) -> list[Run]:
    """Runs that bring every range to its place.

    A byte that is wanted in several places is in several runs.

    Args:
        ranges: within the checksummed bytes of the image.
        layout: the image's.
    """
    runs: list[Run] = []
    left = sorted(wanted for wanted in ranges if wanted.size)
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
    return _rows(sorted(wanted for wanted in ranges if wanted.size), layout.data_start, along=0)


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
            if at < stop:
                place.append(Range(at, stop - at, wanted.address + at - wanted.at))
            at = stop
    return inside, outside


def _disjoint(ranges: list[Range], layout: ImageLayout) -> Iterator[Run]:
    """Runs for ranges that do not overlap and are in order."""
    index = 0
    for first, last in _runs_of_blocks(ranges, layout.data_start):
        at = layout.data_start + first * BLOCK
        end = min(layout.data_start + (last + 1) * BLOCK, layout.crc_start)
        segments: list[tuple[int, int]] = []
        while index < len(ranges) and ranges[index].at < end:
            wanted = ranges[index]
            begin, stop = max(wanted.at, at), min(wanted.at + wanted.size, end)
            if begin > at:
                segments.append((0, begin - at))
            segments.append((wanted.address + begin - wanted.at, stop - begin))
            at = stop
            if wanted.at + wanted.size > end:
                break  # The next run has the rest.
            index += 1
        if at < end:
            segments.append((0, end - at))
        yield Run(first=first, last=last, segments=segments)


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
