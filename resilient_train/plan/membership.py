"""The agent's state machine: what one node does about the agreed world.

``step(state, event, now) -> (state, effects)``.  Events are what the agent sees (its workers' words and ends, the
record, other nodes); effects are what it is to do (spawn, tell, stop, announce, swap, end).  The machine has no clock
and no IO; `resilient_train.agent.agent` runs it, tests run it under a manual clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from resilient_train.errors import ExitCode
from resilient_train.plan.events import (
    Announce,
    Deadlocked,
    Effect,
    End,
    EndpointReady,
    Event,
    Hung,
    KeeperServes,
    LeaveAsked,
    NodesSeen,
    Progress,
    RecordSeen,
    Save,
    Say,
    Spawn,
    Stop,
    StopAsked,
    StoreSilent,
    Stuck,
    Superseded,
    Swap,
    Tell,
    Tick,
    Vouch,
    Vouched,
    Wake,
    Wished,
    WorkerExited,
    WorkerSaid,
    WorkerSpawned,
)
from resilient_train.plan.proposal import is_new_restore, propose
from resilient_train.plan.terms import conflict
from resilient_train.plan.view import View, Wish
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
    Troubled,
    UserFailed,
    WorldIs,
)
from resilient_train.spec.node import ExitInfo, NodeInfo, WorkerInfo
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

_LONGEST_ERROR = 4000
"""Characters of a script's error that are told to all."""
FAILED_STARTS = 3
"""Replacement processes in one slot that may die before they are warm; then the slot is given up."""
STORE_RETRY = 0.5
"""Seconds before a store that did not answer is asked for a change again."""
LET_GO = 30.0
"""Seconds that a node which has left goes on serving its images, if nobody says that they are not needed any more."""
RESPAWN_AFTER = 1.0
"""Seconds between a new generation and the start of replacements, which would take the survivors' processor time."""
GRACE = 10.0
"""Seconds for workers to end by themselves once the job failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """An agent's whole knowledge."""

    view: View
    """What proposals are made from."""
    looked: bool = False
    """The store has said what the record is."""
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
    silent_since: float | None = None
    """Since when the store has not answered."""
    silence: StoreSilent | None = None
    """How it did not, when last asked."""
    gone: bool = False
    """It has ended, and with it the record, so that nobody can ever take over from this world."""
    devices: Mapping[str, int] = field(default_factory=dict)
    """The accelerators of this node's members; a process keeps the one that it has computed on."""
    deadlocked: bool = False
    """The view's hang is what the watch over progress found; no worker waits for it to be ended."""
    parked: int = 0
    """The newest generation without members whose state was saved."""
    hurried: bool = False
    """This node was asked to leave once more, so it waits for nothing."""
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
    if state.info is not before.info and _without_progress(state.info) != _without_progress(before.info):
        effects.append(Announce(state.info))
    for slot in sorted(_given_up(state) - _given_up(before)):
        effects.append(Say(f"slot {slot} is given up: {FAILED_STARTS} replacements in a row died while starting"))
    effects += _word(before, state, event, now)
    if (lost := _waits_in_vain(state, now)) and not state.ended:
        return replace(state, ended=True), [*effects, End(ExitCode.STORE_LOST, lost)]
    if isinstance(event, Superseded) and not state.ended:
        # Not one more step: the other job may be writing to the same place.
        return replace(state, ended=True), [*effects, Vouch(now), End(ExitCode.STORE_LOST, event.text)]
    if isinstance(event, NodesSeen) and (unlike := conflict(state.info, event.nodes)) and not state.ended:
        return replace(state, ended=True), [*effects, End(ExitCode.USAGE, unlike)]
    if (text := _leaves_alone(state)) and not state.ended:
        return replace(state, ended=True), [*effects, End(ExitCode.INTERRUPTED, text)]
    state, tellings = _tell(before, state, event)
    effects += tellings
    state, doings = _local(state, now)
    effects += doings
    if state.looked and not state.swapping and not state.ended:
        proposal = propose(state.view, now)
        since = {reason: state.view.since.get(reason, now) for reason in proposal.reasons}
        if since != state.view.since:
            state = replace(state, view=replace(state.view, since=since))
        if proposal.wake_at is not None:
            effects.append(Wake(proposal.wake_at))
        if proposal.give_up:
            return replace(state, ended=True), [*effects, End(ExitCode.PARKED, proposal.give_up)]
        if proposal.record is not None:
            state, swap = _swap(state, proposal.record, event, now)
            effects.append(swap)
    return state, effects


def _swap(state: State, record: WorldRecord, event: Event, now: float) -> tuple[State, Effect]:
    """Put a change to the store, or wait for a store that does not answer, in the end in vain."""
    silence, since = state.silence, state.silent_since
    if silence is None or since is None:
        return replace(state, swapping=True), Swap(record)
    failed = isinstance(event, StoreSilent)
    if now < since + state.view.limits.patience and (silence.lasting or not failed):
        if failed or now < since + STORE_RETRY:
            return state, Wake(now + STORE_RETRY)
        return replace(state, swapping=True), Swap(record)
    text = f"{silence.text}; it is needed to agree on a change ({record.reason}){_advice(silence)}"
    return replace(state, ended=True), End(ExitCode.STORE_LOST, text)


def _leaves_alone(state: State) -> str:
    """Why this node ends without the others' agreement, if it does: there is no store to come to one."""
    if state.silence is None:
        return ""
    if state.hurried and state.info.failed:
        return f"{state.info.failed}, twice; {state.silence.text}"
    return f"{state.info.leaving}; {state.silence.text}" if state.gone and state.info.leaving else ""


def _word(before: State, state: State, event: Event, now: float) -> list[Effect]:
    """How long the local workers may step."""
    if state.gone and not before.gone:
        return [Vouch(math.inf)]
    record = state.view.record
    if isinstance(event, Vouched) and record is not None and event.revision == record.revision:
        return [Vouch(event.asked_at + state.view.timing.vouch)]
    # Where there is a newer version, what it says is heard first.  One that answers though it was gone knows nothing
    # of this world.
    return [Vouch(now)] if before.gone and not state.gone else []


def _advice(silence: StoreSilent) -> str:
    if silence.lasting:
        return ""
    return ". It ended with the node that served it; the job outlives every node with --rdzv-backend=etcd"


def _waits_in_vain(state: State, now: float) -> str:
    """Why no rank of this node will ever step again, if so: nobody will say that its world is the job's."""
    silence, since, record = state.silence, state.silent_since, state.view.record
    if silence is None or since is None or record is None or record.phase is not Phase.RUNNING or state.gone:
        return ""
    limits, timing = state.view.limits, state.view.timing
    if now < since + (max(limits.patience, timing.vouch) if silence.lasting else timing.vouch):
        return ""
    if not state.info.link or not any(worker.stepping == record.generation for worker in state.info.workers):
        return ""
    text = f"{silence.text}; for {now - since:.0f} s nobody has known whether this world is still the job's"
    return f"{text}{_advice(silence)}"


def _without_progress(info: NodeInfo) -> NodeInfo:
    """Steps are no news: nobody is told of each.  Members keep pace, so each node's own steps tell where all are."""
    return replace(info, progress=(0, 0))


# ---- taking events in -----------------------------------------------------------------------------------------------


def _take_in(state: State, event: Event, now: float) -> State:
    match event:
        case RecordSeen(record):
            return _new_record(state, record, now)
        case NodesSeen():
            return _nodes_seen(state, event)
        case StoreSilent():
            begun = state.silent_since
            state = replace(state, view=replace(state.view, silent=True))
            state = replace(state, swapping=False, silence=event, gone=state.gone or event.gone)
            return replace(state, silent_since=now if begun is None else begun)
        case KeeperServes(endpoint):
            return _with_info(state, keeper=endpoint)
        case WorkerSpawned(member):
            workers = (*state.info.workers, WorkerInfo(member=member))
            return _with_info(replace(state, spawning=state.spawning - {member}), workers=workers)
        case WorkerExited(member, code):
            return _worker_exited(state, member, code)
        case WorkerSaid(member, message):
            return _worker_said(state, member, message)
        case Progress(generation, finished):
            if state.deadlocked and state.view.hang[0] == generation:
                # It goes on after all.
                state = replace(state, deadlocked=False, view=replace(state.view, hang=(0, "")))
            return _with_info(state, progress=(generation, finished))
        case Hung(member, reason):
            return _with_worker(state, member, hung=reason)
        case Deadlocked(generation, reason):
            return replace(state, deadlocked=True, view=replace(state.view, hang=(generation, reason)))
        case Stuck(reports):
            return _with_info(state, stuck=reports)
        case EndpointReady(endpoint):
            return _with_info(state, endpoint=endpoint)
        case LeaveAsked(text):
            if state.info.leaving or state.info.failed:
                return replace(state, hurried=True)
            if state.view.elastic() and len(state.view.nodes) > 1:
                # Too few without it, or all of them leave: what is there is parked at a boundary and kept.
                return _with_info(state, leaving=text)
            return _with_info(state, failed=text, culprit="", failed_in=None, exit_code=int(ExitCode.INTERRUPTED))
        case Wished(leave, room):
            before = state.view.wish or Wish(leave=(), room=0)
            wish = Wish(leave=tuple(dict.fromkeys((*before.leave, *leave))), room=room or before.room)
            return replace(state, view=replace(state.view, wish=wish))
        case StopAsked(text, exit_code):
            return _with_info(state, failed=text, culprit="", failed_in=None, exit_code=int(exit_code))
        case Vouched():
            return replace(state, gone=False)
        case Tick() | Superseded():
            return state


def _is_mine(state: State, member: str) -> bool:
    return node_of(member) == state.view.me


def _nodes_seen(state: State, event: NodesSeen) -> State:
    nodes = {**{node.node: node for node in event.nodes}, state.view.me: state.info}
    lost = state.view.all_lost(event.lost)
    view = replace(state.view, nodes=nodes, lost=lost, doubted=event.doubted, fading=event.fading)
    return _with_info(replace(state, view=view), suspects=tuple(sorted(event.suspects)))


def _with_info(state: State, **changes: Any) -> State:
    info = replace(state.info, **changes)
    return replace(state, view=replace(state.view, nodes={**state.view.nodes, info.node: info}))


def _with_worker(state: State, member: str, **changes: Any) -> State:
    workers = tuple(replace(w, **changes) if w.member == member else w for w in state.info.workers)
    return _with_info(state, workers=workers)


def _new_record(state: State, record: WorldRecord | None, now: float) -> State:
    old = state.view.record
    view = replace(state.view, silent=False) if state.view.silent else state.view
    state = replace(state, view=view, looked=True, swapping=False, silence=None, silent_since=None, gone=False)
    if record is None or (old is not None and record.revision <= old.revision):
        return state
    view = replace(state.view, record=record)
    if view.wish is not None and view.wish.fulfilled(record):
        view = replace(view, wish=None)
    if old is None or record.generation != old.generation:
        state = replace(state, seen_at=now, devices=_devices(state, record))
        lost = {node: why for node, why in view.lost.items() if node not in view.nodes}
        view = replace(view, margin=2, lost=lost, before=old.members if old is not None else ())
        state = _with_info(replace(state, view=view), generation=record.generation)
        view = state.view
    elif old.planned is not None and record.planned is None and _declined(view, old.planned.number):
        view = replace(view, margin=min(256, view.margin * 2))
    if record.phase is not Phase.RUNNING and state.over_at is None:
        state = replace(state, over_at=now)
    if view.resume is not None and not is_new_restore(record, view.resume):
        view = replace(view, resume=None)
    state = replace(state, view=view)
    if view.me in record.leave and not state.info.leaving:
        state = _with_info(state, leaving="it was asked to")
    for worker in state.info.workers:
        if worker.member in record.members and worker.idle:
            state = _with_worker(state, worker.member, idle=False)
    return state


def _declined(view: View, number: int) -> bool:
    """Whether somebody had passed a planned boundary already; what expires or is taken back otherwise was not close."""
    return any(worker.declined >= number for worker in view.workers().values())


def _devices(state: State, record: WorldRecord) -> dict[str, int]:
    """A device for each local member: the one it had, else its slot's, else (one that stood by) one that is free."""
    members = [m for m in record.members if _is_mine(state, m)]
    devices = {m: state.devices[m] for m in members if m in state.devices}
    for member in members:
        free = [slot for slot in range(state.info.slots) if slot not in devices.values()]
        if member not in devices and free:
            devices[member] = slot_of(member) if slot_of(member) in free else free[0]
    return devices


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
    exits = (*state.info.exits, ended)[-4 * (state.info.slots + state.info.standby) :]
    state = _with_info(state, workers=workers, exits=exits)
    running = any(node.workers for node in state.view.nodes.values()) or state.spawning
    if not running and _given_up(state) >= set(range(state.info.slots)):
        text = f"no worker of this job runs and none can be started any more; the last one {ended.describe()}"
        return _with_info(state, failed=text, culprit=member, failed_in=None)
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
        case UserFailed(generation=generation, text=text):
            code = int(ExitCode.USER_ERROR)
            # What stands in the store is read by everybody; the error file and the log have all of it.
            text = text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]} ..."
            return _with_info(state, failed=text, culprit=member, failed_in=generation, exit_code=code)
        case Troubled(generation=generation, text=text):
            return replace(state, deadlocked=False, view=replace(state.view, hang=(generation, text)))
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
        hearers = [w.member for w in state.info.workers if w.elastic]
    elif isinstance(event, WorkerSaid) and isinstance(event.message, Hello) and state.worker(event.member):
        hearers = [event.member]
    else:
        return state, []
    nodes = [state.view.nodes[n] for n in dict.fromkeys(map(node_of, record.members)) if n in state.view.nodes]
    hosts = sorted({address for node in nodes for address in node.addresses})
    world = record.to_json()
    return state, [
        Tell(member, WorldIs(record=world, hosts=hosts, device=state.devices.get(member, -1))) for member in hearers
    ]


def _local(state: State, now: float) -> tuple[State, list[Effect]]:
    """Spawn what is missing, stop what does not belong, end when all is over."""
    record = state.view.record
    if record is None or state.ended:
        return state, []
    if record.phase is not Phase.RUNNING:
        return _wind_up(state, record, now)
    if state.info.leaving and (state.hurried or not any(_is_mine(state, m) for m in record.members)):
        return _leave(state, record, now)
    state, effects = _stop_outsiders(state, record)
    if not record.members and state.parked != record.generation and all(w.idle for w in state.info.workers):
        # Nobody knows for how long; and what is in memory only is lost with the memory.
        state = replace(state, parked=record.generation)
        effects.append(Save())
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


def _leave(state: State, record: WorldRecord, now: float) -> tuple[State, list[Effect]]:
    """The job goes on without this node; what it holds may be needed until the others have resumed."""
    # Who has promised a boundary goes on up to it, and says hello behind it: the others need that state.
    waits = record.boundary is not None and not state.hurried
    limit = state.seen_at + state.view.timing.acknowledge if waits else now
    going = [w.member for w in state.info.workers if now >= limit or w.idle or not w.elastic]
    gone = [member for member in going if member not in state.stopping]
    effects: list[Effect] = [Stop(member, "this node leaves the job") for member in gone]
    state = replace(state, stopping=state.stopping | set(gone))
    if state.info.workers or state.spawning:
        return state, [*effects, *([Wake(limit)] if now < limit else [])]
    wanted = bool(record.members) or _is_taken_over(state)
    if record.resumed() is None and wanted and now < state.seen_at + LET_GO and not state.hurried:
        return state, [*effects, Wake(state.seen_at + LET_GO)]
    text = f"this node has left the job: {state.info.leaving}"
    if _goes_on(state, record):
        return replace(state, ended=True), [*effects, Say(text), End(ExitCode.SUCCESS, "")]
    text = f"{text}; too few are left to go on without it"
    return replace(state, ended=True), [*effects, End(ExitCode.INTERRUPTED, text)]


def _is_taken_over(state: State) -> bool:
    """Whether enough workers elsewhere wait for this node's to have left."""
    return state.view.enough(state.view.fitting(state.view.idle()))


def _goes_on(state: State, record: WorldRecord) -> bool:
    """Whether the job does without this node, so that its part is done.

    Where it waits for nodes, only those that were drained by name are not wanted back.
    """
    staying = [node for node in state.view.nodes.values() if not node.leaving]
    return bool(staying) and (bool(record.members) or state.view.me in record.leave)


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
    if not state.view.elastic() or state.info.leaving:
        return [], None
    taken = {slot_of(w.member) for w in state.info.workers} | {slot_of(m) for m in state.spawning}
    places = range(state.info.slots + state.info.standby)
    vacant = [slot for slot in places if slot not in taken | _given_up(state)]
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
