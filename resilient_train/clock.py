"""Time as an argument: decisions get ``now`` passed in, edges ask a ``Clock``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
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


class Alarm:
    """One timer for many wishes: it rings at the earliest of the times that were set since it last rang."""

    def __init__(self, at: Callable[[float, Callable[[], None]], None], ring: Callable[[], None]) -> None:
        """Args:
        at: has something called at a time.
        ring: what to do then; whatever is to follow later has to be set anew.
        """
        self._at = at
        self._ring = ring
        self._when = math.inf

    def set(self, when: float) -> None:
        """Ring at this time, if not before."""
        if when < self._when:
            self._when = when
            self._at(when, lambda: self._due(when))

    def _due(self, when: float) -> None:
        if when == self._when:  # Else an earlier time was set.
            self._when = math.inf
            self._ring()
