"""Who reads what for whom: every block once, evenly, and in an order in which nobody waits for ever."""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import given
from hypothesis import strategies as st

from resilient_train.plan.fanout import Piece, Span, shared_pieces

MOST = 8


@st.composite
def requests(draw: st.DrawFn) -> list[list[Span]]:
    """By rank, disjoint spans of a few images."""
    found: list[list[Span]] = []
    for _ in range(draw(st.integers(1, 6))):
        if found and draw(st.booleans()):
            found.append(list(draw(st.sampled_from(found))))
            continue
        spans = []
        for image in range(draw(st.integers(0, 3))):
            borders = sorted(draw(st.sets(st.integers(0, 60), max_size=6)))
            spans += [Span(image, a, b - 1) for a, b in zip(borders[::2], borders[1::2], strict=False)]
        found.append(spans)
    return found


def blocks(spans: list[Span]) -> set[tuple[int, int]]:
    return {(span.image, block) for span in spans for block in range(span.first, span.last + 1)}


@given(requests())
def test_what_several_want_is_in_one_piece_and_nothing_else_is(wanted: list[list[Span]]) -> None:
    """Against counting: a block is in one piece if two ranks or more want it, for exactly those; else in none."""
    by_block: dict[tuple[int, int], set[int]] = {}
    for rank, spans in enumerate(wanted):
        for block in blocks(spans):
            by_block.setdefault(block, set()).add(rank)
    found: dict[tuple[int, int], set[int]] = {}
    for piece in shared_pieces(wanted, MOST):
        assert piece.span.last - piece.span.first < MOST
        assert piece.reader in piece.ranks
        for block in blocks([piece.span]):
            assert block not in found
            found[block] = set(piece.ranks)
    assert found == {block: ranks for block, ranks in by_block.items() if len(ranks) > 1}


@given(requests())
def test_every_rank_can_take_its_pieces_in_order(wanted: list[list[Span]]) -> None:
    """Ranks that each do one thing at a time, in the order of the list, all come to the end: nobody waits for ever."""
    pieces = shared_pieces(wanted, MOST)
    mine = {rank: deque(piece for piece in pieces if rank in piece.ranks) for rank in range(len(wanted))}
    has: set[tuple[Span, int]] = set()
    while any(mine.values()):
        able = [r for r, left in mine.items() if left and _can(left[0], r, has)]
        assert able, "everybody waits"
        for rank in able:
            has.add((mine[rank].popleft().span, rank))


def _can(piece: Piece, rank: int, has: set[tuple[Span, int]]) -> bool:
    before = piece.before(rank)
    return before is None or (piece.span, before) in has


@given(requests())
def test_a_piece_goes_round_once(wanted: list[list[Span]]) -> None:
    """From its reader each is sent it by one other, and the last sends it to nobody."""
    for piece in shared_pieces(wanted, MOST):
        at, round_ = piece.reader, [piece.reader]
        while (behind := piece.behind(at)) is not None:
            assert piece.before(behind) == at
            at = behind
            round_.append(at)
        assert sorted(round_) == list(piece.ranks)
        assert piece.before(piece.reader) is None


def test_reading_is_shared_evenly_and_who_reads_alone_reads_less_for_others() -> None:
    """Replicas share what they all want; a rank that has much of its own to read is left out of it."""
    everything = [Span(image, 0, 255) for image in range(4)]
    load = Counter[int]()
    for piece in shared_pieces([everything] * 4, MOST):
        load[piece.reader] += piece.span.last - piece.span.first + 1
    assert load == {0: 256, 1: 256, 2: 256, 3: 256}
    pieces = shared_pieces([everything, everything, [*everything, Span(9, 0, 2000)]], MOST)
    assert {piece.reader for piece in pieces if piece.span.last != 255} == {0, 1}


def test_readers_alternate() -> None:
    """All read at once: the first pieces of the order have different readers."""
    pieces = shared_pieces([[Span(0, 0, 800)]] * 4, MOST)
    assert [piece.reader for piece in pieces[:8]] == [0, 1, 2, 3] * 2
