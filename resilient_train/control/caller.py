"""Calls of a client that may wait for ever: made by a thread of their own, so that whoever asks need not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class Caller:
    """Makes one call after the other.  What waits behind a call that got stuck is not made once nobody waits for it."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        # A daemon, as a stuck call must not keep the process alive.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, call: Callable[[], _T], timeout: float) -> _T:
        """What ``call`` returns, or raises.

        Raises:
            TimeoutError: if that takes more than ``timeout`` seconds; the call may succeed later.
        """
        future: Future[_T] = Future()
        self._calls.put((call, future))
        try:
            return future.result(timeout)
        except (TimeoutError, CancelledError):
            future.cancel()
            raise TimeoutError from None

    def close(self) -> None:
        """No more calls."""
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
