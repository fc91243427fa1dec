"""The control store over etcd v3, for jobs on several nodes: it outlives every one of them.

Under ``/resilient_train/JOB/``:

- ``secret``, which also tells this job from an earlier or later one of the same id: every write asks for it;
- ``record``, written only where its version is the record's revision minus one: compare-and-swap;
- ``nodes/ORDER``, one announcement each, under a lease that dies with its node;
- ``joined``, the number of nodes that ever joined.

All but the announcements are under a lease of the job, which every node's signs of life refresh: nothing of a job stays
for ever.  A job that ended makes room when a node joins under its id again.
"""

from __future__ import annotations

import json
import math
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from resilient_train.clock import Clock, MonotonicClock
from resilient_train.control import etcd_messages as messages
from resilient_train.control.endpoint import EtcdAccess
from resilient_train.control.etcd_client import EtcdClient, Login
from resilient_train.control.etcd_mirror import EtcdMirror, read
from resilient_train.control.store import News
from resilient_train.control.stored import announcements, json_object
from resilient_train.errors import JobReplaced, StoreLost
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import Phase, WorldRecord

_ROOT = "/resilient_train/"
_JOB_TTL = 3600
"""Seconds after the last sign of life of any node until a job's record is gone."""

_TRY = 2.0
"""Seconds after which it is known why a cluster does not answer at first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What tells a job from others of the same id.

    By its secret, and not by the revision at which it began: etcd 3.5.0 to 3.5.2 can lose count of the revisions where
    processes are killed (etcd-io/etcd#13766), so that one member's numbers are not the other's.
    """

    secret: str
    """Its secret."""
    lease: int
    """The lease that all of the job is under."""


class EtcdControlStore:
    """A `ControlStore` over a cluster of etcd; every call is bounded by about twice ``ttl``, at least 4 seconds."""

    lasting = True

    def __init__(
        self,
        access: EtcdAccess,
        job: str,
        ttl: float = 5.0,
        timeout: float = 30.0,
        clock: Clock | None = None,
        because: Callable[[str], None] | None = None,
    ) -> None:
        """Connects to a cluster.

        Args:
            access: where it is, and how it lets us in.
            job: the job's id; jobs with different ids do not see each other.
            ttl: seconds without a sign of life after which a node's announcement has expired.  etcd rounds up to
                whole seconds, 2 at least with its default settings, and looks every half second.
            timeout: seconds to wait for the cluster.
            clock: for deadlines.
            because: told again and again why the cluster does not answer yet.

        Raises:
            StoreLost: if it does not answer in time.
            ConfigError: if it does not let us in; later calls raise that too, when a user's rights are taken away.
        """
        self._clock = clock or MonotonicClock()
        self._access = access
        # A '/' in the id would let one job see into another.
        self._prefix = f"{_ROOT}{quote(job, safe='')}/".encode()
        self._ttl = ttl
        # Enough for an election among members with etcd's default settings.
        self._timeout = max(4.0, 2 * ttl)
        patience = min(max(0.5, ttl / 3), 2.0)
        login = Login()
        self._client = EtcdClient(access, patience, self._clock, login)
        self._lock = threading.Lock()
        self._job: _Job | None = None
        self._lease = 0
        self._said: NodeInfo | None = None
        self._said_at = 0
        self._job_refreshed = self._clock.now()
        self._first_answer(timeout, because or (lambda _: None))
        follower = EtcdClient(access, patience, self._clock, login)
        reread = max(1.0, ttl / 2)
        self._mirror = EtcdMirror(
            follower, self._prefix, self._timeout, reread, self._clock, lambda: self._client.newest
        )

    def join(self) -> int:
        self._clear()
        job, key, count, seen = self._settled(), self._key("joined"), 0, 0
        while True:
            put = messages.put(key, str(count + 1).encode(), job.lease)
            answer = self._write(messages.unchanged(key, seen), put, key)
            if answer.succeeded:
                return count
            kv = messages.found(answer)
            count, seen = (int(kv.value), kv.mod_revision) if kv is not None else (0, 0)

    def secret(self) -> str:
        return self._settled().secret

    def swap(self, record: WorldRecord) -> WorldRecord:
        key, text = self._key("record"), json.dumps(record.to_json()).encode()
        first = record.revision == 1
        put = messages.put(key, text, self._settled().lease) if first else messages.put(key, text, keep_lease=True)
        answer = self._write(messages.at_version(key, record.revision - 1), put, key)
        if answer.succeeded:
            return record
        newest = messages.found(answer)
        if newest is None:
            raise StoreLost(f"etcd at {self._access} holds no record of the job")
        return WorldRecord.from_json(json_object(newest.value))

    def announce(self, info: NodeInfo) -> None:
        with self._lock:
            self._announce(info)

    def beat(self) -> None:
        with self._lock:
            if self._said is not None and not self._refreshed(self._lease):
                self._lease = 0
                self._announce(self._said)
        if self._job is not None and self._clock.now() > self._job_refreshed + _JOB_TTL / 6:
            self._refreshed(self._job.lease)
            self._job_refreshed = self._clock.now()

    def withdraw(self) -> None:
        with self._lock:
            if self._lease:
                self._call("LeaseRevoke", excuses=("NOT_FOUND",), ID=self._lease)
            self._lease, self._said = 0, None

    def revision(self) -> int:
        secret, job = self._key("secret"), self._job
        answer = self._call(
            "Txn",
            compare=[] if job is None else [messages.holds(secret, job.secret.encode())],
            success=[messages.get(self._key("record"), keys_only=True)],
            failure=[messages.get(secret)],
        )
        found = messages.found(answer)
        if not answer.succeeded:
            self._recognize(found)
        return 0 if found is None else int(found.version)

    def look(self) -> News:
        answer = read(self._client, self._prefix, self._timeout)
        return self._news(answer.header.revision, {kv.key: kv for kv in answer.kvs})

    def watch(self, number: int, timeout: float) -> News | None:
        keys = self._mirror.changed(number, timeout)
        return None if keys is None else self._news(keys.number, keys.values)

    def close(self) -> None:
        self._mirror.close()
        self._client.close()

    def _first_answer(self, timeout: float, because: Callable[[str], None]) -> None:
        deadline, tried = self._clock.now() + timeout, _TRY
        while True:
            left = deadline - self._clock.now()
            try:
                read(self._client, self._prefix, min(left, tried))
                break
            except StoreLost as error:
                if left <= tried:
                    raise
                because(str(error))
                # The longer a call may take, the longer it waits for one that is slow to answer.
                tried = 2 * tried
        self._client.check_one_cluster(self._prefix)

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _call(self, method: str, **fields: Any) -> Any:
        return self._client.call(method, self._timeout, **fields)

    def _write(self, condition: Any, put: Any, key: bytes) -> Any:
        """A put under a condition; the answer says whether it held, and if it did not, what stands at ``key``.

        None if the put's lease is gone.

        Raises:
            StoreLost: also if etcd does not hold this job any more.
        """
        job = self._settled()
        answer = self._call(
            "Txn",
            compare=[messages.holds(self._key("secret"), job.secret.encode()), condition],
            success=[put],
            failure=[messages.get(key), messages.get(self._key("secret"))],
            excuses=("NOT_FOUND",),
        )
        if answer is not None and not answer.succeeded:
            self._recognize(messages.found(answer, 1))
        return answer

    def _settled(self) -> _Job:
        """The job under this id; it begins with whoever asks first."""
        key = self._key("secret")
        while self._job is None:
            answer = self._call("Range", key=key)
            if answer.kvs:
                (kv,) = answer.kvs
                # Its nodes may have been gone for almost as long as it stays.
                if kv.lease and not self._refreshed(kv.lease):
                    continue
                self._job = _Job(secret=kv.value.decode(), lease=kv.lease)
                break
            lease = self._granted(_JOB_TTL)
            made = messages.put(key, secrets.token_hex(32).encode(), lease)
            answer = self._call("Txn", compare=[messages.unchanged(key, 0)], success=[made], excuses=("NOT_FOUND",))
            if answer is not None and not answer.succeeded:
                self._call("LeaseRevoke", excuses=("NOT_FOUND",), ID=lease)
        return self._job

    def _recognize(self, secret: Any | None) -> None:
        """Make sure that the job under this id is still the one that we know."""
        if self._job is not None and (secret is None or secret.value != self._job.secret.encode()):
            if secret is None:
                raise StoreLost(f"this job is over: etcd at {self._access} holds no such job by now")
            raise JobReplaced(f"this job is over: etcd at {self._access} holds another job of that id by now")

    def _granted(self, seconds: int) -> int:
        """A new lease.  Its number is made up here, so that asking twice makes one."""
        number = secrets.randbits(62) + 1
        self._call("LeaseGrant", excuses=("FAILED_PRECONDITION",), TTL=seconds, ID=number)
        return number

    def _refreshed(self, lease: int) -> bool:
        """Refresh a lease; whether it was still there."""
        return bool(lease) and self._call("LeaseKeepAlive", ID=lease).TTL > 0

    def _announce(self, info: NodeInfo) -> None:
        """Put the announcement in place of ours before: a request that was held up must not bring an old one back."""
        key = self._key(f"nodes/{info.order:010d}")
        if self._said is None or self._said.order != info.order:
            self._said_at = 0
        self._said = info
        text = json.dumps(info.to_json()).encode()
        while True:
            self._lease = self._lease or self._granted(max(1, math.ceil(self._ttl)))
            answer = self._write(messages.unchanged(key, self._said_at), messages.put(key, text, self._lease), key)
            if answer is None:
                self._lease = 0
            elif answer.succeeded:
                self._said_at = answer.header.revision
                return
            else:
                kv = messages.found(answer)
                self._said_at = 0 if kv is None else kv.mod_revision

    def _clear(self) -> None:
        """Make room, if the job under this id ended and has no nodes any more."""
        answer = read(self._client, self._prefix, self._timeout)
        for kv in answer.kvs:
            if (
                kv.key == self._key("record")
                and WorldRecord.from_json(json_object(kv.value)).phase is not Phase.RUNNING
            ):
                nodes = self._key("nodes/")
                none_left = messages.absent(nodes, messages.prefix_end(nodes))
                everything = messages.delete(self._prefix, messages.prefix_end(self._prefix))
                same = messages.unchanged(kv.key, kv.mod_revision)
                if self._call("Txn", compare=[same, none_left], success=[everything]).succeeded:
                    self._job = None

    def _news(self, number: int, values: dict[bytes, Any]) -> News:
        self._recognize(values.get(self._key("secret")))
        record = values.get(self._key("record"))
        nodes = (kv for key, kv in sorted(values.items()) if key.startswith(self._key("nodes/")))
        found, unreadable = announcements(kv.value for kv in nodes)
        return News(
            number=number,
            record=None if record is None else WorldRecord.from_json(json_object(record.value)),
            nodes=found,
            unreadable=unreadable,
        )
