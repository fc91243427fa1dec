"""The embedded control store: torch's TCPStore, served by one agent.

One key holds each version of the record and is created only if absent, which is the compare-and-swap.  A watch is a
wait for the next version's key on a connection of its own: a wait blocks every other call of the same client.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import Store, TCPStore

from resilient_train.errors import FormatError, StoreLost
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord

_KEPT_VERSIONS = 16
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

    def __init__(self, host: str, port: int, job: str, timeout: float = 30.0) -> None:
        """Connects to a server.

        Args:
            host: where it listens.
            port: its port.
            job: the job's id; jobs with different ids do not see each other.
            timeout: seconds to wait for the server.

        Raises:
            StoreLost: if it cannot be reached.
        """
        self._prefix = f"resilient_train/{job}/"
        self._calls = _connect(host, port, timeout)
        self._watching = _connect(host, port, timeout)

    def load(self) -> WorldRecord | None:
        return _mapped(lambda: self._load(self._calls))

    def _load(self, store: Store) -> WorldRecord | None:
        head = self._prefix + "head"
        revision = int(store.get(head)) if store.check([head]) else 0
        while store.check([self._key(revision + 1)]):
            revision += 1
        return _record(store.get(self._key(revision))) if revision else None

    def swap(self, record: WorldRecord) -> WorldRecord:
        def swap() -> WorldRecord:
            key = self._key(record.revision)
            text = json.dumps(record.to_json())
            if record.revision > 1 and not self._calls.check([self._key(record.revision - 1)]):
                newest = self._load(self._calls)
                if newest is None:
                    raise StoreLost("the store has lost the job's record")
                return newest
            won = self._calls.compare_set(key, "", text)
            if won == text.encode():
                self._calls.set(self._prefix + "head", str(record.revision))
                self._calls.delete_key(self._key(record.revision - _KEPT_VERSIONS))
            return _record(won)

        return _mapped(swap)

    def join(self) -> int:
        return _mapped(lambda: int(self._calls.add(self._prefix + "joined", 1)) - 1)

    def announce(self, info: NodeInfo) -> None:
        def announce() -> None:
            self._calls.set(self._prefix + f"node/{info.order}", json.dumps(info.to_json()))
            self._calls.add(self._prefix + f"beat/{info.order}", 1)

        _mapped(announce)

    def nodes(self) -> list[tuple[NodeInfo, int]]:
        def nodes() -> list[tuple[NodeInfo, int]]:
            found = []
            for order in range(int(self._calls.add(self._prefix + "joined", 0))):
                key = self._prefix + f"node/{order}"
                if self._calls.check([key]):
                    beat = int(self._calls.add(self._prefix + f"beat/{order}", 0))
                    found.append((NodeInfo.from_json(_json(self._calls.get(key))), beat))
            return found

        return _mapped(nodes)

    def watch(self, revision: int, timeout: float) -> WorldRecord | None:
        def watch() -> WorldRecord | None:
            try:
                self._watching.wait([self._key(revision + 1)], timedelta(seconds=timeout))
            except dist.DistStoreError as error:
                if "timeout" in str(error).lower():
                    return None
                raise
            return self._load(self._watching)

        return _mapped(watch)

    def close(self) -> None:
        del self._calls, self._watching

    def _key(self, revision: int) -> str:
        return self._prefix + f"record/{revision}"


def _connect(host: str, port: int, timeout: float) -> TCPStore:
    try:
        return TCPStore(host, port, None, False, timedelta(seconds=timeout), wait_for_workers=False)
    except (dist.DistError, RuntimeError, OSError) as error:
        raise StoreLost(f"no store answers at {host}:{port}: {error}") from error


def _mapped(call: Callable[[], _T]) -> _T:
    """A store call with torch's errors turned into ours."""
    try:
        return call()
    except (dist.DistError, RuntimeError) as error:
        raise StoreLost(f"the control store does not answer: {error}") from error


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise FormatError(f"the control store holds no JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError("the control store holds something else than an object")
    return value


def _record(data: bytes) -> WorldRecord:
    return WorldRecord.from_json(_json(data))
