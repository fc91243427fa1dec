"""The agent's state machine: what one node does about the agreed world.

``step(state, event, now) -> (state, effects)``.  Events are what the agent sees (its workers' words and ends, the
record, other nodes); effects are what it is to do (spawn, tell, stop, announce, swap, end).  The machine has no clock
and no IO; `resilient_train.agent.agent` runs it, tests run it under a manual clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from resilient_train.errors import ExitCode
from resilient_train.plan.proposal import View, is_new_restore, propose
from resilient_train.spec.messages import (
    Acknowledge,
    Boundaries,
    Busy,
    Done,
    Hello,
    Message,
    Promise,
    Resumed,
    Stage,
    UserFailed,
    WorldIs,
)
from resilient_train.spec.node import ExitInfo, NodeInfo, WorkerInfo
from resilient_train.spec.rank import RankReport
from resilient_train.spec.world import (
    Key,
    Phase,
    Restore,
    WorldRecord,
    incarnation_of,
    member_id,
    node_of,
    slot_of,
)

FAILED_STARTS = 3
"""Replacement processes in one slot that may die before they are warm; then the slot is given up."""
RESPAWN_AFTER = 1.0
"""Seconds between a new generation and the start of replacements, which would take the survivors' processor time."""
GRACE = 10.0
"""Seconds for workers to end by themselves once the job failed."""


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordSeen:
    """The record, as read, swapped or heard of; ``None`` says that no record exists."""

    record: WorldRecord | None


@dataclass(frozen=True, slots=True)
class NodesSeen:
    """The other nodes that are alive."""

    nodes: tuple[NodeInfo, ...]


@dataclass(frozen=True, slots=True)
class WorkerSpawned:
    """A worker process runs."""

    member: str


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    """A worker sent a message."""

    member: str
    message: Message


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker process ended; ``code`` is minus the signal's number if a signal ended it."""

    member: str
    code: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The furthest local worker, as the board shows it: (generation, finished steps)."""

    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class Hung:
    """A local worker hangs and is about to be ended."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Deadlocked:
    """The ranks of a generation wait for each other."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """Where the local workers are, while the job stands still; empty once it goes on."""

    reports: tuple[RankReport, ...]


@dataclass(frozen=True, slots=True)
class EndpointReady:
    """This agent serves a fresh TCPStore for the next generation at host:port."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Something on this node asks for the end of the job."""

    text: str
    exit_code: ExitCode = ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    RecordSeen
    | NodesSeen
    | WorkerSpawned
    | WorkerSaid
    | WorkerExited
    | Progress
    | Hung
    | Deadlocked
    | Stuck
    | EndpointReady
    | StopAsked
    | Tick
)


# ---- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Swap:
    """Try to make this the next version of the record; then report the record as it is."""

    record: WorldRecord


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the other nodes."""

    info: NodeInfo


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a worker process."""

    member: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End a worker process: SIGTERM, then SIGKILL."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Say:
    """Print a line for people."""

    text: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to a worker."""

    member: str
    message: Message


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a `Tick` at this time."""

    at: float


@dataclass(frozen=True, slots=True)
class End:
    """Nothing is left to do."""

    code: ExitCode
    text: str


Effect = Swap | Announce | Spawn | Stop | Say | Tell | Wake | End


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """An agent's whole knowledge."""

    view: View
    """What proposals are made from."""
    swapping: bool = False
    """A swap is under way; its outcome comes as `RecordSeen`."""
    seen_at: float = 0.0
    """When the current generation was first seen."""
    failed_starts: Mapping[int, int] = field(default_factory=dict)
    """For each slot the replacements that died before they were warm."""
    stopping: frozenset[str] = frozenset()
    """Workers that were told to end."""
    spawning: frozenset[str] = frozenset()
    """Workers whose start was asked for."""
    over_at: float | None = None
    """When the job was first seen to be over."""
    ended: bool = False
    """`End` was said."""

    @property
    def info(self) -> NodeInfo:
        """This node."""
        return self.view.nodes[self.view.me]

    def worker(self, member: str) -> WorkerInfo | None:
        """A living local worker."""
        return next((w for w in self.info.workers if w.member == member), None)


def step(state: State, event: Event, now: float) -> tuple[State, list[Effect]]:
    """Take in one event; return what to do."""
    before = state
    state = _take_in(state, event, now)
    effects: list[Effect] = []
    if state.info != before.info:
        effects.append(Announce(state.info))
    for slot in sorted(_given_up(state) - _given_up(before)):
        effects.append(Say(f"slot {slot} is given up: {FAILED_STARTS} replacements in a row died while starting"))
    state, tellings = _tell(before, state, event)
    effects += tellings
    state, doings = _local(state, now)
    effects += doings
    if not state.swapping and not state.ended:
        proposal = propose(state.view, now)
        since = {reason: state.view.since.get(reason, now) for reason in proposal.reasons}
        state = replace(state, view=replace(state.view, since=since), swapping=proposal.record is not None)
        if proposal.record is not None:
            effects.append(Swap(proposal.record))
        if proposal.wake_at is not None:
            effects.append(Wake(proposal.wake_at))
    return state, effects


# ---- taking events in -----------------------------------------------------------------------------------------------


def _take_in(state: State, event: Event, now: float) -> State:
    match event:
        case RecordSeen(record):
            return _new_record(state, record, now)
        case NodesSeen(nodes):
            known = {node.node: node for node in nodes if node.node != state.view.me}
            return replace(state, view=replace(state.view, nodes={**known, state.view.me: state.info}))
        case WorkerSpawned(member):
            workers = (*state.info.workers, WorkerInfo(member=member))
            return _with_info(replace(state, spawning=state.spawning - {member}), workers=workers)
        case WorkerExited(member, code):
            return _worker_exited(state, member, code)
        case WorkerSaid(member, message):
            return _worker_said(state, member, message)
        case Progress(generation, finished):
            return _with_info(state, progress=(generation, finished))
        case Hung(member, reason):
            return _with_worker(state, member, hung=reason)
        case Deadlocked(generation, reason):
            return replace(state, view=replace(state.view, hang=(generation, reason)))
        case Stuck(reports):
            return _with_info(state, stuck=reports)
        case EndpointReady(endpoint):
            return _with_info(state, endpoint=endpoint)
        case StopAsked(text, exit_code):
            return _with_info(state, failed=text, exit_code=int(exit_code))
        case Tick():
            return state


def _with_info(state: State, **changes: Any) -> State:
    info = replace(state.info, **changes)
    return replace(state, view=replace(state.view, nodes={**state.view.nodes, info.node: info}))


def _with_worker(state: State, member: str, **changes: Any) -> State:
    workers = tuple(replace(w, **changes) if w.member == member else w for w in state.info.workers)
    return _with_info(state, workers=workers)


def _new_record(state: State, record: WorldRecord | None, now: float) -> State:
    old = state.view.record
    state = replace(state, swapping=False)
    if record is None or (old is not None and record.revision <= old.revision):
        return state
    view = replace(state.view, record=record)
    if old is None or record.generation != old.generation:
        state = replace(state, seen_at=now)
        view = replace(view, margin=2)
    elif old.planned is not None and record.planned is None:
        view = replace(view, margin=min(256, view.margin * 2))
    if record.phase is not Phase.RUNNING and state.over_at is None:
        state = replace(state, over_at=now)
    if view.resume is not None and not is_new_restore(record, view.resume):
        view = replace(view, resume=None)
    state = replace(state, view=view)
    for worker in state.info.workers:
        if worker.member in record.members and worker.idle:
            state = _with_worker(state, worker.member, idle=False)
    return state


def _worker_exited(state: State, member: str, code: int) -> State:
    worker = state.worker(member) or WorkerInfo(member=member)
    ended = ExitInfo(
        member=member,
        code=code,
        elastic=worker.elastic,
        acknowledged=worker.acknowledged,
        done=worker.done,
        hung=worker.hung,
    )
    workers = tuple(w for w in state.info.workers if w.member != member)
    state = replace(state, spawning=state.spawning - {member})
    if incarnation_of(member) > 0 and not worker.acknowledged and member not in state.stopping:
        slot = slot_of(member)
        state = replace(state, failed_starts={**state.failed_starts, slot: state.failed_starts.get(slot, 0) + 1})
    # Only the newest ends matter; a long job must not grow its announcements.
    exits = (*state.info.exits, ended)[-4 * state.info.slots :]
    state = _with_info(state, workers=workers, exits=exits)
    running = any(node.workers for node in state.view.nodes.values()) or state.spawning
    if not running and _given_up(state) == set(range(state.info.slots)):
        text = f"no worker of this job runs and none can be started any more; the last one {ended.describe()}"
        return _with_info(state, failed=text, culprit=member)
    return state


def _given_up(state: State) -> set[int]:
    return {slot for slot, count in state.failed_starts.items() if count >= FAILED_STARTS}


def _worker_said(state: State, member: str, message: Message) -> State:
    if state.worker(member) is None:
        return state
    record = state.view.record
    match message:
        case Hello(multiple=multiple, most=most):
            named = record is not None and member in record.members
            return _with_worker(state, member, elastic=True, idle=not named, multiple=multiple, most=most)
        case Acknowledge(generation=generation):
            state = replace(state, failed_starts={**state.failed_starts, slot_of(member): 0})
            return _with_worker(state, member, acknowledged=generation)
        case Stage(generation=generation, stage="formed"):
            return _with_worker(state, member, formed=generation)
        case Boundaries(generation=generation):
            return _with_worker(state, member, stepping=generation)
        case Busy(name=name):
            return _with_worker(state, member, busy=name)
        case Promise(number=number, accepted=accepted):
            return _with_worker(state, member, **({"promised": number} if accepted else {"declined": number}))
        case Done(generation=generation):
            return _with_worker(state, member, done=generation)
        case UserFailed(text=text):
            return _with_info(state, failed=text, culprit=member, exit_code=int(ExitCode.USER_ERROR))
        case Resumed(generation=generation, lineage=lineage, source=source):
            key = None if source is None else Key(*source)
            restore = Restore(generation=generation, lineage=lineage, source=key)
            return replace(state, view=replace(state.view, resume=restore))
        case _:
            return state


# ---- what follows on this node --------------------------------------------------------------------------------------


def _tell(before: State, state: State, event: Event) -> tuple[State, list[Effect]]:
    """Every elastic worker hears every version of the record, and the current one when it says hello."""
    record = state.view.record
    if record is None:
        return state, []
    if before.view.record != record:
        return state, [Tell(w.member, WorldIs(record=record.to_json())) for w in state.info.workers if w.elastic]
    if isinstance(event, WorkerSaid) and isinstance(event.message, Hello) and state.worker(event.member):
        return state, [Tell(event.member, WorldIs(record=record.to_json()))]
    return state, []


def _local(state: State, now: float) -> tuple[State, list[Effect]]:
    """Spawn what is missing, stop what does not belong, end when all is over."""
    record = state.view.record
    if record is None or state.ended:
        return state, []
    if record.phase is not Phase.RUNNING:
        return _wind_up(state, record, now)
    state, effects = _stop_outsiders(state, record)
    wanted = [m for m in record.members if node_of(m) == state.view.me and not _known(state, m)]
    if any(worker.member in state.stopping for worker in state.info.workers):
        # They may still hold devices, ports and files that their successors need.
        wanted = []
    more, wake = _replacements(state, record, now)
    wanted += more
    effects += [Spawn(member) for member in wanted]
    if wake is not None:
        effects.append(Wake(wake))
    return replace(state, spawning=state.spawning | set(wanted)), effects


def _known(state: State, member: str) -> bool:
    ended = any(item.member == member for item in state.info.exits)
    return ended or member in state.spawning or state.worker(member) is not None


def _stop_outsiders(state: State, record: WorldRecord) -> tuple[State, list[Effect]]:
    """Old processes end when the record gives their slots to newer ones: the group restarts."""
    newest = {slot_of(m): incarnation_of(m) for m in record.members if node_of(m) == state.view.me}
    gone = [
        w.member
        for w in state.info.workers
        if incarnation_of(w.member) < newest.get(slot_of(w.member), 0) and w.member not in state.stopping
    ]
    stops: list[Effect] = [Stop(member, record.reason) for member in gone]
    return replace(state, stopping=state.stopping | set(gone)), stops


def _replacements(state: State, record: WorldRecord, now: float) -> tuple[list[str], float | None]:
    """Ids of processes to start in slots that lost theirs, and when to ask again."""
    if not state.view.elastic():
        return [], None
    taken = {slot_of(w.member) for w in state.info.workers} | {slot_of(m) for m in state.spawning}
    vacant = [slot for slot in range(state.info.slots) if slot not in taken | _given_up(state)]
    if not vacant or any(w.done == record.generation for w in state.info.workers):
        return [], None
    alive = state.view.workers()
    members_alive = [m for m in record.members if m in alive]
    if members_alive:
        settled = len(members_alive) == record.size and all(alive[m].formed == record.generation for m in members_alive)
        if not settled:
            return [], None
        if now < state.seen_at + RESPAWN_AFTER:
            return [], state.seen_at + RESPAWN_AFTER
    return [member_id(state.view.me, slot, _next_incarnation(state, slot)) for slot in vacant], None


def _next_incarnation(state: State, slot: int) -> int:
    seen = [*(w.member for w in state.info.workers), *(e.member for e in state.info.exits)]
    record = state.view.record
    seen += [m for m in (record.members if record else ()) if node_of(m) == state.view.me]
    return 1 + max((incarnation_of(m) for m in seen if slot_of(m) == slot), default=-1)


def _wind_up(state: State, record: WorldRecord, now: float) -> tuple[State, list[Effect]]:
    """The job is over: members end by themselves, everybody else is stopped."""
    limit = (now if state.over_at is None else state.over_at) + GRACE
    overdue = record.phase is Phase.FAILED and now >= limit
    gone = [
        w.member
        for w in state.info.workers
        if w.member not in state.stopping
        and (overdue or w.member not in record.members or (record.phase is Phase.FAILED and not w.elastic))
    ]
    effects: list[Effect] = [Stop(member, "the job is over") for member in gone]
    state = replace(state, stopping=state.stopping | set(gone))
    if state.info.workers or state.spawning:
        if record.phase is Phase.FAILED:
            effects.append(Wake(max(limit, now + 0.1)))
        return state, effects
    return replace(state, ended=True), [*effects, _end(state, record)]


def _end(state: State, record: WorldRecord) -> End:
    if record.phase is Phase.FAILED:
        return End(ExitCode(record.exit_code), record.error)
    # A kill after the agreed end changes nothing; how a process ends by itself is still the script's result.
    late = [
        e
        for e in state.info.exits
        if e.member in record.members and e.code != 0 and not (e.killed and e.done == record.generation)
    ]
    if late:
        rank = record.members.index(late[0].member)
        return End(ExitCode.USER_ERROR, f"rank {rank} {late[0].describe()} after the training had finished")
    return End(ExitCode.SUCCESS, "")
