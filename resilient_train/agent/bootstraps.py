"""The next generation's TCPStore, made on a thread: serving one looks up names, which may take longer than a beat."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

from resilient_train.errors import StoreLost

_RETRY = 1.0
"""Seconds before it is tried again, where none could be served."""


class Bootstraps:
    """Fresh stores, one at a time."""

    def __init__(
        self,
        serve: Callable[[], str],
        post: Callable[[Callable[[], None]], None],
        ready: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        """Args:
        serve: serves a fresh TCPStore and returns its host:port.
        post: has an action run on the agent's thread.
        ready: told there of a fresh one.
        say: prints a line for people, there too.
        """
        self._serve = serve
        self._post = post
        self._ready = ready
        self._say = say
        self._making = False

    def renew(self) -> None:
        """Have a fresh one made, unless that is under way; called on the agent's thread."""
        if not self._making:
            self._making = True
            threading.Thread(target=self._make, name="bootstrap", daemon=True).start()

    def _make(self) -> None:
        said = False
        while True:
            try:
                endpoint = self._serve()
            except StoreLost as error:
                if not said:
                    self._post(functools.partial(self._say, f"{error}; it is tried again"))
                said = True
                time.sleep(_RETRY)
                continue
            self._post(functools.partial(self._made, endpoint))
            return

    def _made(self, endpoint: str) -> None:
        self._making = False
        self._ready(endpoint)
