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


def cleanable(
    good: Collection[Key], damaged: Collection[Key], incomplete: Collection[Key], keep: int | None
) -> list[tuple[Key, str]]:
    """What may be removed by hand, oldest first, each with the reason; the newest good checkpoint never goes.

    Args:
        good: committed checkpoints that can be read as far as was looked.
        damaged: committed ones that cannot; they count for nothing, and only those older than all that is kept go.
        incomplete: folders without a manifest.
        keep: how many good ones stay (at least one); None: no committed checkpoint goes.
    """
    ordered = sorted(good)
    if not ordered:
        return []
    gone = [(key, "unfinished, older than the newest good one") for key in incomplete if key < ordered[-1]]
    if keep is not None:
        kept = ordered[-max(1, keep) :]
        gone += [(key, f"superseded by {len(kept)} newer") for key in ordered[: -len(kept)]]
        gone += [(key, "damaged, older than all that is kept") for key in damaged if key < kept[0]]
    return sorted(gone)
