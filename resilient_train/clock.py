"""Time as an argument: decisions get ``now`` passed in, edges ask a ``Clock``."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic seconds, comparable between all processes of one node."""

    def now(self) -> float:
        """Seconds since an arbitrary fixed instant of this node."""
        ...


class MonotonicClock:
    """The node's CLOCK_MONOTONIC."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to, for tests and the simulator."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds`` (>= 0)."""
        if seconds < 0:
            raise ValueError(f"a clock does not go back (asked for {seconds} s)")
        self._now += seconds
