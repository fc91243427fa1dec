"""No world trains beside another: what a new world has to wait for.

Theory of operation.  Whoever cannot reach the store cannot hear that its world was replaced.  So the store's word that
a world is the current one *vouches* for it for `Timing.vouch` seconds only, reckoned from the moment of asking on the
asking node's own clock; a rank whose node has no such word begins no further step, and keeps its state, until there is
one again.  All ranks of a world step together, so one node without the store stops its world.

A new world that shares a node with the one before cannot form before that node has left the old one.  Where it shares
none, the job is parked first.  From then on the store vouches for the old world no more, so it has stopped for sure
after `Timing.fence`, which is longer than `Timing.vouch` by more than clocks can drift apart; or at once where one of
its nodes says so, or its agent is gone and took its workers along.  The record names the worlds of which that is not
known yet (`WorldRecord.former`).

A world whose script nobody knows to be elastic is followed at once, as none of its processes would wait.  One that
turns out to be elastic has not stepped by then: its ranks wait for the record to say so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from resilient_train.plan.suspicion import AGENT_GONE
from resilient_train.plan.view import View
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import Former, WorldRecord, node_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A reason not to begin a new world yet."""

    reason: str
    """What is waited for, for people and to be remembered."""
    seconds: float
    """How long it has to stand."""
    world: Former
    """The world that may still train."""


def waits(view: View, record: WorldRecord) -> list[Wait]:
    """What a world that follows a parked one, or shares no node with those before, has to wait for."""
    found = []
    for world in _former(view, record):
        here = [name for name in world.nodes if name in view.nodes]
        # Who is there will say when it has left, perhaps at a boundary that is still to come.
        seconds = view.limits.patience if here else max(world.fence, view.timing.fence)
        kind = "leave" if here else "have stopped"
        found.append(Wait(reason=f"generation {world.generation} must {kind}", seconds=seconds, world=world))
    return found


def after(view: View, record: WorldRecord, new: WorldRecord) -> WorldRecord:
    """``new``, which is to follow ``record``; parked, if its members could train beside those of ``record``."""
    if new.generation == record.generation:
        return new
    former = _former(view, record)
    if record.members and not _has_ended(view, record):
        nodes = tuple(dict.fromkeys(map(node_of, record.members)))
        former = [world for world in former if not set(world.nodes) >= set(nodes)]
        former.append(Former(generation=record.generation, nodes=nodes, fence=record.fence))
        if new.members and not shares(view, nodes, new.members):
            text = f"{new.reason}; others take over once it has stopped"
            new = replace(new, members=(), reason=text)
    return replace(new, former=tuple(former))


def shares(view: View, nodes: Sequence[str], members: Collection[str]) -> bool:
    """Whether a world of ``members`` cannot form before one on ``nodes`` has stopped: they have a node in common."""
    return any(node_of(member) in nodes and node_of(member) in view.nodes for member in members)


def _former(view: View, record: WorldRecord) -> list[Former]:
    """Worlds before the record's that may still train."""
    formed = record.resumed() is not None or any(
        worker.formed == record.generation for node in view.nodes.values() for worker in node.workers
    )
    # All members of a world have left the ones before when it has formed.
    return [] if formed else [world for world in record.former if not _has_stopped(view, world)]


def _has_stopped(view: View, world: Former) -> bool:
    nodes = [view.nodes[name] for name in world.nodes if name in view.nodes]
    return any(_has_left(node, world.generation) for node in nodes) or _is_gone(view, world.nodes)


def _has_left(node: NodeInfo, generation: int) -> bool:
    """Whether a node knows of a later generation, and none of its workers can be in ``generation`` any more."""
    return node.generation > generation and all(
        worker.idle or worker.acknowledged > generation or not worker.elastic for worker in node.workers
    )


def _has_ended(view: View, record: WorldRecord) -> bool:
    """Whether the record's own world lacks a process."""
    exits = view.exits()
    nodes = tuple(dict.fromkeys(map(node_of, record.members)))
    return any(member in exits for member in record.members) or _is_gone(view, nodes)


def _is_gone(view: View, nodes: Sequence[str]) -> bool:
    return any(view.lost.get(name) == AGENT_GONE and name not in view.nodes for name in nodes)
