"""The newest that a store says, followed by one thread, while another gives signs of life."""

from __future__ import annotations

import threading
from collections.abc import Callable

from resilient_train.clock import Clock
from resilient_train.control.store import ControlStore, News
from resilient_train.errors import ResilientError


class Follower:
    """Keeps the newest news of a store at hand, so that asking for them never blocks."""

    def __init__(self, store: ControlStore, ttl: float, clock: Clock) -> None:
        """Reads once; raises what `ControlStore.look` raises."""
        self._store = store
        self._ttl = ttl
        self._clock = clock
        self._changed = threading.Condition()
        self._news = store.look()
        self._missing: dict[str, float] = {}
        self._doubted_until = 0.0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._follow, self._beat)]
        for thread in self._threads:
            thread.start()

    def news(self) -> News:
        """What the store said last."""
        with self._changed:
            return self._news

    def missing(self) -> dict[str, float]:
        """Seconds since each member of the record's world disappeared that did.

        For a full `ttl` after the store was away itself, nobody counts as missing: those who live come back first.
        """
        now = self._clock.now()
        with self._changed:
            return {node: 0.0 if now < self._doubted_until else now - since for node, since in self._missing.items()}

    def wait(self, number: int, timeout: float) -> None:
        """Wait for news after ``number``, up to ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._news.number > number, max(0.0, timeout))

    def refresh(self) -> None:
        """Ask now, to see what this node itself has changed; raises what `ControlStore.look` raises."""
        self._take(self._store.look())

    def stop(self) -> None:
        """End both threads."""
        self._stopped.set()

    def _take(self, news: News) -> None:
        with self._changed:
            if news.number < self._news.number:
                return
            self._news = news
            members = () if news.record is None else news.record.members
            there = {node.node for node in news.nodes}
            now = self._clock.now()
            self._missing = {node: self._missing.get(node, now) for node in members if node not in there}
            self._changed.notify_all()

    def _follow(self) -> None:
        def once() -> None:
            news = self._store.watch(self.news().number, self._ttl / 2)
            if news is not None:
                self._take(news)

        while not self._stopped.is_set():
            self._careful(once)

    def _beat(self) -> None:
        while not self._stopped.wait(self._ttl / 4):
            self._careful(self._store.beat)

    def _careful(self, call: Callable[[], None]) -> None:
        """A call that may fail: the store is away, and with it the leases of nodes that live."""
        try:
            call()
        except ResilientError:
            with self._changed:
                self._doubted_until = self._clock.now() + self._ttl
            self._stopped.wait(min(0.5, self._ttl / 4))
