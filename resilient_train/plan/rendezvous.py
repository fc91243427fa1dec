"""The rendezvous of plain torchrun: which nodes form the next round, decided by each of them from the same facts.

The record's generation is the round, its members are nodes.  A node's announcement has one worker, the node's agent:
*idle* while it waits to be named in a round, and the newest round that it took part in as *acknowledged*.  A round that
is named begins when all of its nodes have acknowledged it, and is given up as soon as one is gone or waits again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.world import Phase, WorldRecord

TURN = 1.0
"""Seconds after which the next in line proposes, if the first does not."""
STUCK = 60.0
"""Seconds that nodes of a broken round get to stop their workers and come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the job asks of a round."""

    minimum: int
    """Fewest nodes."""
    maximum: int
    """Most nodes; the others wait as spares."""
    last_call: float
    """Seconds that the first round waits for more nodes once it has the fewest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a node sees while it waits."""

    me: str
    """The node."""
    left: int
    """The newest round that it left, or gave up; 0 for none."""
    acknowledged: int
    """The newest round that it acknowledged."""
    record: WorldRecord | None
    """The job's record."""
    nodes: Sequence[NodeInfo]
    """The announcements of all nodes that are not known to be dead."""


class Say(Enum):
    """What a node does next."""

    WAIT = "wait for news"
    CLOSED = "end: the rendezvous is closed"
    ACKNOWLEDGE = "acknowledge the newest round"
    GIVE_UP = "give the newest round up, and wait for the next"
    BEGIN = "begin the newest round"
    PROPOSE = "propose the next round"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A decision."""

    say: Say
    """What to do."""
    until: float | None = None
    """Decide again after so many seconds without a change of `gathered`; None: only then."""
    record: WorldRecord | None = None
    """The proposal."""


def announcement(node: str, order: int, endpoint: str, waiting: bool, acknowledged: int) -> NodeInfo:
    """What a node says of itself; ``endpoint`` is that of the store it serves for a round that it leads."""
    agent = WorkerInfo(member=node, idle=waiting, acknowledged=acknowledged)
    return NodeInfo(node=node, order=order, endpoint=endpoint, slots=1, workers=(agent,))


def gathered(view: View) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes that wait for the next round, in order, and those that are still in the newest."""
    waiting = tuple(node.node for node in view.nodes if _waits(node, view.record))
    members = () if view.record is None else view.record.members
    there = {node.node for node in view.nodes} - set(waiting)
    return waiting, tuple(node for node in members if node in there)


def step(view: View, terms: Terms, quiet: float) -> Step:
    """What a node does that waits in the rendezvous.

    Args:
        view: what it sees.
        terms: the job's.
        quiet: seconds since `gathered` changed.
    """
    record = view.record
    if record is not None and record.phase is not Phase.RUNNING:
        return Step(say=Say.CLOSED)
    if record is not None and view.me in record.members and record.generation > view.left:
        return _enter(view, record)
    waiting, still_there = gathered(view)
    if view.me not in waiting or len(waiting) < terms.minimum:
        return Step(say=Say.WAIT)
    if still_there:
        # Those of a round that is well come if there is room; those of a broken one stop their workers first.
        if not lost(record, view.nodes):
            return Step(say=Say.WAIT)
        if quiet < STUCK:
            return Step(say=Say.WAIT, until=STUCK)
    full = len(waiting) >= terms.maximum
    chosen = waiting[: terms.maximum]
    if view.me not in chosen:
        return Step(say=Say.WAIT)
    due = TURN * chosen.index(view.me) + (terms.last_call if record is None and not full else 0.0)
    if still_there:
        due += STUCK
    if quiet < due:
        return Step(say=Say.WAIT, until=due)
    return Step(say=Say.PROPOSE, record=_proposal(view, chosen))


def nodes_waiting(view: View, terms: Terms, missing: Mapping[str, float], patience: float) -> int:
    """For how many nodes a node that is in a round stops its workers, to form the next one with them.

    Args:
        view: what it sees.
        terms: the job's.
        missing: seconds since each member of the round disappeared that did.
        patience: seconds after which such a node is taken for lost; etcd that was frozen forgets nodes that live.
    """
    record = view.record
    if record is None or record.phase is not Phase.RUNNING:
        return 0
    if view.me not in record.members or record.generation > view.acknowledged:
        return 1
    waiting, _ = gathered(view)
    gone = [node for node in lost(record, view.nodes) if missing.get(node, patience) >= patience]
    if gone:
        return max(1, len(waiting))
    return max(0, min(len(waiting), terms.maximum - len(record.members)))


def lost(record: WorldRecord | None, nodes: Sequence[NodeInfo]) -> tuple[str, ...]:
    """The members of a round that are gone, or wait for the next one."""
    there = {node.node: node for node in nodes}
    members = () if record is None else record.members
    return tuple(node for node in members if node not in there or _waits(there[node], record))


def closing(record: WorldRecord | None) -> WorldRecord:
    """The record of a rendezvous that is closed."""
    if record is None:
        reason = "closed before the first round"
        return WorldRecord(revision=1, generation=1, members=(), bootstrap="", reason=reason, phase=Phase.FINISHED)
    return replace(record, revision=record.revision + 1, phase=Phase.FINISHED)


def _enter(view: View, record: WorldRecord) -> Step:
    if view.acknowledged < record.generation:
        return Step(say=Say.ACKNOWLEDGE)
    there = {node.node: node for node in view.nodes}
    others = [node for node in record.members if node != view.me]
    if any(node not in there or _waits(there[node], record) for node in others):
        return Step(say=Say.GIVE_UP)
    begun = all(there[node].workers[0].acknowledged >= record.generation for node in others)
    return Step(say=Say.BEGIN if begun else Say.WAIT)


def _waits(node: NodeInfo, record: WorldRecord | None) -> bool:
    """Whether a node waits for the next round; not so if the newest one names it and it has not seen that yet."""
    agent = node.workers[0]
    named = record is not None and node.node in record.members and agent.acknowledged < record.generation
    return agent.idle and not named


def _proposal(view: View, chosen: Sequence[str]) -> WorldRecord:
    first = next(node for node in view.nodes if node.node == chosen[0])
    before = view.record
    return WorldRecord(
        revision=1 if before is None else before.revision + 1,
        generation=1 if before is None else before.generation + 1,
        members=tuple(chosen),
        bootstrap=first.endpoint,
        reason=f"{len(chosen)} nodes met",
        proposer=view.me,
    )
