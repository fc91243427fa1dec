"""The simulated watch over progress: what `resilient_train.agent.hangs` does, without processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from resilient_train.clock import Alarm
from resilient_train.plan import events as ev
from resilient_train.plan import hang
from resilient_train.plan.view import View
from resilient_train.sim.engine import Action
from resilient_train.spec.rank import RankReport

_STACKS = 0.3
"""Seconds that a process takes to write its stacks down, before it is killed."""


class Processes(Protocol):
    """The workers of one node, as their agent sees them."""

    def board(self) -> dict[str, tuple[int, int]]:
        """(generation, finished steps) of each."""

    def stopped(self) -> set[str]:
        """Those that are stopped."""

    def ask(self, member: str, answer: Callable[[RankReport], None]) -> None:
        """Have a worker's monitor thread say where it is; it may never."""

    def kill(self, member: str) -> None:
        """SIGKILL."""


class Hangs:
    """One agent's."""

    def __init__(
        self,
        within: float,
        processes: Processes,
        view: Callable[[], View],
        now: Callable[[], float],
        at: Callable[[float, Action], None],
        feed: Callable[[ev.Event], None],
    ) -> None:
        """Args:
        within: seconds within which a hang is to be noticed.
        processes: the node's.
        view: all that the agent knows.
        now: the node's clock.
        at: has something called at a time of it.
        feed: hands an event to the agent's machine.
        """
        self._watch = hang.Watch(detect_within=within)
        self._processes = processes
        self._view = view
        self._now = now
        self._at = at
        self._alarm = Alarm(at, self.look)
        self._feed = feed

    @property
    def period(self) -> float:
        """Seconds between two looks."""
        return self._watch.period

    def look(self) -> None:
        """See how far everybody is."""
        view = self._view()
        members = view.record.members if view.record is not None else ()
        board = {member: at for member, at in self._processes.board().items() if member in members}
        self._step(hang.Look(view, board, self._processes.stopped() & set(members)))

    def _step(self, event: hang.Event) -> None:
        self._watch, effects = hang.step(self._watch, event, self._now())
        for effect in effects:
            match effect:
                case hang.Ask(number, members):
                    for member in members:
                        self._processes.ask(member, lambda said, number=number: self._step(hang.Answer(number, said)))  # type: ignore[misc]
                case hang.Announce(reports):
                    self._feed(ev.Stuck(reports))
                case hang.Evict(member, reason):
                    self._feed(ev.Hung(member, reason))
                    self._at(self._now() + _STACKS, lambda member=member: self._processes.kill(member))  # type: ignore[misc]
                case hang.Regroup(generation, reason):
                    self._feed(ev.Deadlocked(generation, reason))
                case hang.LookAt(at):
                    self._alarm.set(at)
                case hang.Say():
                    pass
