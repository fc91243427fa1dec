"""Who reads what from remote storage when several ranks want the same: each block is read once and passed on.

A pure function of what all ranks want, so that all that know this agree on who reads, who gets it from whom, and in
which order.

Theory of operation.  Blocks that the same ranks want are cut into pieces, and each piece is given to the rank that has
the least to read.  From its reader a piece goes round the ranks that want it, each receiving it from the one before and
sending it to the one behind, so that no rank sends or receives anything twice, however many there are.  Every rank
takes its pieces in the order of the whole list.  That order cannot deadlock: whatever a rank waits for is an earlier
piece, or the same one at an earlier place of its round.  Readers alternate in it, so that all of them read at once.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Consecutive blocks of one image."""

    image: int
    """Whose image."""
    first: int
    """Number of the first block."""
    last: int
    """Number of the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Blocks that one rank reads for several."""

    span: Span
    """Which."""
    ranks: tuple[int, ...]
    """Who wants them, ascending."""
    reader: int
    """Which of these reads them."""

    def before(self, rank: int) -> int | None:
        """From whom ``rank`` receives them; None if it reads them."""
        return None if rank == self.reader else self.ranks[self.ranks.index(rank) - 1]

    def behind(self, rank: int) -> int | None:
        """To whom ``rank`` sends them; None if it is the last of the round."""
        following = self.ranks[(self.ranks.index(rank) + 1) % len(self.ranks)]
        return None if following == self.reader else following


def shared_pieces(requests: Sequence[Sequence[Span]], most: int) -> list[Piece]:
    """What several ranks want, in the order in which it is passed on.

    Args:
        requests: by rank, the blocks it wants, none of them twice.
        most: number of blocks of the longest piece.
    """
    alike: dict[tuple[Span, ...], list[int]] = {}
    for rank, request in enumerate(requests):
        alike.setdefault(tuple(sorted(request)), []).append(rank)
    load = [0] * len(requests)
    wanted: dict[tuple[int, ...], list[Span]] = defaultdict(list)
    for span, ranks in _segments(alike):
        if len(ranks) == 1:
            load[ranks[0]] += span.last - span.first + 1
        else:
            for first in range(span.first, span.last + 1, most):
                wanted[ranks].append(Span(span.image, first, min(first + most - 1, span.last)))
    ends = {(span.image, span.last) for span in _ends(span for spans in wanted.values() for span in spans)}
    turns: Counter[int] = Counter()
    pieces: list[tuple[int, int, Piece]] = []
    for ranks, spans in sorted(wanted.items()):
        least = [(load[rank], rank) for rank in ranks]
        heapq.heapify(least)
        for span in spans:
            home = span.image % len(requests)
            _, reader = least[0]
            if (span.image, span.last) in ends and home in ranks:
                reader = home
            load[reader] += span.last - span.first + 1
            while least[0][0] != load[least[0][1]]:
                heapq.heapreplace(least, (load[least[0][1]], least[0][1]))
            pieces.append((turns[reader], reader, Piece(span=span, ranks=ranks, reader=reader)))
            turns[reader] += 1
    return [piece for _, _, piece in sorted(pieces, key=lambda item: item[:2])]


def _ends(spans: Iterator[Span]) -> list[Span]:
    """The last of each image: whoever looked after the image has read its end already, where its tables stand."""
    last: dict[int, Span] = {}
    for span in spans:
        last[span.image] = max(span, last.get(span.image, span))
    return list(last.values())


def _segments(alike: dict[tuple[Span, ...], list[int]]) -> Iterator[tuple[Span, tuple[int, ...]]]:
    """The longest spans of which every block is wanted by the same ranks, with these."""
    changes: dict[int, dict[int, list[tuple[int, bool]]]] = defaultdict(lambda: defaultdict(list))
    groups = list(alike.values())
    for number, request in enumerate(alike):
        for span in request:
            changes[span.image][span.first].append((number, True))
            changes[span.image][span.last + 1].append((number, False))
    for image, by_block in sorted(changes.items()):
        active: Counter[int] = Counter()
        begin, ranks = 0, tuple[int, ...]()
        for block, steps in sorted(by_block.items()):
            for number, enters in steps:
                active[number] += 1 if enters else -1
            following = tuple(sorted(rank for number, on in active.items() if on for rank in groups[number]))
            if following == ranks:
                continue
            if ranks:
                yield Span(image, begin, block - 1), ranks
            begin, ranks = block, following
