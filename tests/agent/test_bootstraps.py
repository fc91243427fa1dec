"""A fresh store for the next generation never holds up the agent's loop, and an error is no end of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from resilient_train.agent.bootstraps import Bootstraps
from resilient_train.errors import StoreLost


def test_it_is_made_elsewhere_and_tried_again() -> None:
    """``renew`` returns while the server is slow; an error is said once and the next attempt counts."""
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    go = threading.Event()
    attempts: list[int] = []
    ready: list[str] = []
    said: list[str] = []

    def serve() -> str:
        assert go.wait(30)
        attempts.append(threading.get_ident())
        if len(attempts) == 1:
            raise StoreLost("no port")
        return "host:1"

    made = Bootstraps(serve, posted.put, ready.append, said.append)
    made.renew()
    made.renew()
    go.set()
    while not ready:
        posted.get(timeout=30)()
    assert ready == ["host:1"]
    assert said == ["no port; it is tried again"]
    assert threading.get_ident() not in attempts
    made.renew()
    posted.get(timeout=30)()
    assert ready == ["host:1"] * 2
