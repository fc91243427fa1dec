"""Who keeps the others waiting: a pure function of what all ranks report at a moment at which the job stands still.

A hang is ranks that wait for others in communication, and a rank that does not come.  Where nobody waits, the ranks are
only slow.  Where all wait, for each other, it is a mismatch, and none of them is to blame more than another.

The threads' stacks decide first.  Counts of operations entered help where a stack does not tell (backward and compiled
code compute and communicate, and a device's host waits in whatever line needs a result) and choose among several.
They are compared within one group and generation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from resilient_train.spec.rank import RankReport, Where


@dataclass(frozen=True, slots=True)
class Culprit:
    """One rank keeps the others waiting."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Deadlock:
    """The ranks wait for each other, or it cannot be said for whom: they are to form again."""

    reason: str


@dataclass(frozen=True, slots=True)
class AtWork:
    """Nobody waits for anybody."""

    reason: str
    """Empty where the training is over anyway."""


Verdict = Culprit | Deadlock | AtWork


def judge(members: Sequence[str], reports: Mapping[str, RankReport]) -> Verdict:
    """Whose fault it is that no rank passes a boundary.

    Args:
        members: of the generation, in the order of their ranks.
        reports: one of each.
    """
    said = [reports[member] for member in members]
    name = _Names(members)
    if any(report.finished for report in said):
        return AtWork("")
    compiling = [report for report in said if report.where is Where.COMPILING]
    if compiling:
        return AtWork(f"{name(compiling)} {'compile' if len(compiling) > 1 else 'compiles'}")
    stopped = [r for r in said if r.where is Where.STOPPED]
    if stopped:
        return Culprit(stopped[0].member, f"{name(stopped[:1])} is stopped ({stopped[0].frame})")
    waiting = [report for report in said if _waits(report, said)]
    silent = [r for r in said if r.where is Where.SILENT]
    working = [r for r in said if r not in waiting and r not in silent]
    if not waiting:
        return AtWork("no rank waits for another")
    if silent:
        if len(silent) > 1:
            return Deadlock(f"{name(silent)} do not answer")
        text = f"{name(silent)} does not answer ({silent[0].frame}), and {name(waiting)} {_verb(waiting)}"
        return Culprit(silent[0].member, text)
    if not working:
        return Deadlock(f"all ranks wait in communication{_odd_one_out(said, name)}")
    late = working if len(working) == 1 else [report for report in working if _is_behind(report, said)]
    if len(late) == 1:
        return Culprit(late[0].member, _explain(late[0], waiting, name))
    return Deadlock(f"{name(late or working)} keep {name(waiting)} waiting")


class _Names:
    """``rank 1``, ``ranks 0, 2``."""

    def __init__(self, members: Sequence[str]) -> None:
        self._members = members

    def __call__(self, reports: Iterable[RankReport]) -> str:
        ranks = sorted(self._members.index(report.member) for report in reports)
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _waits(report: RankReport, said: Sequence[RankReport]) -> bool:
    if report.where is Where.COMMUNICATION:
        return True
    unclear = report.where is Where.UNCLEAR or (report.where is Where.ELSEWHERE and report.device)
    return unclear and any(_lead(report, other) is not None for other in said)


def _is_behind(report: RankReport, said: Sequence[RankReport]) -> bool:
    return any(_lead(other, report) is not None for other in said)


def _lead(one: RankReport, other: RankReport) -> tuple[str, int] | None:
    """(group, operation) that ``one`` has entered and ``other`` has not."""
    if one.generation != other.generation:
        return None
    counts = dict(other.counts)
    return next(((group, n) for group, n in one.counts if n > counts.get(group, n)), None)


def _explain(late: RankReport, waiting: Sequence[RankReport], name: _Names) -> str:
    lead = next((lead for report in waiting if (lead := _lead(report, late)) is not None), None)
    what = "does not come to communicate"
    if lead is not None:
        what = f"has not entered operation {lead[1]} of process group {lead[0]}"
    return f"{name([late])} {what}, for which {name(waiting)} {_verb(waiting)}; it is at {late.frame}"


def _verb(waiting: Sequence[RankReport]) -> str:
    return "waits" if len(waiting) == 1 else "wait"


def _odd_one_out(said: Sequence[RankReport], name: _Names) -> str:
    """A rank that waits in another line than all others is where to look first, though not proof enough to end it."""
    frames = Counter(report.frame for report in said)
    odd = [report for report in said if frames[report.frame] == 1]
    if len(frames) == 2 and len(odd) == 1 and len(said) > 2:
        others = next(report.frame for report in said if report is not odd[0])
        return f": {name(odd)} at {odd[0].frame}, the others at {others}"
    return ": " + "; ".join(f"{name([r for r in said if r.frame == frame])} at {frame}" for frame in list(frames)[:4])
