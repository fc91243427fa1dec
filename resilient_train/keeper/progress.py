"""How far persisting is: counted by the threads that write, read by the keeper's loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from resilient_train.plan.pace import Pace
from resilient_train.spec.world import Key


class Progress:
    """One state on its way to storage, at the pace that is agreed for the node."""

    def __init__(
        self,
        key: Key,
        rate: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Args:
        key: the state.
        rate: bytes per second; 0 for as fast as possible.
        now: a monotonic clock.
        sleep: waits for a number of seconds.
        """
        self.key = key
        self._pace = Pace(rate)
        self._now = now
        self._sleep = sleep
        self._lock = threading.Lock()
        self._began = now()
        self._total = 0
        self._done = 0

    def expect(self, nbytes: int) -> None:
        """Say how much there is to write."""
        with self._lock:
            self._total = nbytes

    def paced(self, chunks: Iterable[memoryview]) -> Iterable[memoryview]:
        """The chunks of one file, handed out at the agreed pace; as often as they are asked for."""
        return _Paced(self, chunks)

    def take(self, nbytes: int) -> None:
        """Wait for the turn of ``nbytes`` more, and count them."""
        with self._lock:
            delay = self._pace.delay(self._now(), nbytes)
        if delay:
            self._sleep(delay)
        with self._lock:
            self._done += nbytes

    def give_back(self, nbytes: int) -> None:
        """What was counted has to be written once more."""
        with self._lock:
            self._done -= nbytes

    def __str__(self) -> str:
        with self._lock:
            done, total, seconds = self._done, self._total, self._now() - self._began
        if not done or not seconds:
            return f"writing {self.key}: {total:,} bytes to go"
        rate = done / seconds
        left = max(0, total - done) / rate
        return f"writing {self.key}: {done / total:.0%} of {total:,} bytes, {rate / 1e6:.0f} MB/s, {left:.0f} s to go"


class _Paced:
    def __init__(self, progress: Progress, chunks: Iterable[memoryview]) -> None:
        self._progress = progress
        self._chunks = chunks
        self._taken = 0

    def __iter__(self) -> Iterator[memoryview]:
        # Whoever begins anew is trying again.
        self._progress.give_back(self._taken)
        self._taken = 0
        for chunk in self._chunks:
            self._progress.take(len(chunk))
            self._taken += len(chunk)
            yield chunk
