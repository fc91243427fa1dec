"""The contract of a control store; `resilient_train.testing.control` holds the suite that every one passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Everything that a job's store says at one moment."""

    number: int
    """Grows with every change; `ControlStore.watch` waits for a greater one."""
    record: WorldRecord | None
    """The newest version of the record; None before the first."""
    nodes: tuple[NodeInfo, ...]
    """The announcements that have neither expired nor been withdrawn, by `NodeInfo.order`."""
    unreadable: tuple[str, ...] = ()
    """What is wrong with announcements that cannot be read."""


class ControlStore(Protocol):
    """One job's record, changed by compare-and-swap, and the announcements of its nodes, which expire.

    All methods may block for a bounded time and raise `resilient_train.errors.StoreLost` if the store does not
    answer; none may be called from a thread that must stay live.  After `StoreLost` the next call tries to reach the
    store again.  A store that holds the record in the memory of one process raises `StoreGone` once that process has
    ended; one that may come back with the record never does.  `JobReplaced` says that another job has begun under this
    one's id.  `watch` has a connection of its own and may be called beside the others, from one thread at a time.
    """

    lasting: bool
    """Whether the store outlives every single node; where not, it is gone for good when its host is."""

    def join(self) -> int:
        """A number for a node that takes part from now on: 0, 1, 2, ... in the order of joining."""
        ...

    def secret(self) -> str:
        """A secret of the job, 64 hexadecimal digits: made at random by whoever asks first, then the same for all."""
        ...

    def swap(self, record: WorldRecord) -> WorldRecord:
        """Put ``record`` in place of the version before it (``record.revision - 1``).

        Returns the version that now stands at that revision: ``record`` itself, or that of whoever was first.  After an
        answer that got lost, asking again with the same record tells which it was.
        """
        ...

    def announce(self, info: NodeInfo) -> None:
        """Publish this node's announcement, in place of the one before; also a sign of life."""
        ...

    def beat(self) -> None:
        """A sign of life: without one for `ttl` seconds this node's announcement expires, and with one it is back."""
        ...

    def withdraw(self) -> None:
        """Take this node's announcement back: it leaves in good order."""
        ...

    def revision(self) -> int:
        """The revision of the newest version of the record at some time after this was called; 0 if there is none.

        What other methods return may be older than that.
        """
        ...

    def look(self) -> News:
        """Everything as it is now."""
        ...

    def watch(self, number: int, timeout: float) -> News | None:
        """Wait up to ``timeout`` seconds for a change after ``number``; the news, or None.

        Expiry counts as a change.  A watch may also end early with news that say nothing new.
        """
        ...

    def close(self) -> None:
        """Let go of connections; a blocked `watch` ends, and whatever is asked later fails.  Twice is harmless."""
        ...
