"""What a keeper may do with what is durable, when it is not known whether its world is still the job's."""

from __future__ import annotations

from collections.abc import Callable

from resilient_train.clock import Clock, MonotonicClock


def _always() -> float:
    return float("inf")


class Word:
    """The store's word that this node's world is the current one; asked from any thread.

    Another world may have taken over and resumed from a state that is durable already, which must not be removed.
    """

    def __init__(self, until: Callable[[], float] = _always, clock: Clock | None = None) -> None:
        """Args:
        until: until when it holds, on ``clock``.
        clock: the node's.
        """
        self._until = until
        self._clock = clock or MonotonicClock()
        self.last = False
        """Nothing follows what is saved now, and nobody waits for the store any more."""

    def holds(self) -> bool:
        """Whether what is superseded may be removed."""
        return self._clock.now() < self._until()

    def may_commit(self) -> bool:
        """Whether a state may be said to be durable: its key tells it from any other world's, so the last one may."""
        return self.last or self.holds()
