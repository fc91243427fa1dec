"""Everything one agent knows, and what it makes of it when it looks at who is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from resilient_train.spec.node import ExitInfo, NodeInfo, WorkerInfo
from resilient_train.spec.world import Restore, WorldRecord, node_of, slot_of

_VOUCH, _VOUCH_LEAST = 6.0, 20.0
"""How long the store's word holds: times what a loss may go unnoticed, and at least so many seconds, as a store that
is restarted must not stop training."""
_DRIFT = 1.05
"""How much faster than another a node's clock may go, with much to spare."""
_KEPT_LOST = 64
"""Lost nodes that are remembered besides those that the record names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long decisions wait, in seconds."""

    coalesce: float = 0.02
    """For further reasons of the same kind, before a change is proposed."""
    turn: float = 0.05
    """For each proposer whose turn comes before."""
    acknowledge: float = 10.0
    """For a member whose main thread does not come free while others are ready to form."""
    promise: float = 2.0
    """For all promises to a planned change."""
    retry: float = 0.25
    """Before another planned change is tried."""
    no_boundary: float = 5.0
    """For a script to step through boundaries before it is taken for one that does not."""
    gather: float = 3.0
    """For workers that are starting, once others of their nodes could join: one change instead of several."""
    rejoin: float = 2.0
    """For a node that was lost and is back to stay reachable, before it is taken in again."""
    fellows: float = 2.5
    """For nodes that fall silent together with one that is lost: one change instead of several."""
    unseen: float = 6.0
    """For a node that the record names and that was never seen to announce itself, before it counts as lost."""
    vouch: float = 30.0
    """For a world to go on without the store's word that it is the current one."""
    fence: float = 36.5
    """For a world of which nothing is heard to have run out of that word."""

    @classmethod
    def scaled(cls, within: float) -> Timing:
        """The timing of a job that wants to notice a loss within so many seconds."""
        vouch = max(_VOUCH_LEAST, _VOUCH * within)
        return cls(
            vouch=vouch,
            fence=_DRIFT * vouch + within,
            acknowledge=2 * within,
            no_boundary=within,
            rejoin=0.4 * within,
            fellows=0.5 * within,
            unseen=1.2 * within,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the job tolerates."""

    min_nodes: int = 1
    """Fewer nodes than this cannot form a world."""
    max_nodes: int = 1
    """More are not used."""
    max_restarts: int = 0
    """Restarts of the whole group of a script that is not elastic."""
    last_call: float = 5.0
    """Seconds to wait for further nodes once ``min_nodes`` are there; later ones join at a step boundary."""
    patience: float = 600.0
    """Seconds to wait for ``min_nodes`` nodes, at the start or after losses."""
    crashes_at_step: int = 3
    """Losses in a row, by processes' own doing, that all set the job back to the same step, and so end it."""
    kills_at_step: int = 6
    """The same for processes killed from outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What somebody wants the job's record to say."""

    leave: tuple[str, ...]
    """Nodes that are to leave."""
    room: int
    """The most nodes that may take part; 0: as before."""

    def fulfilled(self, record: WorldRecord) -> bool:
        """Whether the record says so."""
        return set(self.leave) <= set(record.leave) and self.room in (0, record.room)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything one agent knows."""

    me: str
    """This node."""
    limits: Limits
    """What the job tolerates."""
    nodes: Mapping[str, NodeInfo] = field(default_factory=dict)
    """All nodes that are alive, this one included."""
    record: WorldRecord | None = None
    """The agreed world, None before the first."""
    since: Mapping[str, float] = field(default_factory=dict)
    """When each standing reason was first seen."""
    before: tuple[str, ...] = ()
    """The members of the generation before, if this node saw it."""
    silent: bool = False
    """The store does not answer, so nothing new is known of others' workers."""
    margin: int = 2
    """How many steps ahead a boundary is planned; doubled when somebody declines."""
    hang: tuple[int, str] = (0, "")
    """(generation, reason) of a generation whose ranks wait for each other."""
    resume: Restore | None = None
    """A restore that is not in the record yet."""
    timing: Timing = field(default_factory=Timing)
    """How long decisions wait."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Nodes that were announced and are gone, and why."""
    fading: frozenset[str] = frozenset()
    """Nodes that take part and of which nothing is heard: they may be about to be lost."""
    wish: Wish | None = None
    """What was wished for at this node."""
    doubted: bool = False
    """The others cannot reach this node, so it leaves proposing to them."""

    def workers(self) -> dict[str, WorkerInfo]:
        """All living workers by id, and members whose process is about to be started."""
        known = {w.member: w for node in self.nodes.values() for w in node.workers if not w.hung}
        members = self.record.members if self.record else ()
        missing = [m for m in members if m not in known and node_of(m) in self.nodes]
        if missing:
            ended = self.exits()
            known.update({m: WorkerInfo(member=m) for m in missing if m not in ended})
        return known

    def exits(self) -> dict[str, ExitInfo]:
        """All ended workers by id, and those that hang: they live until their stacks are written down, but take part in
        nothing any more."""
        hung = [w for node in self.nodes.values() for w in node.workers if w.hung]
        ended = {item.member: item for node in self.nodes.values() for item in node.exits}
        return ended | {w.member: ended_as_hung(w) for w in hung}

    def in_order(self, members: set[str]) -> tuple[str, ...]:
        """Members in the order of their ranks: by node, then slot."""

        def place(member: str) -> tuple[int, str, int]:
            node = self.nodes.get(node_of(member))
            return (node.order if node else 1 << 30, node_of(member), slot_of(member))

        return tuple(sorted(members, key=place))

    def fitting(self, members: set[str], prefer: Collection[str] = (), room: int = 0) -> set[str]:
        """As many of ``members`` as there is room (on ``room`` nodes, if given) and the script's mesh takes, those in
        ``prefer`` first.

        The others stand by.
        """
        workers = self.workers().values()
        multiple = self.multiple()
        most = min((worker.most for worker in workers if worker.most), default=len(members))
        ordered = sorted(self.in_order(members), key=lambda member: member not in prefer)
        ordered = self._with_room(ordered, room or self.room())[:most]
        return set(ordered[: len(ordered) - len(ordered) % multiple])

    def multiple(self) -> int:
        """What the script's mesh takes a multiple of, as far as it has said."""
        return max((worker.multiple for worker in self.workers().values()), default=1)

    def _with_room(self, members: Sequence[str], room: int) -> list[str]:
        """The first of ``members`` for which there is a slot on one of ``room`` nodes."""
        used: dict[str, int] = {}
        found = []
        for member in members:
            node = node_of(member)
            slots = self.nodes[node].slots if node in self.nodes else 0
            if used.get(node, 0) < slots and (node in used or len(used) < room):
                used[node] = used.get(node, 0) + 1
                found.append(member)
        return found

    def room(self) -> int:
        """The most nodes that may take part."""
        return (self.record.room if self.record else 0) or self.limits.max_nodes

    def all_lost(self, more: Mapping[str, str]) -> dict[str, str]:
        """``lost`` and those that are now; who came back stays among them until the next change of the world."""
        lost = {**self.lost, **more}
        named = {node_of(member) for member in self.record.members} if self.record else set()
        kept = [*lost][-_KEPT_LOST:]
        return {node: why for node, why in lost.items() if node in named or node in kept}

    def enough(self, members: Collection[str]) -> bool:
        """Whether a world of ``members`` spans the nodes that the job needs at least."""
        return len({node_of(m) for m in members}) >= max(1, self.limits.min_nodes)

    def idle(self) -> set[str]:
        """Workers that can be named in a world: warm, on nodes that stay, that everybody reaches and that are heard."""
        doubted = {name for node in self.nodes.values() for name in node.suspects}
        return {
            worker.member
            for node in self.nodes.values()
            if not node.leaving and not node.suspects and node.node not in doubted | self.fading
            for worker in node.workers
            if worker.idle
        }

    def elastic(self) -> bool:
        """Whether the script is elastic: any of its workers ever said hello."""
        if self.record is not None and self.record.elastic:
            return True
        return any(w.elastic for w in self.workers().values()) or any(e.elastic for e in self.exits().values())


def ended_as_hung(worker: WorkerInfo) -> ExitInfo:
    """How a worker ends that hangs."""
    return ExitInfo(
        member=worker.member,
        code=-9,
        elastic=worker.elastic,
        acknowledged=worker.acknowledged,
        done=worker.done,
        hung=worker.hung,
    )
