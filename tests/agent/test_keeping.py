"""The keeper in the agent's loop: replaced when it dies, given up when it dies again and again, asked at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest

from resilient_train.agent.keeping import Keeping
from resilient_train.agent.loop import Loop
from resilient_train.events import ListSink
from resilient_train.spec.messages import Flushed, Gone, Message, Notice, Ping, Pong, Serving, Standing

POLICY = {"url": "s3://b", "every_steps": 1, "every_seconds": 0.0, "keep_last": 3, "bytes_per_second": 0.0}
WITHIN = 5.0
pytestmark = pytest.mark.timeout(60)


class Line:
    """A connection to a keeper: what is to be read from it."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self.waiting: list[Message] = []

    def fileno(self) -> int:
        return self.read

    def say(self, message: Message) -> None:
        self.waiting.append(message)
        os.write(self.write, b"x")

    def pending(self) -> list[tuple[Message, list[int]]]:
        if self.waiting:
            os.read(self.read, len(self.waiting))
        said, self.waiting = self.waiting, []
        return [(message, []) for message in said]

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


class Process:
    """A real process in the place of a keeper, and a line to it that the test speaks on."""

    def __init__(self) -> None:
        self.started = 0
        self.told: list[Message] = []
        self.standing: Standing | None = None
        self.channel: Line | None = None
        self.pidfd = -1
        self.flushes = 0
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.started += 1
        self._child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        self.pidfd = os.pidfd_open(self._child.pid)

    def kill(self) -> None:
        assert self._child is not None
        self._child.send_signal(signal.SIGKILL)

    def try_connect(self) -> bool:
        self.channel = Line()
        return True

    def owners(self) -> set[str]:
        return {"n/0.0", "n/1.0"}

    def tell(self, message: Message) -> bool:
        self.told.append(message)
        return True

    def take_in(self, message: Message, descriptors: list[int]) -> bool:
        return False

    def flush(self) -> bool:
        self.flushes += 1
        return True

    def died(self) -> int:
        assert self._child is not None
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        os.close(self.pidfd)
        self.pidfd = -1
        return self._child.wait()

    def close(self) -> None:
        if self.pidfd >= 0:
            self.kill()
            self.died()


class Bench:
    """An agent's loop with a keeper; it is what the keeper matters to, too."""

    def __init__(self) -> None:
        self.time = 100.0
        self.loop, self.sink, self.process = Loop(self), ListSink(), Process()
        self.said: list[str] = []
        self.served: list[str] = []
        self.given_up = ""
        self.keeping = Keeping(cast(Any, self.process), self.loop, self.sink, self, WITHIN)
        self.keeping.begin()

    def now(self) -> float:
        return self.time

    def say(self, text: str) -> None:
        self.said.append(text)

    def running(self) -> set[str]:
        return {"n/0.0"}

    def serves(self, endpoint: str) -> None:
        self.served.append(endpoint)

    def no_keeper(self, text: str) -> None:
        self.given_up = text

    def kill(self) -> None:
        """SIGKILL the keeper and let the agent find out."""
        before = len(self.sink.events)
        self.process.kill()
        while not any(event.kind == "keeper_died" for event in self.sink.events[before:]):
            self.loop.once(1.0)

    def ask(self) -> None:
        """Let the agent ask it once more."""
        asked = self.asked()
        while self.asked() == asked and not self.said:
            self.time += 1.0
            self.loop.once(0.0)

    def asked(self) -> int:
        return sum(isinstance(message, Ping) for message in self.process.told)

    def hear(self, message: Message) -> None:
        assert self.process.channel is not None
        self.process.channel.say(message)
        self.loop.once(1.0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.process.close()


def test_a_keeper_that_lives_and_does_not_answer_is_replaced(bench: Bench) -> None:
    """After five questions in a row, which take three times what a loss may go unnoticed; one answer is enough."""
    for _ in range(3):
        for _ in range(4):
            bench.ask()
        bench.hear(Pong())
    assert bench.said == []
    began = bench.time
    for _ in range(5):
        bench.ask()
    assert bench.said == []
    bench.ask()
    assert 2 * WITHIN <= bench.time - began <= 4 * WITHIN
    assert bench.said == ["the keeper has not answered 5 times in a row; it is killed"]
    while bench.process.started < 2:
        bench.loop.once(1.0)
    assert bench.said[1:] == ["the keeper died (exit code -9); another takes over its images"]


def test_who_follows_a_keeper_that_did_not_answer_is_asked_anew(bench: Bench) -> None:
    """What the one before owed is not held against it; nor is an agent's own absence held against a keeper."""
    for _ in range(4):
        bench.ask()
    bench.kill()
    bench.said.clear()
    bench.time += 1000 * WITHIN  # The agent was stopped: it has not asked.
    for _ in range(4):
        bench.ask()
    assert bench.said == []
    assert bench.process.started == 2


def persisted() -> Notice:
    return Notice(kind="persisted", text="step 7 is durable", at=1.0)


def test_another_takes_over_and_hears_who_has_ended_meanwhile(bench: Bench) -> None:
    """Nobody else could tell it that the slots of a dead worker are free."""
    bench.process.told.clear()
    bench.kill()
    assert bench.process.started == 2
    assert bench.process.told == [Gone(member="n/1.0")]
    assert bench.said == ["the keeper died (exit code -9); another takes over its images"]


def test_a_keeper_that_dies_again_and_again_is_given_up(bench: Bench) -> None:
    """Five may follow; the sixth death in a row is the last."""
    for _ in range(5):
        bench.kill()
    assert bench.given_up == ""
    bench.kill()
    assert bench.given_up == "the keeper of this node died 6 times in a row (exit code -9)"
    assert bench.process.started == 6


@pytest.mark.parametrize("proof", ["a durable state", "a minute"])
def test_deaths_of_keepers_that_were_of_use_are_not_in_a_row(bench: Bench, proof: str) -> None:
    """It has made a state durable, or served for a minute."""
    for _ in range(9):
        if proof == "a minute":
            bench.time += 60.0
        else:
            bench.hear(persisted())
        bench.kill()
    assert bench.given_up == ""
    assert bench.keeping.saved == (proof == "a durable state")


def test_what_it_says_is_handed_on(bench: Bench) -> None:
    """Where it serves; that it cannot, which is no end of the job; notices as events and lines."""
    bench.hear(Serving(endpoint="h:1", error=""))
    bench.hear(Serving(endpoint="", error="no such address"))
    bench.hear(persisted())
    assert bench.served == ["h:1", ""]
    assert bench.said == ["images are not copied to other nodes: no such address", "step 7 is durable"]
    assert [event.kind for event in bench.sink.events] == ["persisted"]


def flush(bench: Bench, *, hurry: bool = False) -> str:
    return bench.keeping.flush(lambda: bench.loop.once(0.0), lambda: hurry)


def test_a_keeper_that_dies_over_the_last_state_is_followed_by_one_that_is_asked_again(bench: Bench) -> None:
    """Each is asked once; the answer is that of the one that lived."""

    def once() -> None:
        if bench.process.started == 1 and bench.process.flushes == 1:
            bench.kill()
        elif bench.process.flushes == 2 and bench.process.channel is not None:
            bench.process.channel.say(Flushed(text="disk full"))
        bench.loop.once(0.0)

    assert bench.keeping.flush(once, lambda: False) == "disk full"
    assert (bench.process.started, bench.process.flushes) == (2, 2)


def test_nothing_to_save_is_no_failure(bench: Bench) -> None:
    """Nobody named a place: the end is not held up by a keeper that does not answer, nor called a loss."""
    assert flush(bench, hurry=True) == ""
    bench.process.standing = Standing(policy=POLICY, persisted=None, running=None, past=[])
    assert flush(bench, hurry=True) == "the last state may not be durable: it was not waited for"


def test_the_wait_for_the_last_state_is_bounded_and_mentioned(bench: Bench) -> None:
    """Ten minutes; a word every ten seconds."""
    bench.process.standing = Standing(policy=POLICY, persisted=None, running=None, past=[])

    def once() -> None:
        bench.time += 5.0
        bench.loop.once(0.0)

    why = bench.keeping.flush(once, lambda: False)
    assert why == "the last state may not be durable: that took more than 600 s"
    assert bench.said.count("waiting for the last state to become durable") > 30
