"""What an agent does about a worker that hangs: said, taken out at once, killed when its stacks are written."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from resilient_train.agent.hangs import STACKS_TIMEOUT, Hangs
from resilient_train.clock import Alarm
from resilient_train.plan import events as ev
from resilient_train.plan import hang
from resilient_train.plan.view import Limits, View
from resilient_train.spec.messages import STACKS_SIGNAL, Ask, Busy, Message, Position
from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.rank import RankReport, Where
from resilient_train.spec.world import WorldRecord

SLEEP = "import time; print('here', flush=True); time.sleep(600)"
BLOCKED = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [{STACKS_SIGNAL}]); {SLEEP}"
MEMBERS = ("n/0.0", "o/0.0")
"""One of this node, one of another."""
pytestmark = pytest.mark.timeout(60)


class Bench:
    """An agent as its `Hangs` sees it, whose first worker is a real process."""

    def __init__(self, code: str = SLEEP) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == b"here\n"
        self.time, self.board = 100.0, dict.fromkeys(MEMBERS, (1, 0))
        self.stuck: tuple[RankReport, ...] = ()
        """What the other node says of its rank."""
        self.fed: list[ev.Event] = []
        self.said: list[str] = []
        self.told: list[tuple[str, Message]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.signals: list[tuple[str, int]] = []
        self.hangs = Hangs(2.0, cast(Any, self), self, self)

    # The agent's clock, its workers, and the rest of it.

    def now(self) -> float:
        return self.time

    def running(self) -> list[Any]:
        return [SimpleNamespace(member=MEMBERS[0], pid=self.child.pid)]

    def signal(self, member: str, number: int) -> None:
        self.signals.append((member, number))

    def view(self) -> View:
        nodes = {}
        for order, member in enumerate(MEMBERS):
            worker = WorkerInfo(member=member, elastic=True, formed=1, stepping=1, acknowledged=1)
            stuck = self.stuck if order else ()
            info = NodeInfo(node=member[0], order=order, endpoint="h:1", slots=1, workers=(worker,), stuck=stuck)
            nodes[member[0]] = info
        record = WorldRecord(revision=1, generation=1, members=MEMBERS, bootstrap="h:1", reason="start", elastic=True)
        return View(me="n", limits=Limits(), nodes=nodes, record=record)

    def progress(self, member: str) -> tuple[int, int]:
        return self.board[member]

    def feed(self, event: ev.Event) -> None:
        self.fed.append(event)

    def tell(self, member: str, message: Message) -> None:
        self.told.append((member, message))

    def at(self, when: float, action: Callable[[], None]) -> None:
        self.timers.append((when, action))

    def say(self, text: str) -> None:
        self.said.append(text)

    def until(self, end: float) -> None:
        """Let the clock run, and timers come."""
        while due := [timer for timer in self.timers if timer[0] <= end]:
            first = min(due, key=lambda timer: timer[0])
            self.timers.remove(first)
            self.time = max(self.time, first[0])
            first[1]()
        self.time = end

    def evict(self) -> None:
        self.hangs._carry_out(hang.Evict(MEMBERS[0], "rank 0 does not answer"))


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*code: str) -> Bench:
        made.append(Bench(*code))
        return made[-1]

    yield make
    for one in made:
        one.child.kill()
        one.child.communicate()


def test_the_others_go_on_before_the_process_has_ended(bench: Callable[..., Bench]) -> None:
    """The loss is fed at once; SIGKILL comes as soon as the signal for its stacks has been handled."""
    agent = bench()
    agent.evict()
    assert [event for event in agent.fed if isinstance(event, ev.Hung)]
    assert agent.signals == []
    assert f"process {agent.child.pid} of n/0.0 is in state" in agent.said[0]
    agent.until(agent.time + 0.02)
    assert agent.signals == [("n/0.0", signal.SIGKILL)]


def test_stacks_that_are_never_written_are_not_waited_for_for_long(bench: Callable[..., Bench]) -> None:
    """The signal is blocked: half a second, and not before."""
    agent = bench(BLOCKED)
    agent.evict()
    agent.until(agent.time + STACKS_TIMEOUT - 0.05)
    assert agent.signals == []
    agent.until(agent.time + 0.1)
    assert agent.signals == [("n/0.0", signal.SIGKILL)]


def test_a_worker_that_ended_by_itself_is_not_taken_out(bench: Callable[..., Bench]) -> None:
    """Its exit tells all there is to tell; its process id may be another's by now."""
    agent = bench()
    agent.hangs._carry_out(hang.Evict(MEMBERS[1], "rank 1 does not answer"))
    assert (agent.fed, agent.said, agent.signals) == ([], [], [])


def test_an_operation_that_takes_longer_than_was_said_is_none_any_more(bench: Callable[..., Bench]) -> None:
    """As if it had said that it is over."""
    agent = bench()
    agent.hangs.heard("n/0.0", Busy(name="evaluate", seconds=5.0))
    agent.until(104.9)
    assert agent.fed == []
    agent.until(105.1)
    assert agent.fed == [ev.WorkerSaid("n/0.0", Busy(name=""))]
    assert agent.said == ["n/0.0: 'evaluate' takes longer than the 5 s that were announced"]


def test_an_operation_that_ended_in_time_bounds_nothing(bench: Callable[..., Bench]) -> None:
    """Nor one that another followed, which may take as long as it takes."""
    agent = bench()
    agent.hangs.heard("n/0.0", Busy(name="evaluate", seconds=5.0))
    agent.until(103.0)
    agent.hangs.heard("n/0.0", Busy(name=""))
    agent.hangs.heard(MEMBERS[1], Busy(name="load", seconds=5.0))
    agent.hangs.heard(MEMBERS[1], Busy(name="compile"))
    agent.until(200.0)
    assert (agent.fed, agent.said) == ([], [])


def test_it_asks_when_nothing_moves_and_announces_what_was_said(bench: Callable[..., Bench]) -> None:
    """From the board to the question, and from the answer to the announcement; nonsense is no answer."""
    agent = bench()
    for step in range(6):
        agent.board = dict.fromkeys(MEMBERS, (1, step))
        agent.hangs.look()
        agent.time += agent.hangs.period
    while not agent.told:
        agent.hangs.look()
        agent.time += agent.hangs.period
        assert agent.time < 120.0
    member, question = agent.told[0]
    assert member == "n/0.0"
    assert isinstance(question, Ask)
    agent.hangs.heard(member, Position(number=question.number, report={"nonsense": 1}))
    while not any(isinstance(event, ev.Stuck) for event in agent.fed):
        agent.hangs.look()
        agent.time += agent.hangs.period
        assert agent.time < 120.0
    (stuck,) = [event for event in agent.fed if isinstance(event, ev.Stuck)]
    assert [report.member for report in stuck.reports] == ["n/0.0"]


def test_a_job_that_is_only_slow_is_looked_at_as_often_after_hours(bench: Callable[..., Bench]) -> None:
    """Each look asks for the next one: those wishes must not multiply while nobody waits for anybody."""
    agent = bench()
    looks: list[float] = []
    look = agent.hangs.look
    agent.hangs._alarm = Alarm(agent.at, lambda: (looks.append(agent.time), look()))  # type: ignore[func-returns-value]

    def every() -> None:
        look()
        agent.at(agent.time + agent.hangs.period, every)

    def answer(question: Ask) -> None:
        agent.hangs.heard(MEMBERS[0], Position(number=question.number, report=at_work(MEMBERS[0]).to_json()))

    def at_work(member: str) -> RankReport:
        return RankReport(member=member, where=Where.ELSEWHERE, frame="load", generation=1, step=9)

    every()
    for step in range(10):
        agent.until(agent.time + 1.0)
        agent.board = dict.fromkeys(MEMBERS, (1, step))
    agent.stuck = (at_work(MEMBERS[1]),)
    counts = []
    for _ in range(4):
        before = len(looks)
        end = agent.time + 300.0
        while agent.time < end:
            agent.until(agent.time + 0.5)
            for _, message in agent.told:
                if isinstance(message, Ask):
                    answer(message)
            agent.told.clear()
        counts.append(len(looks) - before)
    assert counts[0] > 20
    assert counts[-1] <= 1.2 * counts[0]
    assert len(agent.timers) <= 4
