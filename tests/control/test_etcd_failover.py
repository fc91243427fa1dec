"""Members of etcd die, freeze and come back: calls go on, watches hear everything, announcements return."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from etcd_cluster import EtcdCluster, running

from resilient_train.control.etcd import EtcdControlStore
from resilient_train.control.store import News
from resilient_train.errors import StoreLost
from resilient_train.testing.control import node, record, wait_for

TTL = 2.0


@pytest.fixture(scope="module")
def shared() -> Iterator[EtcdCluster]:
    with running(3) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: EtcdCluster) -> Iterator[EtcdCluster]:
    """Three members; whatever was done to them is undone at the end."""
    shared.ready()
    yield shared
    shared.mend()


@pytest.fixture
def stores(cluster: EtcdCluster) -> Iterator[Callable[[], EtcdControlStore]]:
    job, made = uuid.uuid4().hex, []

    def store() -> EtcdControlStore:
        made.append(EtcdControlStore(cluster.access, job, TTL))
        return made[-1]

    yield store
    for one in made:
        one.close()


class Listener:
    """Follows a store, as agents do."""

    def __init__(self, store: EtcdControlStore) -> None:
        self._store = store
        self.news: list[News] = [store.look()]
        self.lost = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                heard = self._store.watch(self.news[-1].number, 0.5)
            except StoreLost:
                self.lost += 1
                continue
            if heard is not None:
                self.news.append(heard)

    def hears(self, revision: int) -> bool:
        """Whether the record's version is known."""
        newest = self.news[-1].record
        return newest is not None and newest.revision >= revision

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60.0)


@pytest.fixture
def listener(stores: Callable[[], EtcdControlStore]) -> Iterator[Listener]:
    listener = Listener(stores())
    yield listener
    listener.stop()


Stores = Callable[[], EtcdControlStore]


def swaps(store: EtcdControlStore, revision: int) -> None:
    """Swap, asking again after every lost answer, as agents do."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            assert store.swap(record(revision)) == record(revision)
            return
        except StoreLost:
            assert time.monotonic() < deadline, "etcd did not come back"


def test_the_leader_is_killed(cluster: EtcdCluster, stores: Stores, listener: Listener) -> None:
    """The others elect another: no call fails, no change goes unheard, no announcement is lost."""
    store = stores()
    store.announce(node(store.join()))
    swaps(store, 1)
    cluster.signal(signal.SIGKILL, cluster.leader())
    assert store.swap(record(2)) == record(2)
    wait_for(lambda: listener.hears(2), 20.0)
    store.beat()
    assert store.look().nodes == (node(0),)
    assert listener.lost == 0


@pytest.mark.parametrize("which", ["the leader", "the member in use"])
def test_a_member_is_frozen(cluster: EtcdCluster, stores: Stores, listener: Listener, which: str) -> None:
    """It accepts connections and never answers; the next is asked."""
    store = stores()
    swaps(store, 1)
    wait_for(lambda: listener.hears(1), 20.0)
    cluster.signal(signal.SIGSTOP, cluster.leader() if which == "the leader" else store._client._current)
    for revision in (2, 3, 4):
        assert store.swap(record(revision)) == record(revision)
        wait_for(lambda: listener.hears(revision), 60.0)  # noqa: B023
    assert listener.lost == 0


def test_a_frozen_member_that_resumes_brings_nothing_old_back(cluster: EtcdCluster, stores: Stores) -> None:
    """What it was asked before it froze arrives late, and is refused."""
    store = stores()
    info = node(store.join())
    store.announce(info)
    cluster.signal(signal.SIGSTOP, store._client._current)
    said = [type(info)(node=info.node, order=info.order, endpoint="h:2", slots=slots) for slots in (3, 4, 5)]
    for one in said:
        store.announce(one)
    cluster.signal(signal.SIGCONT)
    cluster.ready()
    store.beat()
    assert store.look().nodes == (said[-1],)


def test_all_are_killed_and_started_again(cluster: EtcdCluster, stores: Stores, listener: Listener) -> None:
    """While nothing is there calls fail with the addresses, soon; afterwards all is as it was."""
    store = stores()
    info = node(store.join())
    store.announce(info)
    swaps(store, 1)
    cluster.signal(signal.SIGKILL)
    with pytest.raises(StoreLost, match=cluster.clients[0]):
        store.look()
    wait_for(lambda: listener.lost > 0, 20.0)
    for index in range(3):
        cluster.start(index)
    swaps(store, 2)
    wait_for(lambda: listener.hears(2), 20.0)
    store.beat()
    assert store.look().nodes == (info,)


def test_all_are_frozen_for_ten_seconds(cluster: EtcdCluster, stores: Stores, listener: Listener) -> None:
    """Leases may all vanish at once; every node's next beat brings it back, and the record is as it was."""
    nodes = [stores() for _ in range(3)]
    infos = []
    for store in nodes:
        infos.append(node(store.join()))
        store.announce(infos[-1])
    swaps(nodes[0], 1)
    cluster.signal(signal.SIGSTOP)
    resumes = threading.Timer(10.0, lambda: cluster.signal(signal.SIGCONT))
    resumes.start()
    with pytest.raises(StoreLost, match=cluster.clients[2]):
        nodes[0].beat()
    resumes.join()
    swaps(nodes[0], 2)
    wait_for(lambda: listener.hears(2), 20.0)
    for store in nodes:
        store.beat()
    assert nodes[0].look().nodes == tuple(infos)
    wait_for(lambda: listener.news[-1].nodes == tuple(infos), 20.0)


def test_nobody_answers_at_the_start() -> None:
    """An etcd that is not there is an error with its addresses."""
    with running(1) as cluster:
        access = cluster.access
    with pytest.raises(StoreLost, match=access.endpoints[0]):
        EtcdControlStore(access, "job", timeout=0.5)


def test_closing_ends_a_watch(stores: Stores) -> None:
    """A blocked watch returns."""
    store = stores()
    number = store.look().number
    heard: list[News | None] = []
    thread = threading.Thread(target=lambda: heard.append(store.watch(number, 60.0)))
    thread.start()
    wait_for(lambda: store._mirror._stream is not None, 30.0)
    store.close()
    thread.join(30.0)
    assert heard == [None]
    with pytest.raises(StoreLost):
        store.look()
