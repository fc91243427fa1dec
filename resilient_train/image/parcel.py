"""Runs of an image on their way from one rank to another: how they are asked for, packed and unpacked.

A run travels as its blocks, or, where that is clearly less, as the rows that are wanted and what all other bytes of its
blocks add to their checksums.  Whoever gets it checks it against the image's table either way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from resilient_train.errors import FormatError
from resilient_train.image.fetch import RUN, Run, bounds
from resilient_train.image.native import engine
from resilient_train.image.verified import Row, VerifiedImage
from resilient_train.spec.peers import rows_within
from resilient_train.spec.shard import BLOCK

MOST = RUN * BLOCK
"""Bytes of the longest parcel."""
_HEAD = 5
"""Numbers before the rows of an order."""

Bytes = npt.NDArray[np.uint8]


class Order(NamedTuple):
    """What somebody wants of an image."""

    image: int
    """Whose image."""
    first: int
    """Number of the first block."""
    last: int
    """Number of the last one."""
    size: int
    """Bytes of the parcel."""
    rows: tuple[Row, ...]
    """What of them; nothing: all."""


def order(image: int, run: Run) -> Order:
    """What to ask for to get a run."""
    rows = tuple((some.at, some.size, some.stride, some.count) for some in run.rows) if run.sparse else ()
    return Order(image, run.first, run.last, length(run), rows)


def length(run: Run) -> int:
    """Bytes of its parcel."""
    return run.wanted + 4 * (run.last - run.first + 1) if run.sparse else run.size


def encode_orders(orders: Iterable[Order]) -> bytes:
    """Orders as bytes."""
    numbers: list[int] = []
    for image, first, last, size, rows in orders:
        numbers += (image, first, last, size, len(rows), *(number for row in rows for number in row))
    return np.array(numbers, dtype="<i8").tobytes()


def decode_orders(data: bytes) -> list[Order]:
    """The inverse of `encode_orders`.

    Raises:
        FormatError: if they are malformed.
    """
    numbers = np.frombuffer(data, dtype="<i8").tolist() if len(data) % 8 == 0 else [0]
    found, at = [], 0
    while at < len(numbers):
        head = numbers[at : at + _HEAD]
        count = head[-1] if len(head) == _HEAD else -1
        rows = numbers[at + _HEAD : at + _HEAD + 4 * max(0, count)]
        if count < 0 or len(rows) != 4 * count or not 0 < head[3] <= MOST:
            raise FormatError("a malformed order of blocks")
        image, first, last, size = head[:-1]
        found.append(Order(image, first, last, size, tuple(zip(*(rows[i::4] for i in range(4)), strict=True))))
        at += _HEAD + len(rows)
    return found


def pack(reader: VerifiedImage, wanted: Order) -> Bytes:
    """The parcel of an order: of whole blocks they themselves, where they stand.

    Args:
        reader: of the image, which must stay in mapped memory while the parcel is used.
        wanted: of this image.

    Raises:
        CheckpointDamaged: if the image is not in this process's memory.
        FormatError: if it does not have what is wanted.
    """
    layout = reader.layout
    if not 0 <= wanted.first <= wanted.last < min(layout.blocks, wanted.first + RUN):
        raise FormatError(f"{reader.name} has no blocks {wanted.first} to {wanted.last}, or they are too many")
    begin, end = bounds(wanted.first, wanted.last, layout)
    source = reader.mapped(begin)
    rows = rows_within([list(row) for row in wanted.rows], end - begin)
    blocks = wanted.last - wanted.first + 1
    size = sum(width * count for _, width, _, count in rows) + 4 * blocks if rows else end - begin
    if size != wanted.size:
        raise FormatError(f"{reader.name}: these blocks make a parcel of {size} bytes, not {wanted.size}")
    if not rows:
        return np.frombuffer(memoryview((ctypes.c_ubyte * size).from_address(source)).cast("B"), dtype=np.uint8)
    parcel = np.empty(size, dtype=np.uint8)
    gaps = engine.gather_rows(source, end - begin, rows, parcel.ctypes.data)
    parcel[size - 4 * blocks :] = np.array(gaps, dtype="<u4").view(np.uint8)
    return parcel


def unpack(reader: VerifiedImage, run: Run, parcel: Bytes) -> bool:
    """Put what arrived where it belongs; whether it is what the image's checksums say."""
    if not run.sparse:
        return reader.deliver(run, parcel.ctypes.data)
    gaps = parcel[run.wanted :].copy().view("<u4").tolist()
    return reader.deliver(run, parcel.ctypes.data, gaps)
