"""A job's own etcd: real processes that run real members, killed and replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import children_of, free_ports

from resilient_train.control.endpoint import EtcdAccess, OwnEtcd, parse
from resilient_train.control.etcd import EtcdControlStore
from resilient_train.control.etcd_client import EtcdClient
from resilient_train.control.own_founding import Offer, waits
from resilient_train.errors import StoreLost
from resilient_train.testing.control import record, wait_for

SCRIPT = Path(__file__).parent / "scripts" / "own_agent.py"
START = 60.0


class Agents:
    """Processes that run members, by the port of the member that they have."""

    def __init__(self, size: int, folder: Path) -> None:
        self.ports = free_ports(size)
        self.endpoint = "own:" + ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self._folder = folder
        self._all: list[subprocess.Popen[str]] = []
        self.by_port: dict[int, subprocess.Popen[str]] = {}

    @property
    def own(self) -> OwnEtcd:
        own = parse("etcd", self.endpoint, {})
        assert isinstance(own, OwnEtcd)
        return own

    def start(self, count: int = 1, timeout: float = START) -> list[str]:
        """Start processes; what each of them says first."""
        command = [sys.executable, str(SCRIPT), self.endpoint, str(timeout)]
        environment = {**os.environ, "TMPDIR": str(self._folder)}
        new = [
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        self._all += new
        said = []
        for process in new:
            assert process.stdout is not None
            said.append(process.stdout.readline())
            if said[-1].startswith("ready"):
                self.by_port[int(said[-1].split()[1])] = process
        return said

    def kill(self, port: int) -> None:
        """SIGKILL to the agent; its member goes with it."""
        process = self.by_port.pop(port)
        process.kill()
        process.wait()

    def end(self, port: int) -> None:
        """Let the agent end in good order."""
        process = self.by_port.pop(port)
        process.communicate(timeout=60)
        assert process.returncode == 0

    def etcd(self, port: int, other_than: int = 0) -> int:
        """The process id of an agent's member, as soon as there is one."""
        found: list[int] = []

        def look() -> bool:
            found[:] = children_of(self.by_port[port].pid)
            return bool(found) and found[0] != other_than

        wait_for(look, START)
        return found[0]

    def leader(self) -> int:
        """The port of the member that leads."""
        for port in self.by_port:
            client = EtcdClient(one(port), 5.0)
            status = client.call("Status", START)
            client.close()
            if status.leader == status.header.member_id:
                return port
        raise AssertionError("nobody leads")

    def voters(self) -> int:
        """The number of members that answer."""
        client = EtcdClient(self.own.access, 2.0)
        try:
            members = client.call("MemberList", START, linearizable=True).members
        finally:
            client.close()
        return sum(bool(member.clientURLs) for member in members)

    def data(self) -> list[Path]:
        """Folders of data."""
        return list(self._folder.iterdir())

    def close(self) -> None:
        for process in self._all:
            process.kill()
            process.communicate()


def one(port: int) -> EtcdAccess:
    own = parse("etcd", f"own:127.0.0.1:{port}", {})
    assert isinstance(own, OwnEtcd)
    return own.access


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Agents]:
    agents = Agents(3, tmp_path)
    yield agents
    agents.close()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Agents]:
    agents = Agents(1, tmp_path)
    yield agents
    agents.close()


@pytest.fixture
def store(three: Agents) -> Iterator[EtcdControlStore]:
    """A store in the cluster of three, all of whose members are there."""
    assert all(said.startswith("ready") for said in three.start(3))
    wait_for(lambda: three.voters() == 3, START)
    store = EtcdControlStore(three.own.access, uuid.uuid4().hex, 2.0)
    yield store
    store.close()


def swapped(store: EtcdControlStore, revision: int) -> None:
    """Swap, asking again after lost answers."""

    def once() -> bool:
        try:
            return store.swap(record(revision)) == record(revision)
        except StoreLost:
            return False

    wait_for(once, START)


def test_members_that_are_killed_are_replaced(three: Agents, store: EtcdControlStore) -> None:
    """One after the other, the leader first: nothing is lost, and who returns counts for the majority again."""
    swapped(store, 1)
    for revision in (2, 3, 4):
        port = three.leader()
        three.kill(port)
        swapped(store, revision)
        assert three.start()[0] == f"ready {port}\n"
        wait_for(lambda: three.voters() == 3, START)
    assert store.look().record == record(4)


@pytest.mark.soak
def test_agents_leave_one_after_the_other(three: Agents, store: EtcdControlStore) -> None:
    """The last has a store to the end; no data is left."""
    swapped(store, 1)
    for revision, port in enumerate(three.ports[:2], 2):
        three.end(port)
        swapped(store, revision)
    assert len(three.data()) == 1
    three.end(three.ports[2])
    assert three.data() == []


@pytest.mark.soak
def test_processes_of_etcd_are_killed(three: Agents, store: EtcdControlStore) -> None:
    """One: it is replaced.  All at once: they go on with their data."""
    swapped(store, 1)
    lost = three.etcd(three.ports[1])
    os.kill(lost, signal.SIGKILL)
    swapped(store, 2)
    three.etcd(three.ports[1], other_than=lost)
    wait_for(lambda: three.voters() == 3, START)
    for pid in [three.etcd(port) for port in three.ports]:
        os.kill(pid, signal.SIGKILL)
    swapped(store, 3)
    assert store.look().record == record(3)


def test_one_member_alone(alone: Agents) -> None:
    """Its agent gives it back what its process wrote; what an agent that was killed left is removed by the next."""
    assert alone.start() == [f"ready {alone.ports[0]}\n"]
    store = EtcdControlStore(alone.own.access, "job", 2.0)
    swapped(store, 1)
    os.kill(alone.etcd(alone.ports[0]), signal.SIGKILL)
    swapped(store, 2)
    store.close()
    alone.kill(alone.ports[0])
    assert len(alone.data()) == 1
    assert alone.start() == [f"ready {alone.ports[0]}\n"]
    new = EtcdControlStore(alone.own.access, "job", 2.0)
    assert new.look().record is None
    new.close()
    alone.end(alone.ports[0])
    assert alone.data() == []


def test_a_minority_founds_nothing(three: Agents) -> None:
    """One of three waits, and says what is missing; two go on after a while, and the third joins them."""
    (said,) = three.start(1, timeout=4.0)
    assert said.startswith("StoreLost the job's own etcd did not come up in 4 s")
    assert said.endswith("not enough agents are there\n")
    said_by_two = three.start(2)
    assert all(said.startswith("ready") for said in said_by_two), said_by_two
    assert three.start()[0].startswith("ready")
    wait_for(lambda: three.voters() == 3, START)


@pytest.mark.soak
def test_a_majority_that_is_lost_is_replaced_by_another(three: Agents, store: EtcdControlStore) -> None:
    """Two agents killed at once take the record with them; their successors found anew, and the third comes over."""
    swapped(store, 1)
    for port in three.ports[:2]:
        three.kill(port)
    assert all(said.startswith("ready") for said in three.start(2))
    wait_for(lambda: three.voters() == 3, START)
    with pytest.raises(StoreLost, match="this job is over"):
        store.look()


def test_a_port_that_is_taken(alone: Agents) -> None:
    """Either of the two that a member needs is said with its address."""
    for port in (alone.ports[0], alone.ports[0] + 1):
        with socket.create_server(("127.0.0.1", port)):
            assert alone.start() == [
                f"ConfigError the job's own etcd cannot listen at 127.0.0.1:{port}: Address already in use\n"
            ]


def test_a_founding_that_is_nonsense_is_ignored(alone: Agents) -> None:
    """Anybody may send one, before there is a cluster; the member is founded all the same."""
    (port,) = alone.ports
    said: list[str] = []
    starter = threading.Thread(target=lambda: said.extend(alone.start()))
    starter.start()
    while not said and not waits(("127.0.0.1", port), Offer(token="x", members=(7,))):
        starter.join(0.001)
    starter.join()
    assert said == [f"ready {port}\n"]
