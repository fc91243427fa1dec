"""Copies of other nodes' images: at most two for each rank, the newest that counts and the one that is arriving."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np

from resilient_train.errors import FormatError, MemoryRefused
from resilient_train.image.arena import Slot, create_memory, touch
from resilient_train.image.native import checksum, engine
from resilient_train.keeper.shelf import Shelf, replica_owner
from resilient_train.spec.peers import Declined, Put, Ready, Stored, key_or_none
from resilient_train.spec.shard import BLOCK, PEEK, header_size, parse_header, peek
from resilient_train.spec.world import Key
from resilient_train.storage.wire import Wire

_PER_SOURCE = 2
_AT_ONCE = 4
"""Blocks that are received at once: they are still in the caches when they are verified."""
_MOST_BYTES = 1 << 46
_NICE = 10


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

    def take(self, wire: Wire, request: Put) -> None:
        """Answer a `Put`, and receive what follows.

        Raises:
            LinkLost: if the sender is gone.
            FormatError: if what it sends is not what it said; nothing is listed then.
        """
        if not PEEK <= request.size <= _MOST_BYTES or not request.source or len(request.source) > 500:
            raise FormatError(f"{request!r:.300} announces no image")
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
            yield_to_others()
            engine.retract(slot.address)
            slot.populate()
            wire.send(Ready())
            length = _receive(wire, slot, request)
            if length:
                engine.publish(slot.address, length)
        finally:
            slot.close()
        if length and number not in self._shelf:
            wire.send(Declined(reason="the copy is not needed any more"))
        else:
            wire.send(Stored() if length else Declined(reason="what arrived fails its checksums"))

    def _room(self, request: Put) -> tuple[int, Slot] | None:
        """A slot for a copy, locked against readers; None if all hold what must stay."""
        owner = replica_owner(request.source)
        told = key_or_none(request.keep)
        keep = {key for key in (told, self._kept()) if key is not None}
        # The sender may know of a newer one than this node has heard of; then that is what must stay.
        keep = {max(keep)} if keep else keep
        with self._finding:
            taken = 0
            for number in [number for number, name in self._shelf.owners().items() if name == owner]:
                slot = self._shelf.open(number)
                if slot is None:
                    continue
                stamp = slot.stamp()
                free = stamp is None or stamp.key not in keep
                if free and slot.size == request.size and slot.try_lock(exclusive=True):
                    return number, slot
                if free and slot.size != request.size:
                    self._useless(number)
                else:
                    taken += 1
                slot.close()
            if taken >= _PER_SOURCE:
                return None
            descriptor = create_memory(f"copy of {request.source}", request.size)
        try:
            touch(descriptor)
            number = self._shelf.add(descriptor, owner)
            slot = self._shelf.open(number)
        finally:
            os.close(descriptor)
        assert slot is not None
        slot.try_lock(exclusive=True)
        self._added(number)
        return number, slot


def yield_to_others() -> None:
    """Let everything else on this machine go before this thread: copies are never waited for."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    except OSError:
        return  # It is as polite already.


def _receive(wire: Wire, slot: Slot, request: Put) -> int:
    """Receive an image, all but its first 8 bytes; these, if every block is as its checksum says, else 0."""
    view = memoryview(slot.map)
    try:
        prefix = bytearray(8)
        wire.fill([memoryview(prefix)])
        start = header_size(bytes(prefix))
        if not PEEK <= start <= request.size:
            raise FormatError(f"{wire.name} sends an image whose header has {start} bytes")
        wire.fill([view[8:start]])
        sums = []
        at = start
        while at < request.size:
            end = min(at + _AT_ONCE * BLOCK, request.size)
            wire.fill([view[at:end]])
            # Whatever stands behind the last block is summed along, and looked at by nobody.
            sums += [checksum(view[begin : min(begin + BLOCK, end)]) for begin in range(at, end, BLOCK)]
            at = end
        return _verified(bytes(prefix) + bytes(view[8:start]), view, sums, request)
    finally:
        view.release()


def _verified(header: bytes, view: memoryview, sums: list[int], request: Put) -> int:
    stamp = peek(header)
    expected = (Key(request.lineage, request.step), request.rank, request.world)
    if stamp is None or (stamp.key, stamp.rank, stamp.world) != expected:
        return 0
    try:
        layout, _ = parse_header(header, request.size)
    except FormatError:
        return 0
    table = np.frombuffer(view[layout.crc_start : layout.crc_start + 4 * layout.blocks], dtype="<u4")
    if checksum(table.tobytes()) != stamp.crc:
        return 0
    whole = layout.blocks - 1
    # The last block ends where the table begins.
    last = checksum(view[layout.data_start + whole * BLOCK : layout.crc_start])
    good = sums[:whole] == table[:whole].tolist() and last == table[whole]
    return layout.data_start - 8 if good else 0
