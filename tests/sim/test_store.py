"""The simulated store keeps the contract of real ones: the conformance suite, through a facade with a real clock."""

from __future__ import annotations

import threading
import time

import pytest

from resilient_train.control.store import ControlStore, News
from resilient_train.errors import FormatError, StoreLost
from resilient_train.sim.store import Snapshot, Store
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord
from resilient_train.testing.control import ControlStoreConformance


class Shared:
    """One simulated store between threads, at real times."""

    def __init__(self, ttl: float) -> None:
        self.store = Store(ttl)
        self.changed = threading.Condition()


class Facade:
    """A `ControlStore` over it."""

    lasting = True

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._order = -1
        self._closed = False

    def _begin(self) -> Store:
        if self._closed:
            raise StoreLost("closed")
        self._shared.store.expire(time.monotonic())
        self._shared.changed.notify_all()
        return self._shared.store

    def join(self) -> int:
        with self._shared.changed:
            self._order = self._begin().join()
            return self._order

    def secret(self) -> str:
        return "5a" * 32

    def swap(self, record: WorldRecord) -> WorldRecord:
        with self._shared.changed:
            return self._begin().swap(record)

    def announce(self, info: NodeInfo) -> None:
        with self._shared.changed:
            self._order = info.order
            self._begin().announce(info, time.monotonic())

    def beat(self) -> None:
        with self._shared.changed:
            self._begin().beat(self._order, time.monotonic())

    def withdraw(self) -> None:
        with self._shared.changed:
            self._begin().withdraw(self._order)

    def revision(self) -> int:
        with self._shared.changed:
            return self._begin().revision()

    def look(self) -> News:
        with self._shared.changed:
            return news(self._begin().look())

    def watch(self, number: int, timeout: float) -> News | None:
        deadline = time.monotonic() + timeout
        with self._shared.changed:
            while self._begin().number <= number:
                now = time.monotonic()
                if now >= deadline:
                    return None
                self._shared.changed.wait(max(0.0, min(deadline, self._shared.store.next_expiry()) - now))
            return news(self._shared.store.look())

    def close(self) -> None:
        self._closed = True


def news(snapshot: Snapshot) -> News:
    """What a store that keeps text would give."""
    nodes, unreadable = [], []
    for node in snapshot.nodes:
        try:
            nodes.append(NodeInfo.from_json(node.to_json()))
        except FormatError as error:
            unreadable.append(str(error))
    return News(number=snapshot.number, record=snapshot.record, nodes=tuple(nodes), unreadable=tuple(unreadable))


class TestSimulatedStore(ControlStoreConformance):
    @pytest.fixture(autouse=True)
    def _shared(self) -> None:
        self.shared = Shared(self.ttl)

    def store(self) -> ControlStore:
        return Facade(self.shared)


def test_all_leases_can_vanish_at_once_and_come_back() -> None:
    """As after a freeze: nobody is announced any more, and each beat brings one back."""
    store = Store(ttl=5.0)
    infos = [NodeInfo(node=f"n{order}", order=order, endpoint="h:1", slots=1) for order in range(2)]
    for info in infos:
        store.announce(info, 0.0)
    store.expire_all()
    assert store.look().nodes == ()
    store.beat(1, 1.0)
    assert store.look().nodes == (infos[1],)
