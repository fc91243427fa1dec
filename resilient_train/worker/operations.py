"""Long operations that a rank announces, so that nobody takes it for hanging meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

from resilient_train.errors import ConfigError, LinkLost
from resilient_train.spec.messages import Busy


class LongOperations:
    """What this rank has announced; from any thread."""

    def __init__(self, tell: Callable[[Busy], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._current: dict[int, tuple[str, float]] = {}

    @contextlib.contextmanager
    def announce(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Announce an operation for as long as the context is open.

        Args:
            name: what it is, for people.
            seconds: what it may take at most; None for any time.
        """
        check(name, seconds)
        number = next(self._numbers)
        with self._lock:
            self._current[number] = (name, float("inf") if seconds is None else time.monotonic() + seconds)
            self._say()
        try:
            yield
        finally:
            with self._lock:
                del self._current[number]
                with contextlib.suppress(LinkLost):  # Whoever waits for the agent next hears of it.
                    self._say()

    def _say(self) -> None:
        """Tell the agent of the innermost operation, and of the strictest bound."""
        if not self._current:
            self._tell(Busy(name=""))
            return
        name = self._current[max(self._current)][0]
        until = min(end for _, end in self._current.values())
        left = 0.0 if until == float("inf") else max(1e-3, until - time.monotonic())
        self._tell(Busy(name=name, seconds=left))


def check(name: str, seconds: float | None) -> None:
    """Raises:
    ConfigError: unless an operation has a name, and a bound that is a positive number.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a long operation needs a name, it got {name!r}")
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 < seconds < float("inf")):
        raise ConfigError(f"a long operation takes a positive number of seconds, it got {seconds!r}")
