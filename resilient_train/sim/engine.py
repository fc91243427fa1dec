"""Time that only moves when something happens: a queue of actions, and each node's own idea of the time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

Action = Callable[[], None]


class Engine:
    """Runs actions in the order of their times; those of one time in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the beginning."""
        self.events = 0
        """Actions that were run."""
        self._queue: list[tuple[float, int, Action]] = []
        self._asked = 0

    def at(self, when: float, action: Action) -> None:
        """Run ``action`` at a time, or now if that is over."""
        heapq.heappush(self._queue, (max(when, self.now), self._asked, action))
        self._asked += 1

    def after(self, seconds: float, action: Action) -> None:
        """Run ``action`` so many seconds from now."""
        self.at(self.now + seconds, action)

    def run(self, until: float, over: Callable[[], bool]) -> None:
        """Run what is due, up to ``until``, or for as long as it is not ``over``."""
        while self._queue and self._queue[0][0] <= until and not over():
            self.now, _, action = heapq.heappop(self._queue)
            self.events += 1
            action()


@dataclass(frozen=True, slots=True)
class DriftingClock:
    """A node's clock: it began at another time and runs at another pace than others."""

    engine: Engine
    offset: float
    pace: float

    def now(self) -> float:
        """Seconds on this clock."""
        return self.offset + self.pace * self.engine.now

    def at(self, when: float, action: Action) -> None:
        """Run ``action`` when this clock shows ``when``."""
        self.engine.at((when - self.offset) / self.pace, action)
