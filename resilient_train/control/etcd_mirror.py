"""A copy of a job's keys that follows etcd: read once, then kept up by a watch.

A watch that died with its member looks exactly like one that has nothing to tell.  So the copy is compared with etcd
every now and then, by a read that finds a member which answers; the watch moves to that member.  That is soon where
some other answer of etcd told of a revision that the watch has not come to, and seldom where none did.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from resilient_train.clock import Clock
from resilient_train.control import etcd_messages as messages
from resilient_train.control.etcd_client import EtcdClient
from resilient_train.errors import StoreLost

_QUIET = 4
"""Times as long may pass between two comparisons where nothing tells of a change."""
_PAUSE = 0.02
"""Seconds from the end of a watch to the next read."""
_BRIEF = 1.0
"""A watch that ends within so many seconds ends for a reason that lasts; each pause is twice the one before then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A range of keys at one revision."""

    number: int
    """The revision."""
    values: dict[bytes, Any]
    """Each key with its `KeyValue`."""


class EtcdMirror:
    """The keys under a prefix, followed on a connection of its own; for one thread at a time."""

    def __init__(
        self,
        client: EtcdClient,
        prefix: bytes,
        timeout: float,
        reread: float,
        clock: Clock,
        told: Callable[[], int],
    ) -> None:
        """Args:
        client: for nobody else; closed with the mirror.
        prefix: of the keys.
        timeout: seconds in which a read must succeed.
        reread: seconds after which a quiet copy is compared with etcd, if there is something new.
        clock: for both.
        told: the newest revision of etcd, whatever it changed, that other calls have heard of; from any thread.
        """
        self._client = client
        self._prefix = prefix
        self._timeout = timeout
        self._reread = reread
        self._clock = clock
        self._told = told
        self._compared = 0
        """The newest revision that this copy is known to have come to."""
        self._skipped = 0
        self._values: dict[bytes, Any] | None = None
        self._number = 0
        self._next_read = 0.0
        self._watching_since = 0.0
        self._pause = _PAUSE
        self._stream: Any = None
        self._member: Any = None
        self._heard: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._closed = False

    def changed(self, number: int, timeout: float) -> Keys | None:
        """Wait up to ``timeout`` seconds for a state that is newer than ``number``.

        Raises:
            StoreLost: if no member answers; the next call begins anew.
        """
        deadline = self._clock.now() + timeout
        try:
            while not self._closed:
                if self._values is None or self._clock.now() >= self._next_read:
                    self._compare()
                if self._number > number:
                    return Keys(number=self._number, values=dict(self._values or {}))
                now = self._clock.now()
                if now >= deadline:
                    return None
                self._listen(min(deadline, self._next_read) - now)
        except StoreLost:
            self._end_stream()
            self._values = None
            if not self._closed:
                raise
        return None

    def close(self) -> None:
        """A blocked `changed` ends."""
        self._closed = True
        self._end_stream()
        self._client.close()
        self._heard.put((None, None))

    def _compare(self) -> None:
        if self._stream is not None and self._told() <= self._compared and self._skipped < _QUIET:
            self._skipped += 1
            self._next_read += self._reread
        else:
            self._skipped = 0
            self._read()

    def _read(self) -> None:
        """Compare with etcd, and make sure that there is a watch."""
        answer = read(self._client, self._prefix, self._timeout)
        values = {kv.key: kv for kv in answer.kvs}
        if self._values is None or _revisions(values) != _revisions(self._values):
            self._end_stream()
            self._number, self._values = answer.header.revision, values
        self._compared = answer.header.revision
        # Everybody reads everybody's keys: the more there are, the more seldom.
        self._next_read = self._clock.now() + self._reread * max(1.0, len(values) / 100)
        if self._stream is None:
            self._watching_since = self._clock.now()
            self._stream, self._member = self._client.watch(
                self._prefix, messages.prefix_end(self._prefix), answer.header.revision
            )
            pump = threading.Thread(target=_pump, args=(self._stream, self._heard), name="etcd watch", daemon=True)
            pump.start()

    def _listen(self, seconds: float) -> None:
        """Wait for the next answer of the watch, and take it in."""
        try:
            stream, answer = self._heard.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return
        if stream is None or stream is not self._stream or self._values is None:
            return
        if answer is None or answer.canceled:
            # The member or its leader is gone, the user's token too old, or what should be told is compacted away.
            if answer is None:
                self._client.leave(self._member)
            self._end_stream()
            now = self._clock.now()
            self._pause = min(2 * self._pause, self._reread) if now < self._watching_since + _BRIEF else _PAUSE
            self._next_read = now + self._pause
            return
        for event in answer.events:
            if event.type == messages.DELETE:
                self._values.pop(event.kv.key, None)
            else:
                self._values[event.kv.key] = event.kv
            self._number = max(self._number, event.kv.mod_revision)
        # Not the answer's own revision: a watch's first answer comes before the changes up to that.
        self._compared = max(self._compared, self._number)

    def _end_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()


def read(client: EtcdClient, prefix: bytes, timeout: float) -> Any:
    """All keys under a prefix as they are now, by agreement of the members."""
    return client.call("Range", timeout, key=prefix, range_end=messages.prefix_end(prefix))


def _revisions(values: dict[bytes, Any]) -> dict[bytes, int]:
    return {key: kv.mod_revision for key, kv in values.items()}


def _pump(stream: Any, heard: queue.SimpleQueue[tuple[Any, Any]]) -> None:
    try:
        for answer in stream:
            heard.put((stream, answer))
    except grpc.RpcError:
        pass  # That is how every watch ends.
    finally:
        heard.put((stream, None))
