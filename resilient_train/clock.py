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
