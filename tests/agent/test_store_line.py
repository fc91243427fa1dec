"""The line to the store outlives every error of the store."""

from __future__ import annotations

import queue
import threading
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


def test_what_waits_under_a_name_is_replaced_by_the_newest() -> None:
    """While a store is silent nothing piles up; what it hears then is what is right by then, in its turn."""
    server = serve("127.0.0.1", 0)
    bench = Bench(TcpControlStore("127.0.0.1", server.port, "job"))
    go = threading.Event()
    made: list[str] = []
    answers: list[str] = []
    bench.line.ask(lambda store: go.wait(), None, "swap")
    for number in range(100):
        bench.line.ask(lambda store, number=number: made.append(f"swap {number}") or made[-1], answers.append, "swap")
        bench.line.ask(lambda store, number=number: made.append(f"beat {number}") or made[-1], answers.append, "beat")
    bench.line.ask(lambda store: "last", answers.append)
    go.set()
    bench.until(lambda: "last" in answers)
    assert made == ["swap 99", "beat 99"]
    assert answers == [*made, "last"]
    bench.line.close(30.0)
