"""A node among the others: its announcement reaches the store in the end, and the store's silence is told as it is."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from resilient_train.agent.cluster import Cluster
from resilient_train.agent.loop import Loop
from resilient_train.clock import MonotonicClock
from resilient_train.control.store import News
from resilient_train.errors import JobReplaced, StoreGone, StoreLost
from resilient_train.plan import events as ev
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord

ME = NodeInfo(node="n0", order=0, endpoint="h:1", slots=1, link="h:0")
OTHER = NodeInfo(node="n1", order=1, endpoint="h:2", slots=1, link="h:1")
WITHIN, VOUCH = 0.2, 0.6
pytestmark = pytest.mark.timeout(60)


class Store:
    """A store in memory that can be out, or slow."""

    lasting = True

    def __init__(self) -> None:
        self.out = self.gone = False
        self.go, self.word = threading.Event(), threading.Event()
        self.go.set()
        self.word.set()
        self.asked = 0
        self.announced: list[NodeInfo] = []
        self.beats = 0
        self.withdrawn = False
        self.replaced = False
        self.unreadable: tuple[str, ...] = ()
        self._changes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.number = 1

    def _called(self) -> None:
        self.go.wait()
        if self.replaced:
            raise JobReplaced("another job")
        if self.out:
            raise StoreGone("nobody listens") if self.gone else StoreLost("no answer")

    def announce(self, info: NodeInfo) -> None:
        self._called()
        self.announced.append(info)

    def beat(self) -> None:
        self._called()
        self.beats += 1

    def look(self) -> News:
        self._called()
        return News(number=self.number, record=None, nodes=(ME, OTHER), unreadable=self.unreadable)

    def revision(self) -> int:
        self._called()
        self.asked += 1
        self.word.wait()
        return 7

    def watch(self, number: int, timeout: float) -> News | None:
        self._changes.get()
        return self.look()

    def change(self) -> None:
        self.number += 1
        self._changes.put(None)

    def swap(self, record: WorldRecord) -> WorldRecord:
        self._called()
        return replace(record, reason="somebody else's")

    def withdraw(self) -> None:
        self.withdrawn = True

    def close(self) -> None:
        self._changes.put(None)


class Lines:
    def want(self, nodes: Mapping[str, str]) -> None: ...

    def beat(self) -> None: ...

    def close(self) -> None: ...


class Bench:
    """An agent's loop around a cluster."""

    def __init__(self, *, alone: bool = False) -> None:
        self.loop, self.store = Loop(MonotonicClock()), Store()
        self.fed: list[ev.Event] = []
        self.said: list[str] = []
        lines = None if alone else cast(Any, Lines())
        self.cluster = self.made(lines)

    def made(self, lines: Any) -> Cluster:
        store = cast(Any, self.store)
        return Cluster(self.loop, store, lines, ME, WITHIN, VOUCH, self.said.append, self.fed.append)

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.loop.once(0.01)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.fed if isinstance(event, kind)]


def test_it_announces_itself_beats_and_hears_the_others() -> None:
    """The first news name the other node; later ones come by the watch; at the end it takes its leave."""
    bench = Bench()
    bench.cluster.begin()
    bench.until(lambda: bench.of(ev.NodesSeen) and bench.store.beats >= 2)
    assert [node.node for node in bench.of(ev.NodesSeen)[-1].nodes] == ["n1"]
    assert bench.store.announced == [ME]
    seen = len(bench.of(ev.RecordSeen))
    bench.store.change()
    bench.until(lambda: len(bench.of(ev.RecordSeen)) > seen)
    bench.cluster.close(10.0)
    assert bench.store.withdrawn


def test_announcements_that_a_slow_store_has_not_taken_yet_are_made_once() -> None:
    """With what is true when it is free: neither every state in between, nor an old one last."""
    bench = Bench()
    bench.store.go.clear()
    bench.cluster.begin()
    for step in range(1, 50):
        bench.cluster.announce(replace(ME, progress=(1, step)))
    bench.store.go.set()
    bench.until(lambda: bench.store.announced and bench.store.announced[-1].progress == (1, 49))
    assert len(bench.store.announced) <= 2
    bench.cluster.close(10.0)


def test_what_the_store_did_not_take_is_announced_again() -> None:
    """By the next beat after it is back; a sign of life for an old announcement would say the wrong thing."""
    bench = Bench()
    bench.cluster.begin()
    bench.until(lambda: bench.store.beats and bench.store.announced)
    bench.store.out = True
    bench.cluster.announce(replace(ME, leaving="SIGTERM"))
    bench.until(lambda: bench.of(ev.StoreSilent))
    bench.store.out = False
    bench.until(lambda: bench.store.announced[-1].leaving == "SIGTERM")
    bench.cluster.close(10.0)


def test_an_outage_is_said_once_and_its_end_once() -> None:
    """However many calls fail meanwhile; its end is noticed although nothing has changed in the store."""
    bench = Bench()
    bench.cluster.begin()
    bench.until(lambda: bench.store.beats)
    bench.store.out = True
    bench.until(lambda: len(bench.of(ev.StoreSilent)) >= 4)
    assert all(event.lasting for event in bench.of(ev.StoreSilent))
    assert bench.said == ["no answer; training goes on, changes of the world wait"]
    bench.store.out = False
    bench.until(lambda: len(bench.said) > 1)
    assert bench.said[1:] == ["the control store answers again"]
    bench.cluster.close(10.0)


def test_a_store_that_ends_with_its_host_is_given_one_time_to_answer() -> None:
    """A single lost call is no end; silence for longer than a loss takes to be noticed is."""
    bench = Bench()
    bench.store.lasting = False
    bench.cluster = bench.made(Lines())
    bench.store.out = True
    bench.cluster.begin()
    bench.until(lambda: bench.of(ev.StoreSilent) and not bench.of(ev.StoreSilent)[-1].lasting)
    assert bench.of(ev.StoreSilent)[0].lasting
    bench.cluster.close(10.0)


def test_a_store_that_has_ended_is_said_to_have() -> None:
    """Once, also where it was only silent before; that it is gone goes to the agent's machine."""
    bench = Bench()
    bench.store.lasting = False
    bench.cluster = bench.made(Lines())
    bench.cluster.begin()
    bench.until(lambda: bench.store.beats)
    bench.store.out = True
    bench.until(lambda: bench.of(ev.StoreSilent))
    assert not any(event.gone for event in bench.of(ev.StoreSilent))
    bench.store.gone = True
    bench.until(lambda: sum(event.gone for event in bench.of(ev.StoreSilent)) >= 4)
    assert bench.said == [
        "no answer; training goes on, changes of the world wait",
        "nobody listens; training goes on until the world has to change, which ends the job",
    ]
    bench.cluster.close(10.0)


def test_the_stores_word_counts_from_the_moment_of_asking() -> None:
    """An answer that comes late says what was true when it was asked for."""
    bench = Bench()
    bench.cluster.begin()
    bench.until(lambda: len(bench.of(ev.Vouched)) >= 3)
    assert {event.revision for event in bench.of(ev.Vouched)} == {7}
    bench.store.word.clear()
    asked = bench.store.asked
    bench.until(lambda: bench.store.asked > asked)
    late, heard = bench.loop.clock.now(), len(bench.of(ev.Vouched))
    bench.until(lambda: bench.loop.clock.now() > late + VOUCH)
    bench.store.word.set()
    bench.until(lambda: len(bench.of(ev.Vouched)) > heard)
    assert bench.of(ev.Vouched)[heard].asked_at <= late
    bench.cluster.close(10.0)


def test_what_cannot_be_read_is_mentioned_once() -> None:
    """A node of another version; every further news name it again."""
    bench = Bench()
    bench.store.unreadable = ("no field 'workers'",)
    bench.cluster.begin()
    for count in range(1, 4):
        bench.until(lambda n=count: len(bench.of(ev.RecordSeen)) >= n)
        bench.store.change()
    assert sum("no field 'workers'" in text for text in bench.said) == 1
    bench.cluster.close(10.0)


def test_who_loses_a_swap_hears_what_stands() -> None:
    """The record that the store holds, not the one that was proposed."""
    bench = Bench()
    proposed = WorldRecord(revision=2, generation=2, members=("n0/0.0",), bootstrap="h:1", reason="mine")
    bench.cluster.swap(proposed)
    bench.until(lambda: bench.of(ev.RecordSeen))
    assert bench.of(ev.RecordSeen)[0].record.reason == "somebody else's"
    bench.cluster.close(10.0)


def test_a_jobs_only_node_announces_nothing() -> None:
    """Nobody would read it; it reads the record once, and beats no more than it announces."""
    bench = Bench(alone=True)
    bench.cluster.begin()
    bench.until(lambda: bench.of(ev.RecordSeen))
    bench.cluster.announce(replace(ME, progress=(1, 1)))
    bench.cluster.close(10.0)
    assert (bench.store.announced, bench.store.beats, bench.store.withdrawn) == ([], 0, False)


def test_another_job_under_this_ones_id_is_the_end() -> None:
    """It is no silence: the record is lost, however well the store answers."""
    bench = Bench()
    bench.cluster = bench.made(Lines())
    bench.cluster.begin()
    bench.until(lambda: bench.store.beats)
    bench.store.replaced = True
    bench.until(lambda: bench.of(ev.Superseded))
    assert bench.of(ev.Superseded)[0].text == "another job"
    assert bench.of(ev.StoreSilent) == []
