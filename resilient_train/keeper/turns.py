"""One transfer at a time from one source."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from resilient_train.errors import LinkLost
from resilient_train.storage.wire import Wire

_LET_GO = 5.0
"""Seconds for a transfer whose sender has hung up to end."""


class Turns:
    """Who comes again has lost the connection before, whatever is heard of that here."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sending: dict[str, Wire] = {}

    @contextmanager
    def of(self, source: str, wire: Wire) -> Iterator[None]:
        """The turn of a source, once its transfer before has ended.

        Raises:
            LinkLost: if that does not end.
        """
        with self._changed:
            before = self._sending.get(source)
            if before is not None:
                before.hang_up()
                if not self._changed.wait_for(lambda: source not in self._sending, _LET_GO):
                    raise LinkLost(f"an earlier transfer of {source} does not end")
            self._sending[source] = wire
        try:
            yield
        finally:
            with self._changed:
                del self._sending[source]
                self._changed.notify_all()
