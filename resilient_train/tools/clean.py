"""Remove what nobody needs at a URL, and never the last good checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from resilient_train.plan.retention import cleanable
from resilient_train.storage.commit import folder_of
from resilient_train.storage.tier import Tier
from resilient_train.tools.survey import COMMITTED, DAMAGED, UNFINISHED, Checkpoint, survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What could go and what stays."""

    doomed: tuple[tuple[Checkpoint, str], ...]
    """What would be removed, oldest first, each with the reason."""
    kept: tuple[Checkpoint, ...]
    """The rest, newest last."""


def propose(tier: Tier, keep: int | None) -> Proposal:
    """What may be removed now.

    A checkpoint counts as good if its manifest can be read and all its images are there with their lengths; what
    stands in them is not read (`resilient_train.tools.verify` does that).

    Args:
        tier: where.
        keep: how many good checkpoints stay; None: only unfinished leftovers go.
    """
    found = survey(tier, sizes=True)
    keys = {state: [one.key for one in found if one.state == state] for state in (COMMITTED, DAMAGED, UNFINISHED)}
    reasons = dict(cleanable(keys[COMMITTED], keys[DAMAGED], keys[UNFINISHED], keep))
    return Proposal(
        doomed=tuple((one, reasons[one.key]) for one in found if one.key in reasons),
        kept=tuple(one for one in found if one.key not in reasons),
    )


def remove(tier: Tier, proposal: Proposal, keep: int | None) -> list[Checkpoint]:
    """Remove what was proposed as far as it still may go, since a job may have written meanwhile; what was removed.

    Raises:
        StorageError: if something could not be removed; what stands before it in the proposal is gone.
    """
    still = {one.key for one, _ in propose(tier, keep).doomed}
    gone = [one for one, _ in proposal.doomed if one.key in still]
    for one in gone:
        tier.delete(folder_of(one.key))
    return gone
