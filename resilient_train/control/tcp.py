"""The embedded control store: torch's TCPStore, served by one agent.

One key holds each version of the record and is created only if absent, which is the compare-and-swap.  Every change
gets a number and a key of that number; a watch is a wait for the next one's key, on a connection of its own, because a
wait blocks every other call of the same client.  A node is alive while its count of beats grows on the observer's
clock.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store, TCPStore

from resilient_train.clock import Clock, MonotonicClock
from resilient_train.control.caller import Caller
from resilient_train.control.store import News
from resilient_train.control.stored import announcements, json_object
from resilient_train.errors import StoreGone, StoreLost
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord

_KEPT_VERSIONS = 16
_REREAD = 1.0
"""The least seconds between two looks whether there are news that a watch was not woken for."""
_PROBE = 1.0
"""Seconds for a host to refuse a connection."""
_KEPT_NEWS = 1024
"""Whoever is further behind than this hears at its next look."""
_T = TypeVar("_T")


def serve(host: str, port: int) -> TCPStore:
    """Serve a TCPStore on ``host:port`` (0: any free port) in background threads of this process.

    Raises:
        StoreLost: if the address cannot be bound.
    """
    try:
        return TCPStore(host, port, None, True, timedelta(seconds=30), wait_for_workers=False)
    except (dist.DistError, RuntimeError, OSError) as error:
        raise StoreLost(f"cannot serve a store on {host}:{port}: {error}") from error


class TcpControlStore:
    """A `ControlStore` over a TCPStore server."""

    lasting = False

    def __init__(
        self, host: str, port: int, job: str, ttl: float = 5.0, timeout: float = 30.0, clock: Clock | None = None
    ) -> None:
        """Connects to a server.  Later calls fail after about twice ``ttl``.

        Args:
            host: where it listens.
            port: its port.
            job: the job's id; jobs with different ids do not see each other.
            ttl: seconds without a sign of life after which a node's announcement has expired.
            timeout: seconds to wait for the server to come up.
            clock: the observer's; clocks of different nodes are never compared.

        Raises:
            StoreLost: if it cannot be reached.
        """
        self._prefix = f"resilient_train/{job}/"
        self._where = (host, port)
        self._ttl = ttl
        self._timeout = max(2.0, 2 * ttl)
        self._clock = clock or MonotonicClock()
        self._order = -1
        self._closed = False
        self._seen: dict[int, tuple[int, float]] = {}
        self._expired: frozenset[int] = frozenset()
        self._seeing = threading.Lock()
        self._caller = Caller("store calls")
        # Not by this thread: torch's client cannot be interrupted.
        self._calls: TCPStore | None = self._first(host, port, timeout)
        self._watching: TCPStore | None = self._first(host, port, timeout)

    def _first(self, host: str, port: int, timeout: float) -> TCPStore:
        try:
            return self._caller.call(lambda: _connect(host, port, timeout), timeout + _PROBE)
        except TimeoutError:
            raise StoreLost(f"no store answers at {host}:{port} within {timeout:g} s") from None

    def join(self) -> int:
        def join() -> int:
            self._order = int(self._store().add(self._prefix + "joined", 1)) - 1
            return self._order

        return self._mapped(join)

    def secret(self) -> str:
        made = secrets.token_hex(32)
        return self._mapped(lambda: str(self._store().compare_set(self._prefix + "secret", "", made).decode()))

    def swap(self, record: WorldRecord) -> WorldRecord:
        def swap() -> WorldRecord:
            store, key = self._store(), self._key(record.revision)
            text = json.dumps(record.to_json())
            if record.revision > 1 and not store.check([self._key(record.revision - 1)]):
                newest = self._load(store)
                if newest is None:
                    raise StoreLost("the store has lost the job's record")
                return newest
            won = store.compare_set(key, "", text)
            if won == text.encode():
                if self._advance(store, record.revision) >= record.revision + _KEPT_VERSIONS:
                    # Free again because what stood there is so old that it was deleted.
                    store.delete_key(key)
                    return self._load(store) or record
                self._trim(store, record.revision - _KEPT_VERSIONS)
                self._tell(store)
            return _record(won)

        return self._mapped(swap)

    def announce(self, info: NodeInfo) -> None:
        def announce() -> None:
            store = self._store()
            self._order = info.order
            store.set(self._prefix + f"node/{info.order}", json.dumps(info.to_json()))
            store.add(self._prefix + f"beat/{info.order}", 1)
            self._tell(store)

        self._mapped(announce)

    def beat(self) -> None:
        def beat() -> None:
            store = self._store()
            store.add(self._prefix + f"beat/{self._order}", 1)
            # No server tells when a node falls silent: whoever lives looks, and wakes the watchers.
            expired = self._expired
            self._look(store)
            if self._expired != expired:
                self._tell(store)

        self._mapped(beat)

    def withdraw(self) -> None:
        def withdraw() -> None:
            store = self._store()
            store.delete_key(self._prefix + f"node/{self._order}")
            self._tell(store)

        self._mapped(withdraw)

    def revision(self) -> int:
        return self._mapped(lambda: self._revision(self._store()))

    def look(self) -> News:
        return self._mapped(lambda: self._look(self._store()))

    def watch(self, number: int, timeout: float) -> News | None:
        deadline = self._clock.now() + timeout

        def watch() -> News | None:
            if self._watching is None:
                self._watching = self._connected()
            while (left := deadline - self._clock.now()) > 0:
                try:
                    wait = timedelta(seconds=min(left, max(_REREAD, self._ttl)))
                    self._watching.wait([self._prefix + f"news/{number + 1}"], wait)
                    break
                except dist.DistStoreError as error:
                    if "timeout" not in str(error).lower():
                        raise
                # The key may have been deleted, a thousand changes ago; or who counted it died before setting it.
                if int(self._watching.add(self._prefix + "news", 0)) > number:
                    break
            news = self._look(self._watching)
            return news if news.number > number else None

        return self._mapped(watch, watching=True)

    def close(self) -> None:
        if self._closed:
            return
        if self._watching is not None:
            with contextlib.suppress(StoreLost):
                self._mapped(lambda: self._tell(self._store()))
        self._closed = True
        self._caller.close()
        self._calls = None

    def _store(self) -> TCPStore:
        if self._calls is None:
            self._calls = self._connected()
        return self._calls

    def _connected(self) -> TCPStore:
        if _refuses(*self._where):
            # torch's client would go on trying, and write a stack each time.
            raise self._gone()
        try:
            return _connect(*self._where, self._timeout / 4)
        except StoreLost as error:
            raise self._lost(str(error)) from error

    def _key(self, revision: int) -> str:
        return self._prefix + f"record/{revision}"

    def _advance(self, store: Store, revision: int) -> int:
        """Have newcomers begin to read here, unless they read further on already; where they began before."""
        head = self._prefix + "head"
        before = int(store.get(head)) if store.check([head]) else 0
        while before < revision:
            now = int(store.compare_set(head, str(before or ""), str(revision)))
            if now == revision:
                break
            before = now
        return before

    def _trim(self, store: Store, revision: int) -> None:
        """Delete this version and those before it, the oldest first: whoever is killed over it leaves no gap."""
        first = revision
        while store.check([self._key(first)]):
            first -= 1
        for old in range(first + 1, revision + 1):
            store.delete_key(self._key(old))

    def _revision(self, store: Store) -> int:
        head = self._prefix + "head"
        revision = int(store.get(head)) if store.check([head]) else 0
        while store.check([self._key(revision + 1)]):
            revision += 1
        return revision

    def _load(self, store: Store) -> WorldRecord | None:
        revision = self._revision(store)
        return _record(store.get(self._key(revision))) if revision else None

    def _look(self, store: Store) -> News:
        number = int(store.add(self._prefix + "news", 0))
        record, found, expired = self._load(store), [], set()
        for order in range(int(store.add(self._prefix + "joined", 0))):
            key = self._prefix + f"node/{order}"
            if store.check([key]):
                if self._alive(order, int(store.add(self._prefix + f"beat/{order}", 0))):
                    found.append(store.get(key))
                else:
                    expired.add(order)
        self._expired = frozenset(expired)
        nodes, unreadable = announcements(found)
        return News(number=number, record=record, nodes=nodes, unreadable=unreadable)

    def _alive(self, order: int, beats: int) -> bool:
        now = self._clock.now()
        with self._seeing:
            known, at = self._seen.get(order, (-1, now))
            if beats != known:
                self._seen[order] = (beats, now)
            return beats != known or now < at + self._ttl

    def _tell(self, store: Store) -> None:
        """Wake whoever watches."""
        number = int(store.add(self._prefix + "news", 1))
        store.set(self._prefix + f"news/{number}", "")
        store.delete_key(self._prefix + f"news/{number - _KEPT_NEWS}")

    def _mapped(self, call: Callable[[], _T], watching: bool = False) -> _T:
        """A store call with torch's errors turned into ours, in bounded time unless it is ``watching``."""
        if self._closed:
            raise StoreLost(f"the connection to the control store at {self._where[0]}:{self._where[1]} was closed")
        try:
            # torch's client waits for the answer of a host that is gone for as long as TCP does.
            return self._tried(call, True) if watching else self._caller.call(lambda: self._tried(call), self._timeout)
        except TimeoutError:
            raise self._lost(f"nothing for {self._timeout:g} s") from None

    def _tried(self, call: Callable[[], _T], watching: bool = False) -> _T:
        """The connection of a call that failed is given up."""
        try:
            return call()
        except (dist.DistError, RuntimeError) as error:
            if watching:
                self._watching = None
            else:
                self._calls = None
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> StoreLost:
        if _refuses(*self._where):
            return self._gone()
        return StoreLost(f"the control store at {self._where[0]}:{self._where[1]} does not answer: {why}")

    def _gone(self) -> StoreGone:
        return StoreGone(
            f"the control store at {self._where[0]}:{self._where[1]} has ended: nobody listens there any more"
        )


def _connect(host: str, port: int, timeout: float) -> TCPStore:
    try:
        return TCPStore(host, port, None, False, timedelta(seconds=timeout), wait_for_workers=False)
    except (dist.DistError, RuntimeError, OSError) as error:
        raise StoreLost(f"no store answers at {host}:{port}: {error}") from error


def _refuses(host: str, port: int) -> bool:
    """Whether nobody listens there; a host that is silent may only be cut off."""
    try:
        socket.create_connection((host, port), _PROBE).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def _record(data: bytes) -> WorldRecord:
    return WorldRecord.from_json(json_object(data))
