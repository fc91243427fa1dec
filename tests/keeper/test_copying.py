"""The thread that sends: whatever goes wrong with one state, the next one is carried out."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from resilient_train.errors import LinkLost
from resilient_train.keeper import copying
from resilient_train.keeper.copying import Copier, Errand
from resilient_train.keeper.shelf import Listed, Shelf
from resilient_train.spec.shard import Stamp
from resilient_train.spec.world import Key

IMAGE = Listed(slot=1, owner="a/0.0", stamp=Stamp(key=Key(1, 1), rank=0, world=1, json_length=0, crc=0), size=8)


class Line:
    """A connection to another keeper."""

    def close(self) -> None:
        pass


class Full(Shelf):
    """Cannot open anything, until it can."""

    broken = True

    @contextmanager
    def reading(self, number: int, key: Key) -> Iterator[memoryview | None]:
        if self.broken:
            raise OSError(24, "Too many open files")
        yield memoryview(bytes(8))


class Bench:
    """A copier between a shelf and keepers that are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shelf: Shelf, put: Callable[..., None]) -> None:
        monkeypatch.setattr(copying, "connect", lambda *_: Line())
        monkeypatch.setattr(copying, "put_bytes", put)
        monkeypatch.setattr(copying, "_RETRY", 0.001)
        self.said: list[str] = []
        self.ended: queue.Queue[tuple[Key, bool]] = queue.Queue()
        self.copier = Copier(shelf, lambda: None, self.said.append, lambda e, done: self.ended.put((e.key, done)))
        self.copier.start()

    def send(self, step: int) -> tuple[Key, bool]:
        """Have a state copied; how that ended."""
        key = Key(1, step)
        self.copier.give(Errand(key=key, images=(IMAGE,), node="a", targets=("h:1",), secret=b"", rate=0))
        return self.ended.get(timeout=10)


def test_a_node_without_descriptors_misses_a_state_and_copies_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, and the thread goes on."""
    shelf = Full()
    bench = Bench(monkeypatch, shelf, lambda *_: None)
    assert bench.send(1) == (Key(1, 1), False)
    assert "Too many open files" in bench.said[0]
    shelf.broken = False
    assert bench.send(2) == (Key(1, 2), True)


def test_a_transfer_that_always_breaks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something on the way may damage it again and again; the next state may have better luck."""
    shelf = Full()
    shelf.broken = False
    tried: list[int] = []

    def put(*_: object) -> None:
        tried.append(1)
        if len(tried) <= copying._BROKEN:
            raise LinkLost("what arrived fails its checksums")

    bench = Bench(monkeypatch, shelf, put)
    assert bench.send(1) == (Key(1, 1), False)
    assert "what arrived fails its checksums" in bench.said[0]
    assert len(tried) == copying._BROKEN
    assert bench.send(2) == (Key(1, 2), True)
