"""One thread's events: descriptors that become readable, times that come, and what other threads ask for."""

from __future__ import annotations

import heapq
import itertools
import os
import queue
import selectors
from collections.abc import Callable

from resilient_train.clock import Clock


class Loop:
    """Runs one thing after the other."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.selector = selectors.DefaultSelector()
        """its keys' data are called when they are ready"""
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count()
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.selector.register(self._wake_read, selectors.EVENT_READ, self._drain)

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Have something done at a time of the clock."""
        heapq.heappush(self._timers, (when, next(self._counter), action))

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something done now and every so many seconds."""

        def again() -> None:
            action()
            self.at(self.clock.now() + seconds, again)

        again()

    def post(self, action: Callable[[], None]) -> None:
        """From any thread, or a signal handler: have something done on the loop's."""
        self._posted.put(action)
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            # Enough bytes are waiting to wake it.
            return

    def once(self, most: float | None = None) -> None:
        """Wait for the next thing to do, ``most`` seconds at the most, and do it."""
        now = self.clock.now()
        timeout = max(0.0, self._timers[0][0] - now) if self._timers else None
        if most is not None:
            timeout = most if timeout is None else min(timeout, most)
        for key, _ in self.selector.select(timeout):
            key.data()
        now = self.clock.now()
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for action in due:
            action()

    def _drain(self) -> None:
        os.read(self._wake_read, 4096)
        while not self._posted.empty():
            self._posted.get()()
