"""A store that does not answer: how long a change that is needed waits for it."""

from __future__ import annotations

import math

import pytest

from resilient_train.errors import ExitCode
from resilient_train.plan import events as ev
from resilient_train.plan.view import Limits, Timing
from resilient_train.spec.node import WorkerInfo

from .membership_bench import node, training

CALL = 10.0
"""Seconds after which a call to the store fails."""


def ask_in_vain(kind: str) -> tuple[float, ev.End]:
    """Seconds until this node gives up, with a store that answers nothing."""
    bench = training(0, 1, 2)
    bench.answers = False
    began = bench.now
    if kind == "loss":
        bench.sees(*(info for info in bench.state.view.nodes.values() if info.node == "n1"), lost={"n2": "silence"})
    else:
        bench.feed(ev.Deadlocked(1, "all wait"))
    while bench.now < began + 10_000:
        if ends := bench.taken(ev.End):
            return bench.now - began, ends[0]
        if bench.taken(ev.Swap):
            bench.now += CALL
            bench.feed(ev.StoreSilent("no answer", lasting=True))
        else:
            bench.now = min(at for at in bench.wakes if at > bench.now)
            bench.feed(ev.Tick())
    raise AssertionError("it never gave up")


@pytest.mark.parametrize("kind", ["loss", "hang"])
def test_a_store_that_is_gone_for_good_ends_the_job(kind: str) -> None:
    """Within patience and one call, whatever the change is that needs it."""
    seconds, end = ask_in_vain(kind)
    assert end.code is ExitCode.STORE_LOST
    assert Limits().patience <= seconds + CALL
    assert seconds <= Limits().patience + 2 * CALL


def test_a_store_that_answers_in_time_is_asked_again() -> None:
    """The change is made as soon as it does."""
    bench = training(0, 1, 2)
    bench.answers = False
    bench.feed(ev.Deadlocked(1, "all wait"))
    bench.run_for(0.1)
    bench.feed(ev.StoreSilent("no answer", lasting=True))
    bench.answers = True
    bench.run_for(1.0)
    assert bench.record.generation == 2


def test_a_deadlock_that_was_none_is_forgotten() -> None:
    """The ranks went on while the store was away: nothing is formed again when it is back."""
    bench = training(0, 1, 2)
    bench.answers = False
    bench.feed(ev.Deadlocked(1, "all wait"))
    bench.run_for(0.1)
    bench.feed(ev.StoreSilent("no answer", lasting=True))
    bench.feed(ev.Progress(1, 8))
    bench.answers = True
    bench.feed(ev.RecordSeen(bench.record))
    bench.run_for(60)
    assert bench.record.generation == 1


def test_a_change_that_is_not_needed_ends_nothing() -> None:
    """Somebody could join while the store is away: nobody gives up on it for that."""
    bench = training(0, 1)
    bench.feed(ev.Progress(1, 7))
    bench.answers = False
    bench.feed(ev.StoreSilent("no answer", lasting=True))
    bench.sees(
        *(info for info in bench.state.view.nodes.values() if info.node == "n1"),
        node(2, WorkerInfo(member="n2/0.0", elastic=True, idle=True)),
    )
    for _ in range(59):
        bench.run_for(10)
        bench.feed(ev.StoreSilent("no answer", lasting=True))
    assert bench.taken(ev.End) == []
    bench.answers = True
    bench.feed(ev.RecordSeen(bench.record))
    bench.run_for(1)
    assert bench.record.planned is not None


@pytest.mark.parametrize(("lasting", "limit"), [(True, Limits().patience), (False, Timing().vouch)])
def test_ranks_that_wait_for_the_stores_word_do_not_wait_for_ever(lasting: bool, limit: float) -> None:
    """Nothing has to change, but nobody steps any more: the job ends when the store was away for too long.

    It ends as soon as the word has run out if the store is not one that outlives its node.
    """
    bench = training(0, 1)
    bench.answers = False
    began = bench.now
    while bench.now < began + limit - 1:
        bench.feed(ev.StoreSilent("no answer", lasting=lasting))
        bench.run_for(1)
    assert bench.taken(ev.End) == []
    bench.run_for(2)
    bench.feed(ev.StoreSilent("no answer", lasting=lasting))
    (end,) = bench.taken(ev.End)
    assert end.code is ExitCode.STORE_LOST
    assert ("--rdzv-backend=etcd" in end.text) is not lasting


def test_a_store_that_has_ended_leaves_the_ranks_alone_until_the_next_change() -> None:
    """Nobody can take over from this world any more, so they need no word; a change ends the job and names etcd."""
    bench = training(0, 1, 2)
    bench.feed(ev.Vouched(bench.record.revision, bench.now))
    assert [v.until for v in bench.taken(ev.Vouch)] == [bench.now + Timing().vouch]
    bench.answers = False
    bench.feed(ev.StoreSilent("no answer", lasting=False))
    assert bench.taken(ev.Vouch) == []
    bench.feed(ev.StoreSilent("it has ended", lasting=False, gone=True))
    for _ in range(100):
        bench.run_for(20)
        bench.feed(ev.StoreSilent("it has ended", lasting=False, gone=True))
    assert [v.until for v in bench.taken(ev.Vouch)] == [math.inf]
    assert bench.taken(ev.End) == []
    bench.sees(*(info for info in bench.state.view.nodes.values() if info.node == "n1"), lost={"n2": "silence"})
    bench.run_for(60)
    bench.feed(ev.StoreSilent("it has ended", lasting=False, gone=True))
    (end,) = bench.taken(ev.End)
    assert end.code is ExitCode.STORE_LOST
    assert "--rdzv-backend=etcd" in end.text


@pytest.mark.parametrize("what", ["its record", "no record", "its revision", "another revision"])
def test_a_store_that_answers_after_it_had_ended_has_to_give_its_word(what: str) -> None:
    """It may be another one, which knows nothing of this world: what it does not vouch for stands still at once."""
    bench = training(0, 1)
    bench.feed(ev.StoreSilent("it has ended", lasting=False, gone=True))
    assert [v.until for v in bench.taken(ev.Vouch)] == [math.inf]
    asked = bench.now
    bench.now += 1
    known = bench.record.revision
    answers = {
        "its record": (ev.RecordSeen(bench.record), bench.now),
        "no record": (ev.RecordSeen(None), bench.now),
        "its revision": (ev.Vouched(known, asked), asked + Timing().vouch),
        "another revision": (ev.Vouched(known + 1, asked), bench.now),
    }
    event, until = answers[what]
    bench.feed(event)
    assert [v.until for v in bench.taken(ev.Vouch)] == [until]
    bench.feed(ev.Vouched(known, bench.now))
    assert [v.until for v in bench.taken(ev.Vouch)] == [bench.now + Timing().vouch]


def test_a_job_that_another_follows_under_its_id_ends_at_once() -> None:
    """Its record is lost for good; not one more step beside the other, and no waiting."""
    bench = training(0, 1)
    bench.answers = False
    bench.feed(ev.StoreSilent("no answer", lasting=True))
    bench.taken(ev.Vouch)
    bench.feed(ev.Superseded("etcd holds another job"))
    assert bench.taken(ev.Vouch) == [ev.Vouch(bench.now)]
    assert bench.taken(ev.End) == [ev.End(ExitCode.STORE_LOST, "etcd holds another job")]
    bench.feed(ev.Superseded("etcd holds another job"))
    assert bench.taken(ev.End) == []


def test_a_second_signal_ends_the_last_node_without_its_store() -> None:
    """The first one has it tell the store, which does not answer, and may do so later."""
    bench = training(0, 1)
    bench.sees(lost={"n1": "its agent is gone"})
    bench.run_for(0.1)
    bench.answers = False
    bench.feed(ev.StoreSilent("no leader", lasting=True))
    bench.feed(ev.LeaveAsked("SIGTERM"))
    bench.run_for(30)
    assert bench.taken(ev.End) == []
    bench.feed(ev.LeaveAsked("SIGTERM"))
    assert bench.taken(ev.End) == [ev.End(ExitCode.INTERRUPTED, "SIGTERM, twice; no leader")]
