"""The line to the store outlives every error of the store."""

from __future__ import annotations

import queue
from collections.abc import Callable

import pytest

from resilient_train.agent.store_line import StoreLine
from resilient_train.control.store import ControlStore, News
from resilient_train.control.tcp import TcpControlStore, serve
from resilient_train.errors import ConfigError, FormatError, ResilientError, StoreLost


class Bench:
    """A line whose answers are taken in when the test asks for them."""

    def __init__(self, store: ControlStore) -> None:
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.said: list[ResilientError] = []
        self.line = StoreLine(store, self.posted.put, self.said.append)

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.posted.get(timeout=30)()


ERRORS = [ConfigError("no rights"), FormatError("no JSON"), StoreLost("no answer"), ValueError("a closed channel")]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_silence(error: Exception) -> None:
    """It is told, the calls behind it are made, and the watch begins when the store answers again."""
    server = serve("127.0.0.1", 0)
    store = TcpControlStore("127.0.0.1", server.port, "job")
    bench = Bench(store)
    answers: list[object] = []
    news: list[News] = []

    def fail(store: ControlStore) -> None:
        raise error

    bench.line.ask(fail, answers.append)
    bench.line.ask(lambda store: store.join(), answers.append)
    bench.until(lambda: answers)
    (said,) = bench.said
    assert said is error or (isinstance(said, StoreLost) and "ValueError: a closed channel" in str(said))
    assert answers == [0]
    bench.line.listen(news.append)
    bench.until(lambda: news)
    bench.line.close(30.0)
