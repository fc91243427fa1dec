"""This worker's image slots: which may be overwritten now."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from resilient_train.errors import LinkLost, MemoryRefused
from resilient_train.image.arena import SLOTS, Slot
from resilient_train.spec.world import Key, in_ancestry
from resilient_train.worker.keeper_link import KeeperLink

logger = logging.getLogger(__name__)


@dataclass
class OwnSlot:
    """A slot and what it holds."""

    number: int
    """The keeper's id of it."""
    memory: Slot
    """The memory."""
    key: Key | None = None
    """The state whose image it holds, None while it holds none."""
    held: bool = False
    """Handed over to be persisted."""


class Slots:
    """The slots of one worker process; they live on when the world changes."""

    def __init__(self, keeper: KeeperLink) -> None:
        self._keeper = keeper
        self._slots: list[OwnSlot] = []
        self._refused = False
        """There is no memory for more than the slots that it cannot do without."""

    def writable(self, size: int, safe: Key | None, past: Mapping[int, int | None]) -> Iterator[OwnSlot]:
        """Slots of ``size`` bytes that may be overwritten, best first and locked; a new one if there are too few.

        Args:
            size: bytes of the image.
            safe: the newest state that *all* ranks have published; what is older may go.
            past: the job's ancestry; what is not of it may go too.

        Raises:
            MemoryRefused: if a new slot is needed and there is no memory.
        """
        protected = self._keeper.board.protected()

        def free(slot: OwnSlot) -> bool:
            return _free(slot, safe, past, protected)

        for slot in [slot for slot in self._slots if slot.memory.size != size and free(slot)]:
            self._slots.remove(slot)
            slot.memory.close()
            self._keeper.discard(slot.number)
        fitting = [slot for slot in self._slots if slot.memory.size == size]
        for slot in sorted((slot for slot in fitting if free(slot)), key=lambda s: s.key or Key(0, 0)):
            if slot.memory.try_lock(exclusive=True):
                # Its state may have been named to be copied just now; whoever copies it looks at the lock after that.
                if _free(slot, safe, past, self._keeper.board.protected()):
                    yield slot
                else:
                    slot.memory.unlock()
        copied = 1 if protected else 0
        if not fitting:
            needed = ((SLOTS + copied) * size, (SLOTS + copied + 1) * size)
            logger.info("snapshots of %d bytes: %d bytes of shared memory, %d while one is written", size, *needed)
        necessary = SLOTS + any(slot.held for slot in fitting)
        kept = sum(slot.key in protected and not slot.held for slot in fitting)
        if len(fitting) < necessary or (len(fitting) < necessary + kept and not self._refused):
            try:
                number, memory = self._keeper.allocate(size, max(0, SLOTS + copied - len(fitting) - 1))
            except MemoryRefused as error:
                if len(fitting) < necessary:
                    raise
                self._refused = True
                logger.warning("snapshots are skipped while copies to other nodes hold slots: %s", error)
                return
            except LinkLost:
                return  # The next keeper has memory again; training does not wait for it.
            slot = OwnSlot(number, memory)
            self._slots.append(slot)
            yield slot

    def one_more(self, size: int) -> OwnSlot | None:
        """A slot beyond those that snapshots take, for a state that is lost without; None if there was one already.

        Raises:
            MemoryRefused: if there is no memory.
        """
        fitting = [slot for slot in self._slots if slot.memory.size == size]
        if len(fitting) > SLOTS + 1 + len(self._keeper.board.protected()):
            return None
        number, memory = self._keeper.allocate(size)
        self._slots.append(OwnSlot(number, memory))
        return self._slots[-1]

    def all(self) -> list[OwnSlot]:
        """Every slot of this worker."""
        return list(self._slots)

    def released(self, key: Key) -> None:
        """The keeper is done with the image of ``key``."""
        for slot in self._slots:
            if slot.key == key:
                slot.held = False

    def close(self) -> None:
        """Unmap all slots; the keeper goes on holding them."""
        for slot in self._slots:
            slot.memory.close()
        self._slots = []

    def release_all(self) -> None:
        """The keeper that held images is gone."""
        for slot in self._slots:
            slot.held = False


def _free(slot: OwnSlot, safe: Key | None, past: Mapping[int, int | None], protected: tuple[Key, ...]) -> bool:
    if slot.held:
        return False
    if slot.key is None or not in_ancestry(slot.key, past):
        return True
    return safe is not None and slot.key < safe and slot.key not in protected
