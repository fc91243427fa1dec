"""Parities of other nodes' images: pieces are folded together as they arrive, each block once it is verified.

A group has two slots here: the parity that counts, and the one that is being made.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from resilient_train.errors import FormatError, LinkLost, MemoryRefused
from resilient_train.image.arena import Slot
from resilient_train.image.native import checksum, engine
from resilient_train.image.publish import publish, sum_blocks
from resilient_train.keeper.replicas import yield_to_others
from resilient_train.keeper.shelf import Shelf, parity_owner
from resilient_train.keeper.turns import Turns
from resilient_train.spec.parity import MOST_NODES, NAME, Parity, Part, parts_from
from resilient_train.spec.peers import Declined, Fold, Ready, Stored, key_or_none
from resilient_train.spec.shard import BLOCK, Entry, ImageLayout, Stamp, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.wire import Wire

_PER_GROUP = 2
_ROOM_FOR_JSON = 128 << 10


@dataclass(eq=False)
class _Folding:
    """A parity that is being made."""

    key: Key
    world: int
    others: frozenset[str]
    """The nodes whose pieces belong into it."""
    number: int
    slot: Slot
    """Locked against readers."""
    layout: ImageLayout
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: bool = False
    """Whether it is complete, or given up; the slot is not its own any more."""
    complete: bool = False
    """Whether it is published."""
    parts: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    upto: dict[str, int] = field(default_factory=dict)
    """How many bytes of each node's piece are in it."""

    @property
    def room(self) -> int:
        """Bytes of the longest piece that it takes."""
        return self.layout.entries[0].nbytes

    def end(self) -> None:
        """Let go of the slot, if that has not been done."""
        if not self.over:
            self.over = True
            self.slot.close()


class Parities:
    """Takes pieces in; from any thread."""

    def __init__(
        self,
        shelf: Shelf,
        kept: Callable[[], Key | None],
        added: Callable[[int], None],
        useless: Callable[[int], None],
        completed: Callable[[], None],
        wanted: Callable[[str], bool],
    ) -> None:
        """Args:
        shelf: where the parities go.
        kept: the newest state that is kept everywhere, as far as this node knows.
        added: told of each new slot.
        useless: told of each slot that may go.
        completed: told whenever a parity is complete.
        wanted: whether this node makes parities of an owner, or may.
        """
        self._shelf = shelf
        self._kept = kept
        self._added = added
        self._useless = useless
        self._completed = completed
        self._wanted = wanted
        self._turns = Turns()
        self._finding = threading.Lock()
        self._foldings: dict[str, _Folding] = {}
        self._layouts: dict[int, ImageLayout] = {}

    def take(self, wire: Wire, request: Fold) -> None:
        """Answer a `Fold`, and receive what follows, or what is left of it after a transfer that broke.

        Raises:
            LinkLost: if the sender is gone, or sends damaged bytes; what was folded stays for its next connection.
            FormatError: if what it sends is not what it said.
        """
        key, parts = _checked(request)
        size = sum(part.size for part in parts)
        with self._turns.of(request.node, wire):
            if self._is_complete(request, key):
                wire.send(Ready(offset=size))
                wire.send(Stored())
                return
            try:
                folding = self._folding(request, key, size)
            except MemoryRefused as error:
                wire.send(Declined(reason=str(error)))
                return
            if folding is None:
                wire.send(Declined(reason=f"there is no room for a parity of {key}"))
                return
            if folding.complete:
                wire.send(Ready(offset=size))
                wire.send(Stored())
                return
            with folding.lock:
                same = folding.parts.setdefault(request.node, parts) == parts
                upto = folding.upto.setdefault(request.node, 0)
            if not same:
                raise FormatError(f"{request.node} has folded another piece of {key}")
            yield_to_others()
            wire.send(Ready(offset=upto))
            self._receive(wire, request, folding, size)
            wire.send(Stored())

    def let_go(self) -> None:
        """End what was begun for a group that this node is not in any more: nobody may come to end it.

        Never waits: what is busy is looked at the next time.
        """
        if self._finding.acquire(blocking=False):
            try:
                self._drop_former()
            finally:
                self._finding.release()

    def _receive(self, wire: Wire, request: Fold, folding: _Folding, size: int) -> None:
        """Fold what arrives, block by block."""
        buffer, node = np.empty(BLOCK, dtype=np.uint8), request.node
        while (at := folding.upto[node]) < size:
            block = buffer.data[: min(BLOCK, size - at)]
            wire.fill([block])
            if checksum(block) != request.sums[at // BLOCK]:
                # What stands behind it cannot be told from messages; a new connection goes on from here.
                raise LinkLost(f"what arrived of {node}'s piece of {folding.key} fails its checksums")
            with folding.lock:
                if folding.over:
                    raise LinkLost(f"the parity of {folding.key} is not wanted any more")
                start = folding.layout.starts[0]
                engine.xor_into(folding.slot.address + start + at, buffer.ctypes.data, len(block))
                folding.upto[node] = at + len(block)
        with folding.lock:
            if folding.over and not folding.complete:
                raise LinkLost(f"the parity of {folding.key} is not wanted any more")
            if not folding.over and self._everything_is_in(folding):
                _publish(folding)
                self._completed()

    def _everything_is_in(self, folding: _Folding) -> bool:
        sizes = {node: sum(part.size for part in parts) for node, parts in folding.parts.items()}
        return folding.others == sizes.keys() and all(folding.upto.get(node) == size for node, size in sizes.items())

    def _is_complete(self, request: Fold, key: Key) -> bool:
        owner = parity_owner(request.others)
        return any(self._shelf.owner(number) == owner and key == of for number, of in self._shelf.keys().items())

    def _folding(self, request: Fold, key: Key, size: int) -> _Folding | None:
        """The parity that a piece belongs into; None if there is no room for it, or one of a newer state.

        Raises:
            MemoryRefused: if there is no memory for it.
        """
        owner = parity_owner(request.others)
        with self._finding:
            self._drop_former()
            folding = self._foldings.get(owner)
            if folding is not None:
                same = (folding.key, folding.world) == (key, request.world)
                with folding.lock:
                    if same and folding.complete and folding.number in self._shelf:
                        return folding  # Only just, and by somebody else's piece.
                    going_on = not folding.over
                    if going_on and not same and folding.key < key:
                        folding.end()
                if going_on and same:
                    return self._with_room(folding, owner, size)
                if going_on and not same and folding.key >= key:
                    return None
            room = self._room(owner, size, _to_keep(request, self._kept()))
            if room is None:
                return None
            number, slot = room
            layout = self._layouts[number]
            self._foldings[owner] = _Folding(
                key=key,
                world=request.world,
                others=frozenset(request.others),
                number=number,
                slot=slot,
                layout=layout,
            )
            engine.retract(slot.address)
            slot.populate()
            np.frombuffer(slot.map, dtype=np.uint8)[layout.starts[0] : layout.json_start] = 0
            return self._foldings[owner]

    def _drop_former(self) -> None:
        """What was begun for another group is not going to be complete."""
        for owner in [owner for owner in self._foldings if not self._wanted(owner)]:
            folding = self._foldings.pop(owner)
            with folding.lock:
                if not folding.over:
                    self._let_go(folding.number)
                folding.end()

    def _room(self, owner: str, size: int, keep: Key | None) -> tuple[int, Slot] | None:
        """A slot, locked against readers; None if all hold what must stay."""
        taken = 0
        for number in [number for number, name in self._shelf.owners().items() if name == owner]:
            slot = self._shelf.open(number)
            if slot is None:
                continue
            stamp = slot.stamp()
            free = (stamp is None or stamp.key != keep) and slot.try_lock(exclusive=True)
            if free and number in self._layouts and self._layouts[number].entries[0].nbytes >= size:
                return number, slot
            slot.close()
            if free:
                self._let_go(number)
            else:
                taken += 1
        return None if taken >= _PER_GROUP else self._made(owner, size)

    def _made(self, owner: str, size: int) -> tuple[int, Slot]:
        shape = (size,)
        entry = Entry(name=NAME, dtype="U8", shape=shape, global_shape=shape, offset=(0,))
        layout = plan_image([entry], _ROOM_FOR_JSON)
        number, slot = self._shelf.make(owner, layout.total, owner)
        self._layouts[number] = layout
        self._added(number)
        return number, slot

    def _let_go(self, number: int) -> None:
        self._layouts.pop(number, None)
        self._useless(number)

    def _with_room(self, folding: _Folding, owner: str, size: int) -> _Folding:
        """The same parity, in another slot if a longer piece has come."""
        if folding.room >= size:
            return folding
        number, slot = self._made(owner, size)
        with folding.lock:
            before, after = folding.layout, self._layouts[number]
            size = before.entries[0].nbytes
            data = np.frombuffer(folding.slot.map, dtype=np.uint8, count=size, offset=before.starts[0])
            np.frombuffer(slot.map, dtype=np.uint8, count=size, offset=after.starts[0])[:] = data
            del data
            folding.slot.close()
            self._let_go(folding.number)
            folding.number, folding.slot, folding.layout = number, slot, after
        return folding


def _checked(request: Fold) -> tuple[Key, tuple[Part, ...]]:
    """The state of a piece and what is in it.

    Raises:
        FormatError: if it is nonsense.
    """
    key, parts, others = key_or_none([request.lineage, request.step]), parts_from(request.parts), request.others
    if not (isinstance(others, list) and len(others) < MOST_NODES and all(isinstance(name, str) for name in others)):
        raise FormatError(f"{others!r:.100} are no nodes of one group")
    if key is None or request.node not in others or type(request.world) is not int or request.world < 1:
        raise FormatError(f"{request!r:.300} announces no piece of a state")
    blocks = -(-sum(part.size for part in parts) // BLOCK)
    if not (isinstance(request.sums, list) and len(request.sums) == blocks):
        raise FormatError(f"{len(request.sums)} checksums for {blocks} blocks")
    return key, parts


def _to_keep(request: Fold, kept: Key | None) -> Key | None:
    """The state whose parity must stay: the sender may know of a newer one than this node has heard of."""
    told = key_or_none(request.keep)
    return max((key for key in (told, kept) if key is not None), default=None)


def _publish(folding: _Folding) -> None:
    """Complete the image around the folded bytes."""
    document = json.dumps(Parity(pieces=folding.parts).to_json(), separators=(",", ":")).encode()
    slot, layout = folding.slot, folding.layout
    if len(document) > layout.json_capacity:
        raise FormatError(f"{len(document)} bytes describe the parity; there is room for {layout.json_capacity}")
    slot.map[8 : layout.data_start] = layout.header[8:]
    slot.map[layout.json_start : layout.crc_start] = document.ljust(layout.json_capacity)
    sum_blocks(slot, layout)
    publish(slot, layout, Stamp(key=folding.key, rank=0, world=folding.world, json_length=len(document), crc=0))
    folding.complete = True
    folding.end()
