"""What keepers of different nodes, and workers that restore, say to a keeper over TCP.

A message is one JSON object; the bytes of images travel behind `Read`'s answer and `Put`, raw.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from resilient_train.errors import FormatError
from resilient_train.spec.messages import Message, message
from resilient_train.spec.world import Key

MAX_HEAD = 16 << 20
"""Longest message in bytes, without the bytes of images."""
MOST_ROWS = 1 << 16
"""Rows that can be asked for at once."""
MOST_GATHERED = 16 << 20
"""Longest range, in bytes, that rows can be asked of."""


@message
class ListHeld(Message):
    """Answered by `Held`."""


@message
class Held(Message):
    """Every complete image in memory: [slot, lineage, step, rank, world size, bytes, replica or not]."""

    images: list[list[Any]]
    chosen: list[int] | None
    """The state that this keeper makes durable at the end of the job, once it has been asked to."""
    parities: list[list[Any]] = field(default_factory=list)
    """[slot, lineage, step, first byte of the data, pieces] of each parity: see `resilient_train.spec.parity`."""


@message
class Read(Message):
    """A range of the image of one state in a slot; answered by `Range` and its bytes, or `Declined`."""

    slot: int
    lineage: int
    step: int
    offset: int
    size: int


@message
class Range(Message):
    """So many bytes follow."""

    size: int


@message
class Gather(Message):
    """Rows of a range of an image; answered by `Gathered` and their bytes, one behind the other, or `Declined`."""

    slot: int
    lineage: int
    step: int
    offset: int
    """First byte of the range, which is one of a block of the image."""
    size: int
    """Bytes of the range."""
    rows: list[list[int]]
    """[first byte from ``offset`` on, size, stride, count] in order: see `rows_within`."""


@message
class Gathered(Message):
    """So many bytes follow."""

    size: int
    gaps: list[int]
    """For every block of the range, what the bytes that do not follow add to its checksum: see `csrc/gather.hpp`."""


@message
class Put(Message):
    """Keep a copy of an image; answered by `Ready`, or `Declined`.  Behind `Ready` its bytes follow."""

    source: str
    """Whose image: node/slot."""
    lineage: int
    step: int
    rank: int
    world: int
    size: int
    keep: list[int] | None
    """The newest state that is copied everywhere: its copies must stay."""


@message
class Fold(Message):
    """Take a piece of a node's images into the parity of a state; answered as `Put` is."""

    node: str
    """Whose images."""
    lineage: int
    step: int
    world: int
    others: list[str]
    """The nodes whose pieces belong into this parity; one of them is ``node``."""
    parts: list[list[int]]
    """What follows, one behind the other: [rank, bytes of its image, first byte, behind the last byte]."""
    sums: list[int]
    """CRC32C of every block of what follows."""
    keep: list[int] | None
    """The newest state that is kept everywhere: its parity must stay."""


@message
class Ready(Message):
    """There is room; send the bytes from ``offset`` on: those before it have arrived on an earlier connection."""

    offset: int = 0


@message
class Stored(Message):
    """The copy is complete, verified and listed; the piece is verified and in the parity."""


@message
class Declined(Message):
    """Why not."""

    reason: str


@message
class Report(Message):
    """How far a node is; see `resilient_train.plan.replication`.  `Orders` come whenever they change."""

    node: str
    generation: int
    lineage: int
    slowest: int
    furthest: int
    published: int
    every: int
    done: list[int] | None
    missed: list[int] | None
    moved: int
    kept: list[int] | None
    saving: bool


@message
class Orders(Message):
    """Which states every node copies and keeps, and which step it makes durable."""

    generation: int
    pending: list[int] | None
    """The state to copy once it exists."""
    kept: list[int] | None
    """The newest state that is copied everywhere; None: unknown."""
    persist_at: int
    """0: none."""


TYPES = {
    kind.__name__: kind
    for kind in (ListHeld, Held, Read, Range, Gather, Gathered, Put, Fold, Ready, Stored, Declined, Report, Orders)
}


def rows_within(rows: Any, size: int) -> list[tuple[int, int, int, int]]:
    """Rows, each ``count`` times ``size`` bytes every ``stride`` bytes, that are in order and disjoint.

    Args:
        rows: as they stand in `Gather`.
        size: of the range that they are in.

    Raises:
        FormatError: if they are anything else, or more than `MOST_ROWS`.
    """
    if type(rows) is not list or len(rows) > MOST_ROWS:
        raise FormatError(f"not at most {MOST_ROWS} rows")
    found, end = [], 0
    for row in rows:
        if not (type(row) is list and len(row) == 4 and all(type(n) is int for n in row)):
            raise FormatError(f"{row!r:.100} describes no rows")
        at, width, stride, count = row
        if count == 1:
            stride = width
        if at < end or width < 1 or count < 1 or stride < width or at + stride * (count - 1) + width > size:
            raise FormatError(f"{row!r:.100} is not within the range, behind the rows before it")
        end = at + stride * (count - 1) + width
        found.append((at, width, stride, count))
    return found


def key_or_none(value: list[int] | None) -> Key | None:
    """A key from its JSON form.

    Raises:
        FormatError: if it is anything else.
    """
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value)):
        raise FormatError(f"{value!r:.50} is no key")
    return Key(*value)
