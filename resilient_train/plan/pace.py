"""How fast to go where a bandwidth is agreed."""

from __future__ import annotations


class Pace:
    """Bytes at a steady rate: says how long to wait before the next ones.

    What was not used while nothing was sent is lost, so that a pause is not followed by a burst.
    """

    def __init__(self, rate: float) -> None:
        """Args:
        rate: bytes per second; 0 for as fast as possible.
        """
        self._rate = rate
        self._free = 0.0

    def delay(self, now: float, nbytes: int) -> float:
        """Seconds to wait before ``nbytes`` more are sent.

        Args:
            now: seconds on a monotonic clock.
            nbytes: how many.
        """
        if not self._rate:
            return 0.0
        begin = max(now, self._free)
        self._free = begin + nbytes / self._rate
        return begin - now
