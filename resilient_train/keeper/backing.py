"""Memory for images, made on a thread of its own: a gigabyte of fresh pages takes the kernel a second or more.

A worker asks for its slots one by one, at its first snapshots, and waits for each.  So the later ones are made while it
works with the first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from resilient_train.errors import MemoryRefused
from resilient_train.image.arena import create_memory, touch


@dataclass(frozen=True, slots=True, kw_only=True)
class Backed:
    """What became of an order."""

    member: str
    """Whose."""
    descriptor: int
    """The memory's, now the receiver's; -1 if there is none."""
    error: str
    """Why there is none."""


class Backing:
    """Orders for slots, carried out one after the other."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """Args:
        wake: called from the thread when `finished` has something.
        """
        self._wake = wake
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "backing")
        self._waiting: list[tuple[str, int]] = []
        self._making: list[tuple[str, int]] = []
        self._spare: list[tuple[str, int, int]] = []
        self._finished: list[Backed] = []
        self._gone: set[str] = set()

    def order(self, member: str, size: int, ahead: int) -> None:
        """Make a slot.

        Args:
            member: for whom.
            size: bytes.
            ahead: how many more of the same to have ready then.
        """
        with self._lock:
            self._gone.discard(member)
            self._drop_spares(lambda owner, length: owner == member and length != size)
            spare = next((item for item in self._spare if item[:2] == (member, size)), None)
            if spare is not None:
                self._spare.remove(spare)
                self._finished.append(Backed(member=member, descriptor=spare[2], error=""))
                self._wake()
            else:
                self._waiting.append((member, size))
            pair = (member, size)
            wanted = self._waiting.count(pair) + ahead
            have = self._making.count(pair) + sum(item[:2] == pair for item in self._spare)
            for _ in range(wanted - have):
                self._making.append(pair)
                self._pool.submit(self._make, member, size)

    def forget(self, member: str) -> None:
        """It will not ask for more."""
        with self._lock:
            self._gone.add(member)
            self._waiting = [pair for pair in self._waiting if pair[0] != member]
            self._drop_spares(lambda owner, _: owner == member)

    def finished(self) -> list[Backed]:
        """What is done and was not taken before."""
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def _drop_spares(self, which: Callable[[str, int], bool]) -> None:
        for item in [item for item in self._spare if which(*item[:2])]:
            self._spare.remove(item)
            os.close(item[2])

    def _make(self, member: str, size: int) -> None:
        descriptor, error = -1, ""
        try:
            descriptor = create_memory(f"image of {member}", size)
            touch(descriptor)
        except (MemoryRefused, OSError) as refused:
            error = str(refused)
            if descriptor >= 0:
                os.close(descriptor)
                descriptor = -1
        pair = (member, size)
        with self._lock:
            self._making.remove(pair)
            if pair in self._waiting:
                self._waiting.remove(pair)
                self._finished.append(Backed(member=member, descriptor=descriptor, error=error))
                self._wake()
            elif descriptor >= 0 and member not in self._gone:
                self._spare.append((member, size, descriptor))
            elif descriptor >= 0:
                os.close(descriptor)
