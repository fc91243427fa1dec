"""How a member of a job's own etcd begins: it founds the cluster together with others, or joins the one there is.

A member that lost its data must never be taken for the one that had it: what a majority agreed on would be forgotten.
So a cluster is founded only by a majority of members that have nothing yet, each of which takes part in one founding at
a time, and whoever comes later is a new member, in place of the lost one.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

GRACE = 3.0
"""Seconds that a majority waits for the others before it founds the cluster without them."""


class Begin(Enum):
    """What to do now."""

    JOIN = "join the cluster that is there"
    FOUND = "offer the founding to the others that wait"
    WAIT = "wait for more members, or for another's offer"


def begin(me: int, size: int, waiting: Collection[int], cluster: bool, waited: float) -> Begin:
    """What a member without data does.

    Args:
        me: its place in the list of members.
        size: length of the list.
        waiting: places of the others that have nothing yet.
        cluster: whether a cluster answers that has a leader.
        waited: seconds since a majority has been waiting.
    """
    if cluster:
        return Begin.JOIN
    present = len(waiting) + 1
    if 2 * present <= size or (present < size and waited < GRACE):
        return Begin.WAIT
    return Begin.FOUND if all(me < other for other in waiting) else Begin.WAIT
