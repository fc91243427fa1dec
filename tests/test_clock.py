"""One alarm for many wishes."""

from __future__ import annotations

from collections.abc import Callable

from resilient_train.clock import Alarm


class Timers:
    """Time by hand, and an alarm that is set again whenever it rings, as machines do that look what is left to do."""

    def __init__(self, *again: float) -> None:
        self.now = 0.0
        self.waiting: list[tuple[float, Callable[[], None]]] = []
        self.rung: list[float] = []
        self._again = again
        self.alarm = Alarm(lambda when, act: self.waiting.append((when, act)), self._ring)

    def _ring(self) -> None:
        self.rung.append(self.now)
        for seconds in self._again:
            self.alarm.set(self.now + seconds)

    def run_to(self, end: float) -> None:
        while due := [pair for pair in self.waiting if pair[0] <= end]:
            first = min(due, key=lambda pair: pair[0])
            self.waiting.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end


def test_it_rings_once_at_the_earliest_time() -> None:
    """Later wishes are forgotten: whoever is woken says anew what it waits for."""
    timers = Timers()
    for when in (5.0, 3.0, 4.0, 3.0):
        timers.alarm.set(when)
    timers.run_to(10.0)
    assert timers.rung == [3.0]
    timers.alarm.set(12.0)
    timers.run_to(20.0)
    assert timers.rung == [3.0, 12.0]


def test_wishes_do_not_multiply() -> None:
    """Three wishes at each ring are one timer, and not three chains of them."""
    timers = Timers(1.0, 1.0, 2.0)
    timers.alarm.set(0.0)
    timers.run_to(1000.0)
    assert len(timers.rung) == 1001
    assert len(timers.waiting) == 1
