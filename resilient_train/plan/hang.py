"""When a job stands still, and what to do about it: ``step(watch, event, now) -> (watch, effects)``.

Theory of operation.  Boundaries show on the board that a generation makes progress.  When the furthest rank of the job
has not passed one for most of the *limit*, the agent asks its workers, twice, where they are; at the limit it announces
what they said.  A count that grew between the two answers is progress too.  Once every member's report is there, each
agent comes to the same verdict (`resilient_train.plan.culprit`): the culprit's own agent evicts it, and a deadlock is
ended by forming the same ranks again.  Ranks that all work are left alone: they are only slow.

The limit is `detect_within` or `USUAL` times the longest recent time between boundaries, whichever is more; it doubles
with every further loss that sets the job back to the same step, so that what is only slow gets through in the end.
Nothing is suspected while a rank is in a long operation that it announced, nor in a job's first steps, until every rank
has passed `SETTLED` boundaries.  An agent that has seen no generation get there begins to suspect when another does.
The first steps of later generations may take `START` times what any first steps took
before, and `START` times the limit: without a limit, a hang that comes back with the step that is computed again would
last for ever.

A stopped process is seen for what it is, at any time.  One that was left out of a world because it did not come free,
and does not come free for as long as first steps may take either, is ended: another takes its slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

from resilient_train.plan.culprit import AtWork, Culprit, Deadlock, judge
from resilient_train.plan.view import View
from resilient_train.spec.node import WorkerInfo
from resilient_train.spec.rank import RankReport, Where
from resilient_train.spec.world import Phase, WorldRecord, node_of

USUAL = 2.0
"""The limit is at least this times the longest recent time between two boundaries."""
GAPS = 64
"""How many of the last times between boundaries count."""
SETTLED = 2
"""Boundaries that every rank must have passed in a generation."""
START = 4.0
"""First steps of later generations may take this times the longest ones so far, and this times the limit."""
LOOKS = 5.0
"""Looks within `detect_within`."""
FIRST_ASK, SECOND_ASK, SILENCE = 0.6, 0.85, 0.4
"""When to ask, and how long to wait for an answer, as parts of the limit."""
_ABSENT = 3.0
"""An agent that did not look for this many seconds, and three times as long as it should, was not running itself."""


# ---- events and effects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """What one look shows: the nodes and the record; of local members (generation, step) and which are stopped."""

    view: View
    board: Mapping[str, tuple[int, int]]
    stopped: AbstractSet[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """A local worker's answer to `Ask`."""

    number: int
    report: RankReport


Event = Look | Answer


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask these local workers where they are."""

    number: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the other nodes what the local workers said; empty once the job goes on."""

    reports: tuple[RankReport, ...]


@dataclass(frozen=True, slots=True)
class Evict:
    """A local worker hangs: write down its stacks and end it."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Regroup:
    """The members are to form again; before that, write down the local ones' stacks."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Say:
    """Print a line for people."""

    text: str


@dataclass(frozen=True, slots=True)
class LookAt:
    """Look again at this time."""

    at: float


Effect = Ask | Announce | Evict | Regroup | Say | LookAt


# ---- state ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What an agent remembers about the job's progress."""

    detect_within: float
    """Seconds; the scale of everything."""
    looked_at: float | None = None
    """The last look."""
    generation: int = 0
    """The generation that is watched."""
    step: int = -1
    """Its furthest boundary."""
    since: float = 0.0
    """Since when nothing has shown that the job goes on."""
    boundary_at: float | None = None
    """When the furthest boundary was seen; None if the time since then tells nothing about steps."""
    began_at: float | None = None
    """When all ranks were first seen to step through boundaries."""
    gaps: tuple[float, ...] = ()
    """The last times between boundaries."""
    longest_start: float = 0.0
    """The longest time that first steps took in any generation."""
    first: Mapping[str, int] = field(default_factory=dict)
    """Local members' first boundaries."""
    settled: bool = False
    """Every local rank has passed enough boundaries."""
    number: int = 0
    """Of the last question."""
    asked: tuple[float, ...] = ()
    """When questions were asked, at most two."""
    answers: Mapping[str, tuple[RankReport | None, RankReport | None]] = field(default_factory=dict)
    """Local members' answers to the two."""
    reports: tuple[RankReport, ...] = ()
    """What was announced."""
    stopped: Mapping[str, float] = field(default_factory=dict)
    """Local members that are stopped, and since when."""
    outside: Mapping[str, float] = field(default_factory=dict)
    """Local workers that are not in the world and do not come free, and since when."""
    decided: frozenset[str] = frozenset()
    """Members that were evicted in this generation; or "" if it is to be formed again."""
    said: int = -1
    """The step at which it was said that the job stands still."""

    @property
    def period(self) -> float:
        """Seconds between two looks."""
        return min(1.0, self.detect_within / LOOKS)

    def limit(self, record: WorldRecord) -> float:
        """Seconds without any progress after which somebody hangs."""
        limit = self.usual * 2.0 ** max(0, record.stalls - 1)
        return limit if self.settled else START * max(limit, self.longest_start)

    @property
    def usual(self) -> float:
        """The same where nothing is known of hangs before."""
        return max(self.detect_within, USUAL * max(self.gaps, default=0.0))


def step(watch: Watch, event: Event, now: float) -> tuple[Watch, list[Effect]]:
    """Take in one event; return what to do."""
    match event:
        case Answer(number, report):
            return _answered(watch, number, report), []
        case Look():
            return _look(watch, event, now)


def _answered(watch: Watch, number: int, report: RankReport) -> Watch:
    place = number - (watch.number - len(watch.asked)) - 1
    if place not in (0, 1) or report.member not in watch.answers:
        return watch
    first, second = watch.answers[report.member]
    both = (report, second) if place == 0 else (first, report)
    return replace(watch, answers={**watch.answers, report.member: both})


def _look(watch: Watch, look: Look, now: float) -> tuple[Watch, list[Effect]]:
    absent = watch.looked_at is not None and now - watch.looked_at > max(_ABSENT, 3 * watch.period)
    watch, evictions = _outside(replace(watch, looked_at=now, outside={} if absent else watch.outside), look, now)
    watch, effects = _look_inside(watch, look, now, absent)
    return watch, [*evictions, *effects]


def _outside(watch: Watch, look: Look, now: float) -> tuple[Watch, list[Effect]]:
    """Who was left out and is never going to be idle keeps its slot from a successor."""
    record = look.view.record
    if record is None or record.phase is not Phase.RUNNING or look.view.silent:
        return replace(watch, outside={}), []
    there = {
        w.member
        for w in look.view.workers().values()
        if node_of(w.member) == look.view.me and w.member not in record.members
        if w.elastic and not (w.idle or w.busy or w.done)
    }
    limit = START * max(watch.usual, watch.longest_start)
    outside = {member: watch.outside.get(member, now) for member in there}
    due = sorted(member for member, since in outside.items() if now >= since + limit)
    reason = f"hung: it was left out of generation {record.generation} and has not come free for {limit:.3g} s"
    return replace(watch, outside=outside | dict.fromkeys(due, now)), [Evict(member, reason) for member in due]


def _look_inside(watch: Watch, look: Look, now: float, absent: bool) -> tuple[Watch, list[Effect]]:
    record = look.view.record
    if record is None or record.phase is not Phase.RUNNING or not record.members:
        return _alive(watch, now)
    generation = _watched(record, look.view.workers())
    if generation != watch.generation:
        watch = Watch(
            detect_within=watch.detect_within,
            looked_at=now,
            generation=generation,
            since=now,
            gaps=watch.gaps,
            longest_start=watch.longest_start,
            number=watch.number,
            reports=watch.reports,
            outside=watch.outside,
        )
    if absent:
        return _alive(replace(watch, stopped={}), now)
    watch, evictions = _stopped(watch, record, look, now)
    watch, effects = _progress(watch, record, look, now)
    if evictions or effects or watch.decided or _waits_for_record(watch, record, look):
        return watch, [*evictions, *effects]
    return _suspect(watch, record, look, now)


def _waits_for_record(watch: Watch, record: WorldRecord, look: Look) -> bool:
    """Whether the ranks may stand still only because the record does.

    Who has promised a boundary stays there until the planned change is agreed or taken back.
    """
    planned = record.planned
    return look.view.silent or (planned is not None and watch.step >= planned.boundary)


def _watched(record: WorldRecord, alive: Mapping[str, WorkerInfo]) -> int:
    """The record's generation, or the one before while its members are on their way to a planned change."""
    leaving = record.boundary is not None and any(
        alive[m].acknowledged == record.generation - 1 for m in record.members if m in alive
    )
    return record.generation - 1 if leaving else record.generation


def _alive(watch: Watch, now: float, **changes: Any) -> tuple[Watch, list[Effect]]:
    """The job goes on, or nothing can be said."""
    effects: list[Effect] = [Announce(())] if watch.reports else []
    fields = {"since": now, "boundary_at": None, "asked": (), "answers": {}, "reports": (), **changes}
    return replace(watch, **fields), effects


def _stopped(watch: Watch, record: WorldRecord, look: Look, now: float) -> tuple[Watch, list[Effect]]:
    members = [m for m in record.members if m in look.stopped and m not in watch.decided]
    watch = replace(watch, stopped={m: watch.stopped.get(m, now) for m in members})
    due = [m for m in members if now >= watch.stopped[m] + watch.detect_within]
    effects: list[Effect] = [
        Evict(m, f"hung: rank {record.members.index(m)} has been stopped (SIGSTOP) for {watch.detect_within:g} s")
        for m in due
    ]
    if due:
        return replace(watch, decided=watch.decided | set(due)), effects
    return watch, [LookAt(at + watch.detect_within) for at in watch.stopped.values()]


def _progress(watch: Watch, record: WorldRecord, look: Look, now: float) -> tuple[Watch, list[Effect]]:
    """Take in what shows that the job goes on; effects mean that it does."""
    alive = look.view.workers()
    members = [alive[m] for m in record.members if m in alive]
    if len(members) < record.size or any(w.busy or w.done == record.generation for w in members):
        return _alive(watch, now)
    local = {m: at for m, (g, at) in look.board.items() if g == watch.generation and m in record.members}
    there = [node.progress for node in look.view.nodes.values()]
    furthest = max([at for g, at in there if g == watch.generation] + list(local.values()), default=-1)
    watch = replace(watch, first={**local, **watch.first})
    if watch.began_at is None and all(w.stepping == watch.generation for w in members):
        watch = replace(watch, began_at=now, since=now)
    mine = [m for m in record.members if node_of(m) == look.view.me]
    if not watch.settled and watch.generation == record.generation and watch.began_at is not None:
        settled = all(local.get(m, -1) >= watch.first.get(m, 0) + SETTLED for m in mine)
        longest = max(watch.longest_start, now - watch.began_at) if settled else watch.longest_start
        watch = replace(watch, settled=settled, longest_start=longest)
    if furthest <= watch.step:
        return watch, []
    gaps = watch.gaps
    compiled = watch.step > min(watch.first.values(), default=watch.step)
    if watch.boundary_at is not None and compiled:
        gaps = (*gaps, now - watch.boundary_at)[-GAPS:]
    watch, effects = _alive(watch, now, step=furthest, gaps=gaps, boundary_at=now, decided=watch.decided - {""})
    return watch, effects


# ---- suspicion ------------------------------------------------------------------------------------------------------


def _suspect(watch: Watch, record: WorldRecord, look: Look, now: float) -> tuple[Watch, list[Effect]]:
    informed = watch.settled or (watch.began_at is not None and watch.longest_start > 0)
    if not informed and not _others_suspect(record, look):
        return watch, []
    limit = watch.limit(record)
    mine = tuple(m for m in record.members if node_of(m) == look.view.me)
    due = _next_ask(watch, limit)
    if due is not None and now < due:
        return watch, [LookAt(due)] if due - now < watch.period else []
    if due is not None:
        known = watch.answers if watch.asked else dict.fromkeys(mine, (None, None))
        watch = replace(watch, number=watch.number + 1, asked=(*watch.asked, now), answers=known)
        after = _next_ask(watch, limit)
        return watch, [Ask(watch.number, mine), LookAt(_verdict_at(watch, limit) if after is None else after)]
    if any(_moved(*pair) for pair in watch.answers.values()):
        return _alive(watch, now)
    wait = max(
        [_verdict_at(watch, limit)] + [_answer_by(watch, pair, limit) for pair in watch.answers.values()], default=now
    )
    if now < wait:
        return watch, [LookAt(wait)]
    reports = tuple(_report(m, pair, look.stopped) for m, pair in watch.answers.items())
    effects: list[Effect] = [Announce(reports)] if reports != watch.reports else []
    watch = replace(watch, reports=reports)
    return _decide(watch, record, look, effects, now, limit)


def _others_suspect(record: WorldRecord, look: Look) -> bool:
    """Whether an agent that has seen ranks settle says that the job stands still.

    One that came later knows of no usual step, and without its reports there is no verdict.
    """
    others = (node for node in look.view.nodes.values() if node.node != look.view.me)
    return any(report.member in record.members for node in others for report in node.stuck)


def _next_ask(watch: Watch, limit: float) -> float | None:
    if not watch.asked:
        return watch.since + FIRST_ASK * limit
    if len(watch.asked) == 1:
        return max(watch.since + SECOND_ASK * limit, watch.asked[0] + (SECOND_ASK - FIRST_ASK) * limit)
    return None


def _verdict_at(watch: Watch, limit: float) -> float:
    return max(watch.since + limit, watch.asked[-1] + (1.0 - SECOND_ASK) * limit)


def _answer_by(watch: Watch, pair: tuple[RankReport | None, RankReport | None], limit: float) -> float:
    """Until when to wait for an answer of a worker; a past time if there is nothing to wait for."""
    first, second = pair
    if second is not None:
        return 0.0
    return watch.asked[1 if first is not None else 0] + SILENCE * limit


def _moved(first: RankReport | None, second: RankReport | None) -> bool:
    """Whether a rank communicated between two answers, or came to it."""
    return first is not None and second is not None and _place(first) != _place(second)


def _place(report: RankReport) -> tuple[object, ...]:
    return report.generation, report.step, report.counts, report.where is Where.COMMUNICATION


def _report(member: str, pair: tuple[RankReport | None, RankReport | None], stopped: AbstractSet[str]) -> RankReport:
    if member in stopped:
        return RankReport(member=member, where=Where.STOPPED, frame="SIGSTOP")
    if pair[1] is not None:
        return pair[1]
    frame = f"last seen at {pair[0].frame}" if pair[0] is not None else "it holds Python's lock, or the system does not"
    return RankReport(member=member, where=Where.SILENT, frame=frame)


def _decide(
    watch: Watch, record: WorldRecord, look: Look, effects: list[Effect], now: float, limit: float
) -> tuple[Watch, list[Effect]]:
    announced = [r for node in look.view.nodes.values() if node.node != look.view.me for r in node.stuck]
    reports = {report.member: report for report in (*announced, *watch.reports)}
    if not reports.keys() >= set(record.members):
        # Another node has not come to suspect anything yet, or its ranks go on.
        return watch, effects
    match judge(record.members, reports):
        case Culprit(member, reason):
            watch = replace(watch, decided=watch.decided | {member})
            evict = [Evict(member, f"hung: {reason}")] if node_of(member) == look.view.me else []
            return watch, [*effects, *evict]
        case Deadlock(reason):
            watch = replace(watch, decided=watch.decided | {""})
            return watch, [*effects, Regroup(record.generation, f"hung: {reason}")]
        case AtWork(reason):
            pass
    if reason and watch.said != watch.step:
        text = f"no rank has passed a boundary for {limit:.3g} s, but {reason}: leaving them alone"
        effects = [*effects, Say(text)]
    # What they do next may tell: asked again in a while.
    again = replace(watch, since=now - limit / 2, asked=(), answers={}, said=watch.step)
    return again, effects
