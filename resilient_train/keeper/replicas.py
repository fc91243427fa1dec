"""Copies of other nodes' images: at most two for each rank, the newest that counts and the one that is arriving."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from resilient_train.errors import FormatError, LinkLost, MemoryRefused
from resilient_train.image.arena import Slot
from resilient_train.image.native import checksum, engine
from resilient_train.keeper.shelf import Shelf, replica_owner
from resilient_train.keeper.turns import Turns
from resilient_train.spec.peers import Declined, Put, Ready, Stored, key_or_none
from resilient_train.spec.shard import BLOCK, PEEK, header_size, parse_header, peek
from resilient_train.spec.world import Key
from resilient_train.storage.wire import Wire

_PER_SOURCE = 2
_AT_ONCE = 4
"""Blocks that are received at once: they are still in the caches when they are verified."""
_MOST_BYTES = 1 << 46
_NICE = 10


@dataclass
class _Arrived:
    """What has arrived of a copy."""

    of: tuple[Key, int, int]
    """Its state, rank and world size."""
    upto: int = 0
    """Bytes of it that stand in the slot; a whole number of blocks behind the header."""
    header: bytes = b""
    """Its header; the slot lacks the first 8 bytes of it."""
    sums: list[int] = field(default_factory=list)
    """The checksum of each block that has arrived."""


class Replicas:
    """Takes copies in; from any thread."""

    def __init__(
        self,
        shelf: Shelf,
        kept: Callable[[], Key | None],
        added: Callable[[int], None],
        useless: Callable[[int], None],
    ) -> None:
        """Args:
        shelf: where they go.
        kept: the newest state that is copied everywhere, as far as this node knows.
        added: told of each new slot.
        useless: told of each slot that may go.
        """
        self._shelf = shelf
        self._kept = kept
        self._added = added
        self._useless = useless
        self._finding = threading.Lock()
        self._turns = Turns()
        self._arrived: dict[int, _Arrived] = {}

    def take(self, wire: Wire, request: Put) -> None:
        """Answer a `Put`, and receive what follows, or what is left of it after a transfer that broke.

        Raises:
            LinkLost: if the sender is gone; what has arrived stays for its next connection.
            FormatError: if what it sends is not what it said; nothing is listed then.
        """
        if not PEEK <= request.size <= _MOST_BYTES or not request.source or len(request.source) > 500:
            raise FormatError(f"{request!r:.300} announces no image")
        with self._turns.of(request.source, wire):
            if self._is_here(request):
                wire.send(Ready(offset=request.size))
                wire.send(Stored())
                return
            try:
                room = self._room(request)
            except MemoryRefused as error:
                wire.send(Declined(reason=str(error)))
                return
            if room is None:
                wire.send(Declined(reason="both slots for its copies are in use"))
                return
            number, slot = room
            try:
                answer = self._fill(wire, request, number, slot)
            finally:
                slot.close()
            wire.send(answer)

    def _fill(self, wire: Wire, request: Put, number: int, slot: Slot) -> Stored | Declined:
        """Receive the bytes that a slot lacks of an image, verify and publish it."""
        yield_to_others()
        arrived = self._arrived.pop(number, None)
        if arrived is None or arrived.of != _identity(request):
            arrived = _Arrived(of=_identity(request))
        engine.retract(slot.address)
        slot.populate()
        wire.send(Ready(offset=arrived.upto))
        try:
            _receive(wire, slot, request.size, arrived)
        except LinkLost:
            self._arrived[number] = arrived
            raise
        length = _verified(slot, arrived, request)
        if not length:
            return Declined(reason="what arrived fails its checksums")
        engine.publish(slot.address, length)
        if number not in self._shelf:
            return Declined(reason="the copy is not needed any more")
        return Stored()

    def _room(self, request: Put) -> tuple[int, Slot] | None:
        """A slot for a copy, locked against readers: the one that has a part of it already, if there is one; None if
        all hold what must stay."""
        owner = replica_owner(request.source)
        told = key_or_none(request.keep)
        keep = {key for key in (told, self._kept()) if key is not None}
        # The sender may know of a newer one than this node has heard of; then that is what must stay.
        keep = {max(keep)} if keep else keep
        with self._finding:
            self._arrived = {number: part for number, part in self._arrived.items() if number in self._shelf}
            taken = 0
            for number in sorted(self._own(owner), key=lambda number: not self._begun(number, request)):
                slot = self._shelf.open(number)
                if slot is None:
                    continue
                stamp = slot.stamp()
                free = stamp is None or stamp.key not in keep or self._begun(number, request)
                if free and slot.size == request.size and slot.try_lock(exclusive=True):
                    return number, slot
                if free and slot.size != request.size:
                    self._useless(number)
                    self._arrived.pop(number, None)
                else:
                    taken += 1
                slot.close()
            if taken >= _PER_SOURCE:
                return None
        number, slot = self._shelf.make(f"copy of {request.source}", request.size, owner)
        self._added(number)
        return number, slot

    def _own(self, owner: str) -> list[int]:
        return [number for number, name in self._shelf.owners().items() if name == owner]

    def _begun(self, number: int, request: Put) -> bool:
        """Whether a slot holds a part of a copy."""
        arrived = self._arrived.get(number)
        return arrived is not None and arrived.of == _identity(request)

    def _is_here(self, request: Put) -> bool:
        """Whether the copy is complete; somebody may be reading it."""
        owner = replica_owner(request.source)
        stamps = (image.stamp for image in self._shelf.images() if image.owner == owner)
        return any((stamp.key, stamp.rank, stamp.world) == _identity(request) for stamp in stamps)


def yield_to_others() -> None:
    """Let everything else on this machine go before this thread: copies are never waited for."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    except OSError:
        return  # It is as polite already.


def _identity(request: Put) -> tuple[Key, int, int]:
    return Key(request.lineage, request.step), request.rank, request.world


def _receive(wire: Wire, slot: Slot, size: int, arrived: _Arrived) -> None:
    """Receive what is missing of an image, all but its first 8 bytes, which would publish it."""
    view = memoryview(slot.map)
    try:
        if not arrived.upto:
            prefix = bytearray(8)
            wire.fill([memoryview(prefix)])
            start = header_size(bytes(prefix))
            if not PEEK <= start <= size:
                raise FormatError(f"{wire.name} sends an image whose header has {start} bytes")
            wire.fill([view[8:start]])
            arrived.header = bytes(prefix) + bytes(view[8:start])
            arrived.upto = start
        while arrived.upto < size:
            at, end = arrived.upto, min(arrived.upto + _AT_ONCE * BLOCK, size)
            wire.fill([view[at:end]])
            # Whatever stands behind the last block is summed along, and looked at by nobody.
            arrived.sums += [checksum(view[begin : min(begin + BLOCK, end)]) for begin in range(at, end, BLOCK)]
            arrived.upto = end
    finally:
        view.release()


def _verified(slot: Slot, arrived: _Arrived, request: Put) -> int:
    """What publishes the image, if every block is as its checksum says, else 0."""
    stamp = peek(arrived.header)
    if stamp is None or (stamp.key, stamp.rank, stamp.world) != _identity(request):
        return 0
    try:
        layout, _ = parse_header(arrived.header, request.size)
    except FormatError:
        return 0
    if not layout.blocks:
        return 0
    view = memoryview(slot.map)
    try:
        table = np.frombuffer(view[layout.crc_start : layout.crc_start + 4 * layout.blocks], dtype="<u4").copy()
        whole = layout.blocks - 1
        # The last block ends where the table begins.
        last = checksum(view[layout.data_start + whole * BLOCK : layout.crc_start])
    finally:
        view.release()
    if checksum(table.tobytes()) != stamp.crc:
        return 0
    good = arrived.sums[:whole] == table[:whole].tolist() and last == table[whole]
    return layout.data_start - 8 if good else 0
