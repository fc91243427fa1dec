"""The agent's line to the control store: calls and the watch, each on a thread of its own, answers on the agent's."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resilient_train.control.store import ControlStore, News
from resilient_train.errors import ResilientError, StoreLost

_WATCH = 3600.0
"""Seconds after which a watch is asked anew."""
_RETRY = 0.5
"""Seconds before a store that did not answer is asked again."""


@dataclass(slots=True)
class _Call:
    """What the store is to be asked."""

    name: str
    """Under which another may take its place; empty for none."""
    call: Callable[[ControlStore], Any]
    then: Callable[[Any], None] | None


class StoreLine:
    """Store calls that never hold up the agent.

    Whatever a store raises counts as silence, a user whose rights were taken away too: the job goes on without it.
    What no store should raise is no reason to be deaf for ever.
    """

    def __init__(
        self,
        store: ControlStore,
        post: Callable[[Callable[[], None]], None],
        silent: Callable[[ResilientError], None],
    ) -> None:
        """Args:
        store: where to ask.
        post: has an action run on the agent's thread.
        silent: told, there, why a call was not answered.
        """
        self.lasting = store.lasting
        self._store = store
        self._post = post
        self._silent = silent
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting: dict[str, _Call] = {}
        """By their names the calls that have not begun."""
        self._naming = threading.Lock()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._make_calls, name="control store", daemon=True)]
        self._threads[0].start()

    def ask(
        self, call: Callable[[ControlStore], Any], then: Callable[[Any], None] | None = None, name: str = ""
    ) -> None:
        """Make a call, after those that were asked for before, and hand what it returned to ``then``.

        One that waits under the same ``name`` is not made any more: this one takes its place.  While a store is silent
        nothing piles up, and what it hears first then is not what was right when it fell silent.
        """
        with self._naming:
            waiting = self._waiting.get(name)
            if waiting is not None:
                waiting.call, waiting.then = call, then
                return
            wanted = _Call(name, call, then)
            if name:
                self._waiting[name] = wanted
        self._calls.put(wanted)

    def listen(self, heard: Callable[[News], None]) -> None:
        """Have ``heard`` called with the news, now and whenever something changes."""

        def first(news: News) -> None:
            heard(news)
            self._threads.append(
                threading.Thread(target=self._watch, args=(news.number, heard), name="news", daemon=True)
            )
            self._threads[-1].start()

        def look(store: ControlStore) -> News:
            # Whoever came while the store was out would stay deaf for ever.
            while not self._closed.is_set():
                try:
                    return store.look()
                except Exception as error:
                    self._complain(error)
                    self._closed.wait(_RETRY)
            raise StoreLost("this line is closed")

        self.ask(look, first)

    def close(self, timeout: float) -> None:
        """No more calls; waits up to ``timeout`` seconds for those that were asked for."""
        self._closed.set()
        self.ask(lambda store: store.close())
        self._calls.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _complain(self, error: Exception) -> None:
        known = error if isinstance(error, ResilientError) else StoreLost(f"the store: {type(error).__name__}: {error}")
        self._post(functools.partial(self._silent, known))

    def _make_calls(self) -> None:
        while (wanted := self._calls.get()) is not None:
            with self._naming:
                self._waiting.pop(wanted.name, None)
                call, then = wanted.call, wanted.then
            try:
                result = call(self._store)
            except Exception as error:
                self._complain(error)
                continue
            if then is not None:
                self._post(functools.partial(then, result))

    def _watch(self, number: int, heard: Callable[[News], None]) -> None:
        while not self._closed.is_set():
            try:
                news = self._store.watch(number, _WATCH)
            except Exception as error:
                self._complain(error)
                self._closed.wait(_RETRY)
                continue
            if news is not None:
                number = news.number
                self._post(functools.partial(heard, news))
