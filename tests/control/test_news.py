"""The newest news at hand, and signs of life, whatever happens to the store."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from etcd_cluster import EtcdCluster, running

from resilient_train.clock import MonotonicClock
from resilient_train.control.etcd import EtcdControlStore
from resilient_train.control.news import Follower
from resilient_train.testing.control import node, record, wait_for

TTL = 2.0


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with running(1) as cluster:
        cluster.ready()
        yield cluster


def test_following(cluster: EtcdCluster) -> None:
    """Changes arrive by themselves; announcements live on; who vanished counts as missing, but not after an outage."""
    mine, other = (EtcdControlStore(cluster.access, "job", TTL) for _ in range(2))
    follower = Follower(mine, TTL, MonotonicClock())
    mine.announce(node(0))
    other.announce(node(1))
    other.swap(record(1, members=("n0", "n1")))
    wait_for(lambda: follower.news().record is not None and len(follower.news().nodes) == 2, 30.0)
    number = follower.news().number
    other.withdraw()
    follower.wait(number, 30.0)
    assert [one.node for one in follower.news().nodes] == ["n0"]
    wait_for(lambda: follower.missing().get("n1", 0.0) > TTL, 30.0)
    assert [one.node for one in follower.news().nodes] == ["n0"], "kept alive"
    cluster.signal(signal.SIGKILL)
    wait_for(lambda: follower.missing() == {"n1": 0.0}, 30.0)
    cluster.start(0)
    other.announce(node(1))
    wait_for(lambda: follower.missing() == {}, 30.0)
    follower.stop()
    mine.close()
    other.close()
