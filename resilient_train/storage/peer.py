"""Images in the memory of other nodes: what their keepers hold, ranges of it, and copies for them to keep."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from resilient_train.errors import CheckpointDamaged, FormatError, LinkLost, OutsideError
from resilient_train.spec.messages import Message
from resilient_train.spec.parity import Parity
from resilient_train.spec.peers import (
    Declined,
    Fold,
    Gather,
    Gathered,
    Held,
    ListHeld,
    Put,
    Range,
    Read,
    Ready,
    Stored,
    key_or_none,
)
from resilient_train.spec.shard import BLOCK
from resilient_train.spec.world import Key
from resilient_train.storage.wire import Wire, connect

CONNECTIONS = 4
"""Connections to one keeper through which one process reads side by side."""
CONNECT_TIMEOUT = 2.0
"""Seconds for a keeper to answer a connection."""
READ_TIMEOUT = 10.0
"""Seconds for 8 MiB to arrive."""
ROOM_TIMEOUT = 120.0
"""Seconds for memory for a copy to be made."""


_Agreed = TypeVar("_Agreed", Ready, Stored)


class PeerDeclined(OutsideError):
    """The other node's keeper will not keep the copy; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldImage:
    """An image in some keeper's memory."""

    slot: int
    """That keeper's id of it."""
    key: Key
    """Which state it is a part of."""
    rank: int
    """Whose part."""
    world: int
    """Of how many."""
    size: int
    """Bytes."""
    replica: bool
    """Whether another node's keeper has, or had, the original."""


def held_image(row: Sequence[Any]) -> HeldImage:
    """An image from a row of `Held` or `Images`.

    Raises:
        FormatError: if it is none.
    """
    if len(row) != 7 or not all(type(n) is int and n >= 0 for n in row):
        raise FormatError(f"{row!r:.100} describes no image")
    slot, lineage, step, rank, world, size, replica = row
    return HeldImage(slot=slot, key=Key(lineage, step), rank=rank, world=world, size=size, replica=bool(replica))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldParity:
    """A parity in some keeper's memory."""

    slot: int
    """That keeper's id of it."""
    key: Key
    """Which state it is of."""
    begin: int
    """Where its bytes begin in the slot."""
    parity: Parity
    """What is in them."""

    def as_image(self) -> HeldImage:
        """What a keeper is asked for to get its bytes."""
        return HeldImage(slot=self.slot, key=self.key, rank=0, world=0, size=0, replica=True)

    def row(self) -> list[Any]:
        """As messages have it."""
        return [self.slot, self.key.lineage, self.key.step, self.begin, self.parity.to_json()]


def held_parity(row: Sequence[Any]) -> HeldParity:
    """The inverse of `HeldParity.row`.

    Raises:
        FormatError: if it is none.
    """
    if len(row) != 5 or not all(type(n) is int and n >= 0 for n in row[:4]):
        raise FormatError(f"{row!r:.100} describes no parity")
    slot, lineage, step, begin, pieces = row
    return HeldParity(slot=slot, key=Key(lineage, step), begin=begin, parity=Parity.from_json(pieces))


class HeldBy(NamedTuple):
    """What a keeper holds."""

    images: list[HeldImage]
    parities: list[HeldParity]
    chosen: Key | None
    """The state that it makes durable at the end of the job, once it has decided."""


class Listing(NamedTuple):
    """What the memory of all nodes holds."""

    here: list[HeldImage]
    """This node's images."""
    peers: dict[str, list[HeldImage]]
    """Those of other nodes, by their keeper's endpoint."""
    parities: dict[str, list[HeldParity]]
    """The same for parities; this node's under an empty endpoint."""
    secret: bytes
    """The job's."""


def ask_held(endpoint: str, secret: bytes, timeout: float) -> HeldBy:
    """What the keeper at ``endpoint`` holds.

    Raises:
        LinkLost: if it does not answer within ``timeout`` seconds for each of a few steps.
    """
    wire = connect(endpoint, secret, timeout)
    try:
        wire.send(ListHeld())
        held = wire.expect(Held)
        return HeldBy(
            [held_image(row) for row in held.images],
            [held_parity(row) for row in held.parities],
            key_or_none(held.chosen),
        )
    except (FormatError, TypeError) as error:
        raise LinkLost(f"{wire.name} talks nonsense: {error}") from error
    finally:
        wire.close()


class Peer:
    """Reads from one keeper, through a few connections; from any thread."""

    def __init__(self, endpoint: str, secret: bytes) -> None:
        """Connects at the first read."""
        self.endpoint = endpoint
        self._secret = secret
        self._idle: queue.LifoQueue[Wire | None] = queue.LifoQueue()
        for _ in range(CONNECTIONS):
            self._idle.put(None)

    def read(self, image: HeldImage, offset: int, length: int) -> bytearray:
        """Exactly these bytes of an image.

        Raises:
            LinkLost: if the keeper is gone or silent.
            CheckpointDamaged: if it does not hold the image any more.
        """
        data = bytearray(length)
        self.read_into(image, offset, [memoryview(data)])
        return data

    def read_into(self, image: HeldImage, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with an image's bytes from ``offset`` on.

        Raises:
            LinkLost: if the keeper is gone or silent.
            CheckpointDamaged: if it does not hold the image any more.
        """
        size = sum(len(buffer) for buffer in buffers)
        with self._connection() as wire:
            wire.send(Read(slot=image.slot, lineage=image.key.lineage, step=image.key.step, offset=offset, size=size))
            answer = wire.receive()
            if isinstance(answer, Range) and answer.size == size:
                wire.fill(buffers)
                return
            reason = _reason(answer)
        raise self._refused(image, reason)

    def gather(
        self, image: HeldImage, offset: int, size: int, rows: Sequence[tuple[int, int, int, int]], buffer: memoryview
    ) -> list[int]:
        """Fill the buffer with rows of a range of an image, one behind the other.

        Args:
            image: which.
            offset: first byte of the range and of a block.
            size: of the range.
            rows: (first byte from ``offset`` on, size, stride, count), at most `MOST_ROWS`, in order and disjoint.
            buffer: as long as the rows together.

        Returns:
            For every block of the range, what its other bytes add to its checksum.

        Raises:
            LinkLost: if the keeper is gone, silent or nonsensical.
            CheckpointDamaged: if it does not hold the image any more.
        """
        key = image.key
        request = Gather(
            slot=image.slot, lineage=key.lineage, step=key.step, offset=offset, size=size, rows=[[*row] for row in rows]
        )
        with self._connection() as wire:
            wire.send(request)
            answer = wire.receive()
            if isinstance(answer, Gathered) and answer.size == len(buffer):
                gaps = answer.gaps
                if type(gaps) is not list or len(gaps) != -(-size // BLOCK):
                    raise FormatError(f"{gaps!r:.100} says nothing of {size} bytes")
                if not all(type(gap) is int and 0 <= gap < 1 << 32 for gap in gaps):
                    raise FormatError(f"{gaps!r:.100} are no checksums")
                wire.fill([buffer])
                return gaps
            reason = _reason(answer)
        raise self._refused(image, reason)

    def _refused(self, image: HeldImage, reason: str) -> CheckpointDamaged:
        return CheckpointDamaged(
            f"the keeper at {self.endpoint} does not have rank {image.rank}'s image of {image.key}: {reason}"
        )

    @contextmanager
    def _connection(self) -> Iterator[Wire]:
        """One for this thread's use; none that anything went wrong with is used again."""
        wire = self._idle.get()
        healthy = False
        try:
            if wire is None:
                wire = connect(self.endpoint, self._secret, CONNECT_TIMEOUT)
                wire.patience(READ_TIMEOUT)
            yield wire
            healthy = True
        except FormatError as error:
            raise LinkLost(f"{self.endpoint} talks nonsense: {error}") from error
        finally:
            if wire is not None and not healthy:
                wire.close()
            self._idle.put(wire if healthy else None)

    def close(self) -> None:
        """Hang up, once nobody reads any more."""
        for _ in range(CONNECTIONS):
            wire = self._idle.get()
            if wire is not None:
                wire.close()


PUT_PIECE = 8 << 20


def put_bytes(
    wire: Wire, request: Put | Fold, data: Sequence[memoryview], turn: Callable[[int], None], piece: int = PUT_PIECE
) -> None:
    """Have the keeper at the other end keep a copy of an image, or take pieces into a parity; what it has of it already
    is not sent again.

    Args:
        wire: to it.
        request: of which image, or images.
        data: their bytes, one behind the other, which must not change meanwhile.
        turn: called before so many bytes are sent, to count them or wait; what it raises ends the transfer.
        piece: the most bytes to send at once.

    Raises:
        LinkLost: if the keeper is gone, silent or nonsensical.
        PeerDeclined: if it has no room, or what arrived was damaged.
    """
    try:
        wire.patience(ROOM_TIMEOUT)
        wire.send(request)
        begin = _agreed(wire, Ready).offset
        total = sum(map(len, data))
        if type(begin) is not int or not 0 <= begin <= total:
            raise FormatError(f"{begin!r:.50} of {total} bytes")
        wire.patience(READ_TIMEOUT)
        for view in data:
            for at in range(min(begin, len(view)), len(view), piece):
                turn(min(piece, len(view) - at))
                wire.send_bytes([view[at : at + piece]])
            begin -= min(begin, len(view))
        wire.patience(ROOM_TIMEOUT)
        _agreed(wire, Stored)
    except FormatError as error:
        raise LinkLost(f"{wire.name} talks nonsense: {error}") from error


def _agreed(wire: Wire, kind: type[_Agreed]) -> _Agreed:
    answer = wire.receive()
    if isinstance(answer, Declined):
        raise PeerDeclined(answer.reason)
    if not isinstance(answer, kind):
        raise LinkLost(f"{wire.name} answered {answer!r:.200}")
    return answer


def _reason(answer: Message) -> str:
    if not isinstance(answer, Declined):
        raise FormatError(f"{answer!r:.200}")
    return answer.reason
