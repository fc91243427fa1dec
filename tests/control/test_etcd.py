"""The store over etcd passes the conformance suite on one member and on three; a job ends and leaves nothing behind."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest
from etcd_cluster import EtcdCluster, running

from resilient_train.control import etcd
from resilient_train.control.endpoint import EtcdAccess
from resilient_train.control.etcd import EtcdControlStore
from resilient_train.errors import ConfigError, JobReplaced, StoreLost
from resilient_train.spec.world import Phase
from resilient_train.testing.control import ControlStoreConformance, node, record, wait_for
from resilient_train.testing.nodes import free_port


@pytest.fixture(scope="module", params=[1, 3], ids=["one member", "three members"])
def cluster(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with running(request.param) as cluster:
        cluster.ready()
        yield cluster


class Stores:
    """Clients of one cluster, closed at the end."""

    def __init__(self, cluster: EtcdCluster) -> None:
        self._cluster = cluster
        self._job = uuid.uuid4().hex
        self._made: list[EtcdControlStore] = []

    def __call__(self, job: str = "") -> EtcdControlStore:
        self._made.append(EtcdControlStore(self._cluster.access, job or self._job, 1.0))
        return self._made[-1]

    def close(self) -> None:
        for store in self._made:
            store.close()


@pytest.fixture
def stores(cluster: EtcdCluster) -> Iterator[Stores]:
    stores = Stores(cluster)
    yield stores
    stores.close()


class TestEtcdControlStore(ControlStoreConformance):
    @pytest.fixture(autouse=True)
    def _stores(self, stores: Stores) -> None:
        self.store = stores

    def store(self) -> EtcdControlStore:
        raise NotImplementedError


def test_jobs_do_not_see_each_other(stores: Stores) -> None:
    """Jobs in one etcd have records of their own, also where one's id begins with the other's."""
    stores("one").swap(record(1))
    stores("one/two").swap(record(1))
    stores("one/two").swap(record(2))
    assert stores("on").look().record is None
    assert stores("one").look().record == record(1)


def test_a_job_that_ended_makes_room_for_the_next(stores: Stores) -> None:
    """Its record stays for whoever asks how it ended, until a node joins when no other is left; then all is new."""
    old, late = stores(), stores()
    old.announce(node(old.join()))
    late.announce(node(late.join()))
    old.swap(record(1, phase=Phase.FINISHED))
    secret = old.secret()
    old.withdraw()
    assert stores().join() == 2, "one node is left: the job is not over for it"
    late.withdraw()
    ended = stores().look().record
    assert ended is not None
    assert ended.phase is Phase.FINISHED
    new = stores()
    assert new.join() == 0
    assert new.look().record is None
    assert new.secret() != secret
    with pytest.raises(StoreLost, match="this job is over"):
        late.announce(node(1))
    with pytest.raises(StoreLost, match="this job is over"):
        old.swap(record(1))
    with pytest.raises(StoreLost, match="this job is over"):
        old.look()


def test_a_job_that_is_running_makes_no_room(stores: Stores) -> None:
    """Nodes that come back after all were lost find the record."""
    stores().swap(record(1))
    again = stores()
    again.join()
    assert again.look().record == record(1)


def test_a_job_leaves_nothing_behind(cluster: EtcdCluster, stores: Stores) -> None:
    """Every key is under a lease: of the node, or of the job."""
    store = stores("traces")
    store.announce(node(store.join()))
    store.swap(record(1))
    store.swap(record(2))
    answer = cluster.client().call(
        "Range", 30.0, key=b"/resilient_train/traces/", range_end=b"/resilient_train/traces0"
    )
    assert len(answer.kvs) == 4
    assert all(kv.lease for kv in answer.kvs)


def test_a_lost_lease_is_made_anew(cluster: EtcdCluster, stores: Stores) -> None:
    """Whoever took the lease away, the next beat brings the announcement back as it was said last."""
    store = stores()
    info = node(store.join())
    store.announce(info)
    store.announce(replace(info, slots=7))
    cluster.client().call("LeaseRevoke", 30.0, ID=store._lease)
    wait_for(lambda: store.look().nodes == (), 30.0)
    store.beat()
    assert store.look().nodes == (replace(info, slots=7),)


def test_a_job_is_told_by_its_secret(cluster: EtcdCluster, stores: Stores) -> None:
    """Members that do not count revisions alike still hold the same job; another secret is another job."""
    store = stores("told by its secret")
    store.announce(node(store.join()))
    store.swap(record(1))
    key = "/resilient_train/told%20by%20its%20secret/secret"
    cluster.etcdctl("put", "--ignore-lease", key, store.secret())
    assert store.swap(record(2)) == record(2)
    assert store.look().record == record(2)
    assert store.revision() == 2
    cluster.etcdctl("put", "--ignore-lease", key, "another")
    with pytest.raises(JobReplaced, match="another job"):
        store.swap(record(3))
    with pytest.raises(JobReplaced, match="another job"):
        store.look()


def test_a_watch_survives_compaction(cluster: EtcdCluster, stores: Stores) -> None:
    """History that is gone is not needed: what stands now is read."""
    store, other = stores(), stores()
    before = store.look().number
    other.swap(record(1))
    other.swap(record(2))
    cluster.etcdctl("compact", str(other.look().number))
    news = store.watch(before, 30.0)
    assert news is not None
    assert news.record == record(2)
    other.swap(record(3))
    while news.record != record(3):
        heard = store.watch(news.number, 30.0)
        assert heard is not None
        news = heard


def test_why_no_etcd_answers_is_told_before_it_is_given_up() -> None:
    """Whoever waits for a cluster sees what is wrong meanwhile."""
    told: list[str] = []
    with pytest.raises(StoreLost):
        EtcdControlStore(EtcdAccess(endpoints=(f"127.0.0.1:{free_port()}",)), "job", timeout=3.0, because=told.append)
    assert told
    assert "UNAVAILABLE" in told[0]


def test_who_joins_a_job_that_was_left_long_ago_keeps_it(
    cluster: EtcdCluster, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease has almost run out: it begins anew with the first who comes back, and does not end under them."""
    monkeypatch.setattr(etcd, "_JOB_TTL", 30)
    first = stores()
    first.swap(record(1))
    assert first._job is not None
    lease = f"{first._job.lease:x}"

    def left() -> int:
        return int(json.loads(cluster.etcdctl("lease", "timetolive", lease, "-w", "json"))["ttl"])

    wait_for(lambda: left() <= 27, 30.0)
    stores().join()
    assert left() >= 28


def test_endpoints_of_two_clusters_are_refused(cluster: EtcdCluster) -> None:
    """They would hold two jobs under one id, each of which knows nothing of the other."""
    with running(1) as other:
        other.ready()
        both = EtcdAccess(endpoints=(*cluster.access.endpoints, *other.access.endpoints))
        with pytest.raises(ConfigError, match="are different etcd clusters") as caught:
            EtcdControlStore(both, "job", 1.0)
    assert other.access.endpoints[0] in str(caught.value)


def test_what_is_too_large_for_etcd_is_refused_at_once(stores: Stores) -> None:
    """With etcd's own words, and not tried again until the time is over; smaller things go on."""
    store = stores()
    info = node(store.join())
    for size in (1600, 3000):
        with pytest.raises(StoreLost, match="refuses what it was asked"):
            store.announce(replace(info, failed="x" * (size << 10)))
    store.announce(info)
    assert store.look().nodes == (info,)
