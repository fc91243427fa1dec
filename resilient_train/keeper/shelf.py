"""The images that a keeper holds: its slots, from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from resilient_train.errors import FormatError
from resilient_train.image.arena import Slot, create_memory, touch
from resilient_train.spec import jsontree
from resilient_train.spec.parity import Parity
from resilient_train.spec.shard import Stamp, header_size, parse_header
from resilient_train.spec.world import Key, node_of
from resilient_train.storage.peer import HeldParity

_REPLICA = "replica of "
_PARITY = "parity of "


def replica_owner(source: str) -> str:
    """The owner of slots that hold copies of another node's images; ``source`` is node/slot."""
    return _REPLICA + source


def source_of(owner: str) -> str:
    """Whose copies an owner's slots hold, as node/slot; empty for a worker."""
    return owner.removeprefix(_REPLICA) if owner.startswith(_REPLICA) else ""


def parity_owner(nodes: Collection[str]) -> str:
    """The owner of slots that hold parities of these nodes' images."""
    return _PARITY + " + ".join(sorted(nodes))


def is_parity(owner: str) -> bool:
    """Whether an owner's slots hold parities."""
    return owner.startswith(_PARITY)


def origin_of(owner: str) -> str:
    """The node whose rank wrote the images in an owner's slots."""
    return node_of(source_of(owner) or owner)


@dataclass
class Kept:
    """A slot this keeper holds."""

    memory: Slot
    """Its memory, through an open whose file lock says that the image is being made durable."""
    owner: str
    """The worker that writes to it, `replica_owner` or `parity_owner`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A published image in a slot."""

    slot: int
    """The keeper's id of the slot."""
    owner: str
    """Who wrote it."""
    stamp: Stamp
    """Which image it is."""
    size: int
    """Bytes."""

    def row(self) -> list[int]:
        """As messages have it."""
        key = self.stamp.key
        replica = int(bool(source_of(self.owner)))
        return [self.slot, key.lineage, key.step, self.stamp.rank, self.stamp.world, self.size, replica]


class Shelf:
    """Slots by number.

    Only the keeper's loop removes slots and uses their file locks; other threads open a slot for themselves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[int, Kept] = {}
        self._next = 1

    def add(self, descriptor: int, owner: str, number: int | None = None) -> int:
        """Hold the memory behind ``descriptor``, which stays the caller's; the slot's number."""
        with self._lock:
            if number is None:
                number = self._next
            self._next = max(self._next, number + 1)
            self._slots[number] = Kept(Slot(descriptor), owner)
            return number

    def make(self, name: str, size: int, owner: str) -> tuple[int, Slot]:
        """A new slot of so many bytes, locked against readers: (its number, its memory for the caller to close).

        Raises:
            MemoryRefused: if there is not as much memory.
        """
        descriptor = create_memory(name, size)
        try:
            touch(descriptor)
            number = self.add(descriptor, owner)
            memory = Slot(descriptor)
        finally:
            os.close(descriptor)
        memory.try_lock(exclusive=True)
        return number, memory

    def remove(self, number: int) -> bool:
        """Let go of a slot; whether it was there."""
        with self._lock:
            kept = self._slots.pop(number, None)
            if kept is not None:
                kept.memory.close()
            return kept is not None

    def __contains__(self, number: int) -> bool:
        with self._lock:
            return number in self._slots

    def __getitem__(self, number: int) -> Kept:
        with self._lock:
            return self._slots[number]

    def owner(self, number: int) -> str:
        """The owner of a slot; empty if it is gone."""
        with self._lock:
            kept = self._slots.get(number)
            return kept.owner if kept is not None else ""

    def owners(self) -> dict[int, str]:
        """The owner of every slot."""
        with self._lock:
            return {number: kept.owner for number, kept in self._slots.items()}

    def images(self) -> list[Listed]:
        """Every published image."""
        return [listed for listed in self._published() if not is_parity(listed.owner)]

    def _published(self) -> list[Listed]:
        with self._lock:
            found = [(number, kept, kept.memory.stamp()) for number, kept in self._slots.items()]
            return [
                Listed(slot=number, owner=kept.owner, stamp=stamp, size=kept.memory.size)
                for number, kept, stamp in found
                if stamp is not None
            ]

    def keys(self) -> dict[int, Key]:
        """The state of which each slot holds something, an image or a parity, that is published."""
        return {listed.slot: listed.stamp.key for listed in self._published()}

    def has_parities(self) -> bool:
        """Whether there is room for any, at least."""
        return any(map(is_parity, self.owners().values()))

    def parities(self) -> list[HeldParity]:
        """Every published parity; one that is damaged is not listed."""
        found = []
        for listed in self._published():
            if is_parity(listed.owner):
                with self.reading(listed.slot, listed.stamp.key) as view, suppress(FormatError):
                    if view is not None:
                        found.append(_parity_in(listed, view))
        return found

    def rows(self) -> list[list[int]]:
        """The same as messages have it."""
        return [image.row() for image in self.images()]

    def open(self, number: int) -> Slot | None:
        """A slot's memory through an open and a mapping of the caller's own; None if there is no such slot."""
        with self._lock:
            kept = self._slots.get(number)
            return Slot(kept.memory.fd) if kept is not None else None

    def locked(self, number: int) -> bool:
        """Whether somebody reads or writes a slot right now."""
        memory = self.open(number)
        if memory is None:
            return False
        free = memory.try_lock(exclusive=True)
        memory.close()
        return not free

    @contextmanager
    def reading(self, number: int, key: Key) -> Iterator[memoryview | None]:
        """The bytes of the image of ``key`` in a slot, safe from its writer; None if it is not there."""
        memory = self.open(number)
        if memory is None:
            yield None
            return
        try:
            with memory.reading(key) as view:
                try:
                    yield view
                finally:
                    if view is not None:
                        view.release()
        finally:
            memory.close()


def _parity_in(listed: Listed, view: memoryview) -> HeldParity:
    layout, stamp = parse_header(view[: header_size(view[:8])], len(view))
    document = jsontree.parse(bytes(view[layout.json_start : layout.json_start + stamp.json_length]))
    return HeldParity(slot=listed.slot, key=stamp.key, begin=layout.starts[0], parity=Parity.from_json(document))
