"""The contract of a control store; `resilient_train.testing.control` holds the suite that every one passes."""

from __future__ import annotations

from typing import Protocol

from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord


class ControlStore(Protocol):
    """One job's record, changed by compare-and-swap, and the announcements of its nodes.

    All methods may block for a round trip and raise `resilient_train.errors.StoreLost` if the store does not answer;
    none may be called from a thread that must stay live.
    """

    def load(self) -> WorldRecord | None:
        """The newest version of the record; None before the first."""
        ...

    def swap(self, record: WorldRecord) -> WorldRecord:
        """Put ``record`` in place of the version before it (``record.revision - 1``).

        Returns the version that now stands at that revision: ``record`` itself, or that of whoever was first.
        """
        ...

    def join(self) -> int:
        """A number for a node that takes part from now on: 0, 1, 2, ... in the order of joining."""
        ...

    def announce(self, info: NodeInfo) -> None:
        """Publish this node's announcement and a sign of life."""
        ...

    def nodes(self) -> list[tuple[NodeInfo, int]]:
        """Every announcement that was ever made, with a count of signs of life.

        A node is alive while its count grows on the observer's clock; clocks are never compared.
        """
        ...

    def watch(self, revision: int, timeout: float) -> WorldRecord | None:
        """Wait up to ``timeout`` seconds for a version newer than ``revision``; the newest one, or None."""
        ...

    def close(self) -> None:
        """Let go of connections; a blocked `watch` ends."""
        ...
