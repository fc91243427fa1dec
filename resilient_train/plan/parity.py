"""Parity groups: who is in one, what goes where, and how a lost image is made again.  Pure functions.

Theory of operation.  The images of a node are seen as one string of bytes and cut into as many pieces as its group has
other nodes; each of these gets one.  What a node gets from the others it folds into one *parity* by exclusive or.  So
in a group of k nodes each sends its images once and holds 1/(k-1) of what one of them has, and any one node's images
are the parities of the others folded with the others' pieces in them: every byte of it exists in k-1 places, and is
gone only when two nodes of the group are.

A group takes at most one node of each rack, as long as there are enough racks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from resilient_train.spec.parity import Parity, Part
from resilient_train.spec.topology import Topology

_ALIGN = 4096


def groups(topology: Topology, most: int) -> tuple[tuple[str, ...], ...]:
    """Groups of two to ``most`` nodes, of about one size; three where there are no more and ``most`` is two.

    What stands together is dealt out like cards, so the nodes of one zone, rack or switch are spread as evenly over
    the groups as can be, at every level at once.

    Args:
        topology: where the nodes stand.
        most: nodes of a group, at least 2.

    Returns:
        All nodes, each once; nothing if there is only one.
    """
    nodes = sorted(topology.nodes, key=topology.domains)
    count = min(-(-len(nodes) // most), len(nodes) // 2)
    return tuple(tuple(nodes[first::count]) for first in range(count))


def cut(images: Sequence[tuple[int, int]], count: int) -> list[tuple[Part, ...]]:
    """A node's images in ``count`` pieces of about one size, the last ones shorter or empty.

    Args:
        images: (rank, bytes) of each.
        count: pieces.
    """
    total = sum(size for _, size in images)
    each = -(-total // (count * _ALIGN)) * _ALIGN
    return [tuple(_between(images, piece * each, (piece + 1) * each)) for piece in range(count)]


def _between(images: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[Part]:
    at = 0
    for rank, size in images:
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            yield Part(rank=rank, image=size, begin=low - at, end=high - at)
        at += size


def restorable(parities: Sequence[Parity], there: Collection[int]) -> dict[int, int]:
    """The lost images that can be made again.

    Args:
        parities: what is left of them.
        there: the ranks whose images are left.

    Returns:
        Rank -> bytes of its image.
    """
    found: dict[int, list[Part]] = {}
    for parity in parities:
        for _, parts in _usable(parity, there):
            for part in parts:
                found.setdefault(part.rank, []).append(part)
    return {rank: parts[0].image for rank, parts in found.items() if rank not in there and _is_whole(parts)}


def _usable(parity: Parity, there: Collection[int]) -> Iterator[tuple[str, Sequence[Part]]]:
    """The nodes whose pieces can be made again of a parity, and what is in these: all that the others have folded into
    it is left."""
    for node, parts in parity.pieces.items():
        if all(part.rank in there for other, theirs in parity.pieces.items() if other != node for part in theirs):
            yield node, parts


def _is_whole(parts: Sequence[Part]) -> bool:
    upto = 0
    for part in sorted(parts, key=lambda part: part.begin):
        if part.begin > upto or part.image != parts[0].image:
            return False
        upto = max(upto, part.end)
    return upto == parts[0].image


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Bytes of a lost image, as the exclusive or of bytes that are left."""

    target: int
    """First byte, from the beginning of what was asked for."""
    size: int
    """Bytes."""
    parity: int
    """Index of the parity that they are in."""
    begin: int
    """Where in it."""
    others: tuple[tuple[int, Part], ...]
    """(first byte from ``target`` on, bytes of an image) of everything else that was folded into these."""


def terms(parities: Sequence[Parity], there: Collection[int], rank: int, begin: int, end: int) -> list[Term]:
    """How the bytes from ``begin`` to ``end`` of a lost rank's image are made again; each byte once.

    Args:
        parities: what is left of them.
        there: the ranks whose images are left.
        rank: the lost one.
        begin: the first byte.
        end: the one behind the last.

    Raises:
        ValueError: if some of them are in no parity of which the rest is left.
    """
    found: list[Term] = []
    upto = begin
    pieces = [
        (part, at, index, node)
        for index, parity in enumerate(parities)
        for node, parts in _usable(parity, there)
        for at, part in _placed(parts)
        if part.rank == rank
    ]
    for part, at, index, node in sorted(pieces, key=lambda piece: piece[0].begin):
        low, high = max(upto, part.begin), min(end, part.end)
        if low >= high or part.begin > upto:
            continue
        start = at + low - part.begin
        others = _folded_along(parities[index].pieces, node, start, start + high - low)
        found.append(Term(target=low - begin, size=high - low, parity=index, begin=start, others=tuple(others)))
        upto = high
    if upto < end:
        raise ValueError(f"byte {upto} of rank {rank}'s image is in no parity")
    return found


def _placed(parts: Sequence[Part]) -> Iterator[tuple[int, Part]]:
    at = 0
    for part in parts:
        yield at, part
        at += part.size


def _folded_along(pieces: Mapping[str, Sequence[Part]], node: str, begin: int, end: int) -> Iterator[tuple[int, Part]]:
    """What other nodes have in the same bytes of a parity."""
    for other, parts in pieces.items():
        for at, part in _placed(parts) if other != node else ():
            low, high = max(begin, at), min(end, at + part.size)
            if low < high:
                first = part.begin + low - at
                yield low - begin, Part(rank=part.rank, image=part.image, begin=first, end=first + high - low)
