"""Carries out what `resilient_train.plan.hang` decides: looks at the board, asks the workers, ends who hangs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from typing import Protocol

from resilient_train.agent import stacks
from resilient_train.agent.workers import Worker, Workers
from resilient_train.clock import Alarm, Clock
from resilient_train.errors import FormatError
from resilient_train.plan import events as ev
from resilient_train.plan import hang
from resilient_train.plan.view import View
from resilient_train.spec.messages import Ask, Busy, Message, Position
from resilient_train.spec.rank import RankReport

STACKS_TIMEOUT = 0.5
"""Seconds for a process that hangs to write down its stacks."""
_POLL = 0.005


class Surroundings(Protocol):
    """What an agent lends to its `Hangs`."""

    def view(self) -> View:
        """Everything that the agent knows."""
        ...

    def progress(self, member: str) -> tuple[int, int]:
        """(generation, finished steps) of a local worker."""
        ...

    def feed(self, event: ev.Event) -> None:
        """Hand an event to the agent's state machine."""
        ...

    def tell(self, member: str, message: Message) -> None:
        """Send something to a local worker."""
        ...

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Have ``action`` called at a time of the agent's clock."""
        ...

    def say(self, text: str) -> None:
        """Print a line for people."""
        ...


class Hangs:
    """One agent's watch over the progress of its job."""

    def __init__(self, detect_within: float, workers: Workers, around: Surroundings, clock: Clock) -> None:
        """Args:
        detect_within: seconds within which a hang is to be noticed.
        workers: this node's processes.
        around: the agent.
        clock: its clock.
        """
        self._watch = hang.Watch(detect_within=detect_within)
        self._workers = workers
        self._around = around
        self._clock = clock
        self._alarm = Alarm(around.at, self.look)
        self._bounds: dict[str, int] = {}

    @property
    def period(self) -> float:
        """Seconds between two calls of `look`."""
        return self._watch.period

    def look(self) -> None:
        """See how far everybody is."""
        view = self._around.view()
        record = view.record
        running = {worker.member: worker.pid for worker in self._workers.running()}
        mine = running.keys() & set(record.members if record is not None else ())
        board = {member: self._around.progress(member) for member in mine}
        stopped = {member for member in mine if stacks.state(running[member]) == "T"}
        self._step(hang.Look(view, board, stopped))

    def heard(self, member: str, message: Message) -> None:
        """A worker said something."""
        if isinstance(message, Position):
            with contextlib.suppress(FormatError):  # As good as no answer.
                self._step(hang.Answer(message.number, RankReport.from_json(message.report)))
        elif isinstance(message, Busy):
            self._bound(member, message)

    def _bound(self, member: str, message: Busy) -> None:
        """An operation that takes longer than was said is none any more."""
        number = self._bounds[member] = self._bounds.get(member, 0) + 1

        def exceeded() -> None:
            if self._bounds.get(member) == number:
                text = f"{member}: {message.name!r} takes longer than the {message.seconds:.3g} s that were announced"
                self._around.say(text)
                self._around.feed(ev.WorkerSaid(member, Busy(name="")))

        if message.seconds:
            self._around.at(self._clock.now() + message.seconds, exceeded)

    def _step(self, event: hang.Event) -> None:
        self._watch, effects = hang.step(self._watch, event, self._clock.now())
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: hang.Effect) -> None:
        match effect:
            case hang.Ask(number, members):
                for member in members:
                    self._around.tell(member, Ask(number=number))
            case hang.Announce(reports):
                self._around.feed(ev.Stuck(reports))
            case hang.Evict(member, reason):
                self._evict(member, reason)
            case hang.Regroup(generation, reason):
                mine = {report.member for report in self._watch.reports}
                for worker in self._workers.running():
                    if worker.member in mine:
                        self._around.say(f"the stacks of {worker.member} (process {worker.pid}) go to its stderr")
                        stacks.ask(worker.pid)
                self._around.feed(ev.Deadlocked(generation, reason))
            case hang.Say(text):
                self._around.say(text)
            case hang.LookAt(at):
                self._alarm.set(at)

    def _evict(self, member: str, reason: str) -> None:
        """The others go on at once; the process is ended as soon as its stacks are in the log."""
        worker = next((w for w in self._workers.running() if w.member == member), None)
        if worker is None:
            return
        was = stacks.state(worker.pid)
        text = f"{reason}; process {worker.pid} of {member} is in state {was}, its stacks go to its stderr"
        self._around.say(text)
        self._around.feed(ev.Hung(member, reason))
        stacks.ask(worker.pid)
        now = self._clock.now()
        self._around.at(now + _POLL, lambda: self._end(worker, now + STACKS_TIMEOUT))

    def _end(self, worker: Worker, deadline: float) -> None:
        now = self._clock.now()
        if stacks.written(worker.pid) or now >= deadline:
            self._workers.signal(worker.member, signal.SIGKILL)
        else:
            self._around.at(now + _POLL, lambda: self._end(worker, deadline))
