"""Which durable checkpoints may go."""

from __future__ import annotations

from collections.abc import Collection

from resilient_train.spec.world import Key


def superseded(committed: Collection[Key], incomplete: Collection[Key], keep_last: int) -> list[Key]:
    """Checkpoints to remove, oldest first: all but the newest ``keep_last`` committed ones (at least one stays), and
    unfinished ones older than the newest committed one, which nobody can still be writing."""
    ordered = sorted(committed)
    gone = ordered[: max(0, len(ordered) - max(1, keep_last))]
    if ordered:
        gone += [key for key in incomplete if key < ordered[-1]]
    return sorted(gone)
