"""The next version of the world record: a pure function of what one agent knows.

Every agent evaluates the same function.  The compare-and-swap on the record decides who was first; whoever loses reads
the new record and evaluates again.  To keep them from all trying at once, an agent waits its turn: the node of the
lowest-ranked surviving member proposes first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from resilient_train.errors import ExitCode
from resilient_train.plan import fence
from resilient_train.plan.suspicion import AGENT_GONE
from resilient_train.plan.view import View
from resilient_train.spec.node import ExitInfo, NodeInfo, WorkerInfo
from resilient_train.spec.world import (
    Phase,
    Planned,
    Restore,
    WorldRecord,
    incarnation_of,
    member_id,
    node_of,
    slot_of,
)

KEPT_RESTORES = 200
"""Length of the log of restores in the record; older states are long gone from every tier that matters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What to do about the record."""

    record: WorldRecord | None = None
    """The version to swap in, if any."""
    reasons: frozenset[str] = frozenset()
    """The reasons that stand; the caller remembers since when."""
    wake_at: float | None = None
    """When to ask again although nothing happened."""
    give_up: str = ""
    """Why there will be no world at all, if so."""


def propose(view: View, now: float) -> Proposal:
    """The next version of the record, or what is being waited for."""
    proposal = _propose(view, now)
    if view.record is not None and view.elastic():
        proposal = _fenced(view, view.record, proposal, now)
    if proposal.record is not None and not proposal.record.elastic and view.elastic():
        return replace(proposal, record=replace(proposal.record, elastic=True))
    return proposal


def _fenced(view: View, record: WorldRecord, proposal: Proposal, now: float) -> Proposal:
    """The proposal, once no world before can train beside it any more."""
    waits = _Waits(view, now)
    pending = [wait.world for wait in fence.waits(view, record) if not waits.over(wait.reason, wait.seconds)]
    new = None if proposal.record is None else fence.after(view, record, proposal.record)
    if new is not None and new.generation > record.generation and new.members:
        new = None if any(not fence.shares(view, world.nodes, new.members) for world in pending) else new
    standing = waits.proposal(new)
    times = [at for at in (proposal.wake_at, standing.wake_at) if at is not None]
    return replace(
        proposal, record=new, reasons=proposal.reasons | standing.reasons, wake_at=min(times) if times else None
    )


def _propose(view: View, now: float) -> Proposal:
    record = view.record
    if view.doubted:
        return Proposal()
    if record is None:
        return _first_world(view, now)
    if record.phase is not Phase.RUNNING:
        return Proposal()
    alive, exits = view.workers(), view.exits()
    waits = _Waits(view, now)
    turn = _turn(view, record, alive)
    failed = next((node for node in view.nodes.values() if _fails_all(node, record)), None)
    if failed is not None:
        over = waits.over("failed", 0.0 if failed.node == view.me else turn)
        after = _failure(view, record, failed.failed, failed.culprit, failed.exit_code)
        return waits.proposal(after if over else None)
    if view.resume is not None and is_new_restore(record, view.resume):
        return Proposal(record=_with_restore(view, record, view.resume))
    if view.wish is not None and not view.wish.fulfilled(record):
        leave = tuple(dict.fromkeys((*record.leave, *view.wish.leave)))
        room = view.wish.room or record.room
        return Proposal(record=record.successor(leave=leave, room=room, proposer=view.me))
    if not record.members:
        return _unpark(view, record, now)
    if all(_is_done(member, record, alive, exits) for member in record.members):
        after = record.successor(phase=Phase.FINISHED, planned=None, proposer=view.me)
        return waits.proposal(after if waits.over("finished", turn) else None)
    lost = [member for member in record.members if _is_lost(member, alive, exits)]
    if lost:
        return _after_loss(view, record, lost, now)
    if not view.elastic():
        return Proposal()
    if view.hang[0] == record.generation:
        return _after_hang(view, record, view.hang[1], now)
    left = [m for m in record.members if m not in alive and not exits[m].elastic]
    if left:
        text = f"{_names(left, record)} ended without calling the elastic function that others are in"
        return Proposal(record=_failure(view, record, text, left[0]))
    change = _misfit(view, record) or _late(view, record, waits) or _never_there(view, record, waits)
    if change is None and view.silent:
        # Nothing is wrong; what could be better waits for the store, and is no reason to give up on it.
        return waits.proposal()
    if change is None and record.planned is not None:
        change = _planned_change(view, record, record.planned, waits)
    elif change is None:
        change = _wished_change(view, record, waits)
    return waits.proposal(change)


def _fails_all(node: NodeInfo, record: WorldRecord) -> bool:
    """Whether an error that a node announces ends the job: not if the world has gone on without the worker."""
    return node.failed != "" and (
        node.failed_in is None or node.failed_in == record.generation or node.culprit in record.members
    )


def _is_lost(member: str, alive: Mapping[str, WorkerInfo], exits: Mapping[str, ExitInfo]) -> bool:
    """Its process ended, or its node is gone; success of a process of its own is no loss."""
    ended = exits.get(member)
    return member not in alive and (ended is None or ended.elastic or ended.code != 0)


class _Waits:
    """Collects the reasons that stand, and when the next of them has stood long enough."""

    def __init__(self, view: View, now: float) -> None:
        self._since = view.since
        self._now = now
        self._reasons: set[str] = set()
        self._wake_at: float | None = None

    def over(self, reason: str, seconds: float) -> bool:
        """Whether ``reason`` has stood for ``seconds``."""
        self._reasons.add(reason)
        at = self._since.get(reason, self._now) + seconds
        if self._now >= at:
            return True
        self._wake_at = at if self._wake_at is None else min(at, self._wake_at)
        return False

    def proposal(self, record: WorldRecord | None = None) -> Proposal:
        """``record`` if there is one, and what is being waited for."""
        return Proposal(record=record, reasons=frozenset(self._reasons), wake_at=self._wake_at)


def is_new_restore(record: WorldRecord, restore: Restore) -> bool:
    """Whether a reported restore is to be logged: it may come late, but not after a later generation's."""
    logged = record.restores[-1].generation if record.restores else 0
    return logged < restore.generation <= record.generation


def _with_restore(view: View, record: WorldRecord, restore: Restore) -> WorldRecord:
    log = (*record.restores, restore)[-KEPT_RESTORES:]
    return record.successor(restores=log, proposer=view.me)


def _is_done(member: str, record: WorldRecord, alive: Mapping[str, WorkerInfo], exits: Mapping[str, ExitInfo]) -> bool:
    if member in alive:
        return alive[member].done == record.generation
    ended = exits.get(member)
    return ended is not None and (ended.done == record.generation or (not ended.elastic and ended.code == 0))


def _turn(view: View, record: WorldRecord, alive: Mapping[str, WorkerInfo]) -> float:
    """Seconds until it is this node's turn to propose."""
    order = list(dict.fromkeys(node_of(m) for m in record.members if m in alive))
    order += sorted(set(view.nodes) - set(order))
    return view.timing.turn * order.index(view.me) if view.me in order else 0.0


def _first_world(view: View, now: float) -> Proposal:
    limits = view.limits
    here = (node for node in view.nodes.values() if not node.leaving)
    nodes = sorted(here, key=lambda node: node.order)[: limits.max_nodes]
    waits = _Waits(view, now)
    if len(nodes) < limits.min_nodes:
        over = waits.over("too few nodes", limits.patience)
        text = f"{len(nodes)} of at least {limits.min_nodes} nodes came within {limits.patience:g} s"
        return replace(waits.proposal(), give_up=text if over else "")
    if nodes[0].node != view.me:
        return Proposal()
    if len(nodes) < limits.max_nodes and not waits.over("last call", limits.last_call):
        return waits.proposal()
    members = tuple(member_id(node.node, slot, 0) for node in nodes for slot in range(node.slots))
    record = WorldRecord(
        revision=1,
        generation=1,
        members=members,
        bootstrap=nodes[0].endpoint,
        fence=view.timing.fence,
        reason="start",
        proposer=view.me,
    )
    return Proposal(record=record)


def _failure(
    view: View, record: WorldRecord, error: str, culprit: str, exit_code: int = ExitCode.USER_ERROR
) -> WorldRecord:
    return record.successor(
        phase=Phase.FAILED, error=error, culprit=culprit, exit_code=int(exit_code), planned=None, proposer=view.me
    )


def _regroup(view: View, record: WorldRecord, members: set[str], reason: str, boundary: int | None) -> WorldRecord:
    ordered = view.in_order(members)
    host = view.nodes.get(node_of(ordered[0]), view.nodes[view.me]) if ordered else view.nodes[view.me]
    return record.successor(
        generation=record.generation + 1,
        members=ordered,
        bootstrap=host.endpoint,
        fence=view.timing.fence,
        reason=reason,
        boundary=boundary,
        planned=None,
        proposer=view.me,
    )


def _after_hang(view: View, record: WorldRecord, reason: str, now: float) -> Proposal:
    """The same members form again; what makes them hang again and again at one step is no matter of chance."""
    waits = _Waits(view, now)
    if not waits.over(f"hang in {record.generation}", view.timing.coalesce + _turn(view, record, view.workers())):
        return waits.proposal()
    resumed, stalls = _stalls(record, counts=True)
    if stalls >= view.limits.crashes_at_step:
        error = f"{stalls} losses in a row set the job back to step {max(0, resumed)}; the last: {reason}"
        return waits.proposal(_failure(view, record, error, "", ExitCode.NO_PROGRESS))
    after = _regroup(view, record, set(record.members), f"{reason}; all form again", None)
    return waits.proposal(replace(after, stalls=stalls, stalled_at=resumed))


def _after_loss(view: View, record: WorldRecord, lost: list[str], now: float) -> Proposal:
    waits = _Waits(view, now)
    alive, exits = view.workers(), view.exits()
    wait = view.timing.coalesce + _turn(view, record, alive)
    if any(m not in exits and node_of(m) not in view.lost for m in lost):
        # This node has just come, and the store may have let everybody's announcement expire.
        wait += view.timing.unseen
    if not waits.over(f"lost in {record.generation}", wait):
        return waits.proposal()
    if _more_fall_silent(view, record, lost) and not waits.over(
        f"more fall silent in {record.generation}", view.timing.fellows
    ):
        return waits.proposal()
    ended = [exits[m] for m in lost if m in exits]
    # A worker that ends itself before it ever entered an elastic function has a broken script, not a broken machine.
    broken = [e for e in ended if not e.elastic and not e.killed]
    if broken or not view.elastic():
        return _restart_group(view, record, lost, broken or ended, waits)
    text = f"lost {_names(lost, record)}{_cause(view, lost, ended)}"
    counts = _counts(record, ended, alive)
    resumed, stalls = _stalls(record, counts)
    limit = view.limits.kills_at_step if all(e.killed for e in ended) else view.limits.crashes_at_step
    if counts and stalls >= limit:
        error = f"{stalls} losses in a row set the job back to step {max(0, resumed)}; the last: {text}"
        return waits.proposal(_failure(view, record, error, lost[0], ExitCode.NO_PROGRESS))
    # Who is idle and warm takes a lost rank's place in the same transition.
    survivors = {m for m in record.members if m in alive}
    members = view.fitting(survivors | view.idle(), survivors)
    if not view.enough(members):
        # Too few for a world: whoever is left lets go of this one and waits, its images safe with the keepers.
        members = set()
        text += "; too few are left, waiting for replacements"
        if not survivors:
            return _too_few(view, record, waits)
    after = _regroup(view, record, members, text, None)
    steps = [step for g, step in (node.progress for node in view.nodes.values()) if g == record.generation]
    best = max([record.best_step, *steps])
    return waits.proposal(replace(after, stalls=stalls, stalled_at=resumed, best_step=best))


def _cause(view: View, lost: Sequence[str], ended: Sequence[ExitInfo]) -> str:
    """What is known of how members were lost, for people."""
    causes = [f"node {node}: {view.lost[node]}" for node in dict.fromkeys(map(node_of, lost)) if node in view.lost]
    causes += [ended[0].describe()] if ended else []
    return f" ({'; '.join(causes)})" if causes else ""


def _unpark(view: View, record: WorldRecord, now: float) -> Proposal:
    """Begin again as soon as enough workers are idle."""
    waits = _Waits(view, now)
    members = view.fitting(view.idle())
    if not view.enough(members):
        return _too_few(view, record, waits)
    if not waits.over("enough", view.timing.coalesce + _turn(view, record, view.workers())):
        return waits.proposal()
    starting = _starting(view, members)
    if starting and not waits.over(f"{starting} are starting", view.timing.gather):
        return waits.proposal()
    return waits.proposal(_regroup(view, record, members, f"{len(members)} workers are ready again", None))


def _more_fall_silent(view: View, record: WorldRecord, lost: Sequence[str]) -> bool:
    """Whether what was lost fell silent, and further nodes of the world are about to be lost the same way.

    A rack without power is one event: its nodes' announcements expire one after the other within a few beats.
    """
    if any(m in view.exits() or view.lost.get(node_of(m), AGENT_GONE) == AGENT_GONE for m in lost):
        return False
    return bool(view.fading & {node_of(m) for m in record.members if node_of(m) in view.nodes})


def _counts(record: WorldRecord, ended: Sequence[ExitInfo], alive: Mapping[str, WorkerInfo]) -> bool:
    """Whether a loss tells something about the script, so that it may not come again and again.

    Members that went together with their node do not.  Nor do those that were killed before their world had formed:
    what takes several of them one after the other is one event; unless nobody is left of it, for then it begins anew.
    """
    if not ended:
        return False
    left = [alive[m] for m in record.members if m in alive]
    began = record.resumed() is not None or not left or any(w.formed == record.generation for w in left)
    return began or not all(e.killed for e in ended)


def _stalls(record: WorldRecord, counts: bool) -> tuple[int, int]:
    """(step that the lost generation had resumed, losses in a row without a later one), this one if it ``counts``.

    What a generation computed and lost again is no progress: what counts is from where the next one could go on.
    """
    logged = record.resumed()
    if logged is None:
        return record.stalled_at, record.stalls + counts
    step = logged.source.step if logged.source else 0
    return step, (0 if step > record.stalled_at else record.stalls) + counts


def _names(members: list[str], record: WorldRecord) -> str:
    ranks = sorted(record.members.index(member) for member in members)
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _restart_group(view: View, record: WorldRecord, lost: list[str], ended: list[ExitInfo], waits: _Waits) -> Proposal:
    """All start over; what a script did itself uses up its restarts, the loss of a node does not."""
    what = f"{_names(lost, record)} {ended[0].describe()}" if ended else f"lost {_names(lost, record)}"
    what += "" if ended else _cause(view, lost, ended)
    if ended and record.restarts >= view.limits.max_restarts:
        if ended[0].killed and not view.elastic():
            what += "; nobody had called an elastic function yet, and until then only --max-restarts helps"
        return waits.proposal(_failure(view, record, what, ended[0].member))
    newest: dict[tuple[str, int], int] = {}
    for member in [*view.workers(), *view.exits(), *record.members]:
        place = (node_of(member), slot_of(member))
        newest[place] = max(newest.get(place, 0), incarnation_of(member))
    here = sorted((node for node in view.nodes.values() if not node.leaving), key=lambda node: node.order)
    members = {
        member_id(node.node, slot, newest.get((node.node, slot), -1) + 1)
        for node in here[: view.room()]
        for slot in range(node.slots)
    }
    if not view.enough(members):
        return _too_few(view, record, waits)
    after = _regroup(view, record, members, f"{what}; the group restarts", None)
    return waits.proposal(replace(after, restarts=record.restarts + (1 if ended else 0)))


def _too_few(view: View, record: WorldRecord, waits: _Waits) -> Proposal:
    """Wait for nodes, for a bounded time."""
    limits = view.limits
    if not waits.over(f"too few in {record.generation}", limits.patience + _turn(view, record, view.workers())):
        return waits.proposal()
    here = [node for node in view.nodes.values() if not node.leaving]
    few = f"fewer than {limits.min_nodes} nodes"
    if len(here) >= limits.min_nodes and view.multiple() > 1:
        few = f"fewer ranks than the mesh takes, which is a multiple of {view.multiple()},"
    text = f"{few} for {limits.patience:g} s"
    return waits.proposal(_failure(view, record, text, "", ExitCode.PARKED))


def _misfit(view: View, record: WorldRecord) -> WorldRecord | None:
    """The first world is agreed before the workers can say what their mesh takes."""
    members = view.fitting(set(record.members), room=len(view.nodes))
    if len(members) == record.size or not members:
        return None
    text = f"the mesh takes {len(members)} of {record.size} ranks; the others stand by"
    return _regroup(view, record, members, text, None)


def _late(view: View, record: WorldRecord, waits: _Waits) -> WorldRecord | None:
    """Members whose main thread does not come free are left out, alive, and return when they are idle again."""
    alive = view.workers()
    ready = {m for m in record.members if alive[m].acknowledged == record.generation}
    # Before a boundary only newcomers are ready; nobody is late until the first member has reached it.
    waited_for = ready if record.boundary is None else {m for m in ready if alive[m].formed}
    # Who has not entered the elastic function yet is still starting up, which takes as long as it takes.
    late = [m for m in record.members if m not in ready and alive[m].elastic]
    if not waited_for or not late or view.silent:
        return None
    if not waits.over(f"late in {record.generation}", view.timing.acknowledge):
        return None
    text = f"{_names(late, record)} did not come free within {view.timing.acknowledge:g} s"
    in_time = set(record.members) - set(late)
    members = view.fitting(in_time | view.idle(), in_time)
    if not view.enough(members):
        members = set()
        text += "; too few are left, waiting for replacements"
    return _regroup(view, record, members, text, None)


def _never_there(view: View, record: WorldRecord, waits: _Waits) -> WorldRecord | None:
    """A boundary that the world before cannot reach, since a node that only it had members on was lost on the way."""
    alive = view.workers()
    if record.boundary is None or all(alive[m].acknowledged == record.generation for m in record.members):
        return None
    gone = sorted({node_of(m) for m in view.before} & view.lost.keys() - view.nodes.keys())
    if not gone or not waits.over(
        f"gone before {record.generation}", view.timing.coalesce + _turn(view, record, alive)
    ):
        return None
    text = f"{record.reason}; lost on the way to the boundary: {', '.join(gone)}"
    return _regroup(view, record, set(record.members), text, None)


def _wished_change(view: View, record: WorldRecord, waits: _Waits) -> WorldRecord | None:
    """Take idle workers in and let leaving nodes go, at a boundary if the script has boundaries."""
    alive = view.workers()
    generation = record.generation
    staying = {m for m in record.members if not view.nodes[node_of(m)].leaving}
    joining = view.idle() - set(record.members)
    settled = all(alive[m].formed == generation and alive[m].done != generation for m in record.members)
    if not settled:
        return None
    members = view.fitting(staying | joining, staying)
    if not view.enough(members):
        members = set()
    if members == set(record.members):
        return None
    back = any(node_of(member) in view.lost for member in joining)
    changing = ", ".join(sorted(members ^ set(record.members)))
    if not waits.over(
        f"{changing} would change place",
        (view.timing.rejoin if back else view.timing.coalesce) + _turn(view, record, alive),
    ):
        return None
    starting = _starting(view, joining)
    if starting and not waits.over(f"{starting} are starting", view.timing.gather):
        return None
    text = _describe_change(view, record, members)
    if not fence.shares(view, [node_of(m) for m in record.members], members):
        # Those who are to go on must not begin before those who leave have come to the boundary.
        members = set()
    if not all(alive[m].stepping == generation for m in record.members):
        # Without a state to resume, a change would cost everything that was computed so far; a node that leaves will
        # cost that anyway.
        leaving = len(staying) < record.size
        if (leaving or record.resumed() is not None) and waits.over(
            f"no boundary in {generation}", view.timing.no_boundary
        ):
            return _regroup(view, record, members, text, None)
        return None
    steps = [step for g, step in (node.progress for node in view.nodes.values()) if g == generation]
    if not steps or not waits.over(f"margin {view.margin}", view.timing.retry if view.margin > 2 else 0.0):
        return None
    number = record.revision + 1
    planned = Planned(number=number, boundary=max(steps) + view.margin, members=view.in_order(members), reason=text)
    return record.successor(planned=planned, proposer=view.me)


def _starting(view: View, joining: Collection[str]) -> str:
    """Workers that are not warm yet, of nodes of which others could join."""
    nodes = sorted({node_of(member) for member in joining})
    return ", ".join(worker.member for node in nodes for worker in view.nodes[node].workers if not worker.elastic)


def _describe_change(view: View, record: WorldRecord, members: set[str]) -> str:
    joined = len(members - set(record.members))
    leaving = [
        node for node in view.nodes.values() if node.leaving and any(node_of(m) == node.node for m in record.members)
    ]
    parts = [f"joined by {joined} worker" + ("s" if joined > 1 else "")] if joined else []
    parts += [f"node {node.node} leaves ({node.leaving})" for node in leaving]
    if not members:
        parts.append("too few are left, waiting for replacements")
    before, after = ({node_of(m) for m in some} for some in (record.members, members))
    if len(before) > view.room() or len(after) > view.limits.max_nodes:
        parts.append(f"scaled to {view.room()} node" + ("s" if view.room() > 1 else ""))
    return "; ".join(parts) or f"{len(members)} of {record.size} ranks go on"


def _planned_change(view: View, record: WorldRecord, planned: Planned, waits: _Waits) -> WorldRecord | None:
    """Carry out a planned change that everybody promised, or take it back."""
    alive = view.workers()
    gone = any(member not in alive for member in planned.members)
    declined = any(alive[m].declined >= planned.number or alive[m].done == record.generation for m in record.members)
    expired = waits.over(f"promises to {planned.number}", view.timing.promise)
    promised = all(alive[m].promised == planned.number for m in record.members)
    if not (gone or declined or expired or promised):
        return None
    # All agents come to know it at about the same time.
    if not waits.over(f"all is known of {planned.number}", _turn(view, record, alive)):
        return None
    if promised and not gone and not declined:
        return _regroup(view, record, set(planned.members), planned.reason, planned.boundary)
    return record.successor(planned=None, proposer=view.me)
