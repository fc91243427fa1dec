"""Which durable checkpoints may go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from resilient_train.spec.world import Key, in_ancestry


def superseded(
    committed: Collection[Key], incomplete: Collection[Key], keep_last: int, past: Mapping[int, int | None]
) -> list[Key]:
    """Checkpoints to remove, oldest first.

    Those older than the newest ``keep_last`` (at least one) committed ones; and unfinished ones older than the newest
    committed one, which nobody can still be writing.  States that the job has gone back behind, because they were
    damaged for instance, do not count among those to keep.

    Args:
        committed: whole, as far as their manifests say.
        incomplete: folders without a manifest.
        keep_last: how many stay.
        past: the job's ancestry.
    """
    ordered = sorted(committed)
    # Of jobs before the last one nothing is known, and they may have been sound.
    kept = [key for key in ordered if key.lineage not in past or in_ancestry(key, past)][-max(1, keep_last) :]
    gone = [key for key in ordered if kept and key < kept[0]]
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
