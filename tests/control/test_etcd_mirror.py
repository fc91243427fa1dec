"""The copy of a job's keys follows etcd from the first key to the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
from etcd_cluster import EtcdCluster, running

from resilient_train.clock import MonotonicClock
from resilient_train.control import etcd_messages as messages
from resilient_train.control.etcd_client import EtcdClient
from resilient_train.control.etcd_mirror import EtcdMirror, Keys


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with running(1) as cluster:
        cluster.ready()
        yield cluster


@pytest.fixture
def client(cluster: EtcdCluster) -> Iterator[EtcdClient]:
    client = cluster.client()
    yield client
    client.close()


@pytest.fixture
def mirror(cluster: EtcdCluster) -> Iterator[EtcdMirror]:
    """Reads once, and then depends on its watch."""
    mirror = EtcdMirror(cluster.client(), b"/here/", 30.0, 1000.0, MonotonicClock(), lambda: 0)
    yield mirror
    mirror.close()


def put(client: EtcdClient, key: bytes, value: bytes) -> int:
    return int(client.call("Txn", 30.0, success=[messages.put(key, value)]).header.revision)


def changed(mirror: EtcdMirror, number: int) -> Keys:
    keys = mirror.changed(number, 30.0)
    assert keys is not None
    return keys


def test_keys_come_and_go(client: EtcdClient, mirror: EtcdMirror) -> None:
    """An empty range, its first key, a changed one, a deleted one; what stands elsewhere is no news."""
    start = changed(mirror, 0)
    assert start.values == {}
    one = put(client, b"/here/a", b"1")
    put(client, b"/there/a", b"1")
    first = changed(mirror, start.number)
    assert (first.number, {key: kv.value for key, kv in first.values.items()}) == (one, {b"/here/a": b"1"})
    two = put(client, b"/here/a", b"2")
    second = changed(mirror, first.number)
    assert (second.number, second.values[b"/here/a"].value) == (two, b"2")
    client.call("Txn", 30.0, success=[messages.delete(b"/here/", b"/here0")])
    assert changed(mirror, second.number).values == {}
    assert mirror.changed(changed(mirror, second.number).number, 0.1) is None


def test_a_deaf_watch_is_found_out(cluster: EtcdCluster, client: EtcdClient) -> None:
    """A watch that silently tells nothing is replaced when the copy is compared with etcd."""
    mirror = EtcdMirror(cluster.client(), b"/deaf/", 30.0, 0.2, MonotonicClock(), lambda: client.newest)
    start = changed(mirror, 0)
    mirror._stream.cancel()
    # As if the stream were still there.
    mirror._heard.get(timeout=30.0)
    one = put(client, b"/deaf/a", b"1")
    assert changed(mirror, start.number).values[b"/deaf/a"].mod_revision == one
    mirror._next_read += 1000.0
    put(client, b"/deaf/a", b"2")
    assert changed(mirror, one).values[b"/deaf/a"].value == b"2"
    mirror.close()


class BrokenWatches:
    """A client behind a proxy that ends every stream at once."""

    def __init__(self, client: EtcdClient) -> None:
        self.client = client
        self.watches = 0

    def watch(self, *_: object) -> tuple[object, None]:
        self.watches += 1
        return Ended(), None

    def __getattr__(self, name: str) -> object:
        return getattr(self.client, name)


class Ended:
    def __iter__(self) -> Iterator[object]:
        return iter(())

    def cancel(self) -> None:
        """It is over already."""


def test_watches_that_end_at_once_are_begun_anew_ever_more_seldom(cluster: EtcdCluster) -> None:
    """Changes are still found, by comparing; etcd is not asked forty times a second for it."""
    broken = BrokenWatches(cluster.client())
    mirror = EtcdMirror(cast(EtcdClient, broken), b"/here/", 30.0, 0.5, MonotonicClock(), lambda: 0)
    writer = cluster.client()
    start = changed(mirror, 0)
    assert mirror.changed(start.number, 3.0) is None
    assert broken.watches <= 12
    put(writer, b"/here/late", b"1")
    assert changed(mirror, start.number).values[b"/here/late"].value == b"1"
    mirror.close()
    writer.close()
