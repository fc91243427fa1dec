"""No world trains beside another: what a new one waits for, and what shows that an old one has stopped."""

from __future__ import annotations

from dataclasses import replace

from resilient_train.plan import events as ev
from resilient_train.plan.suspicion import AGENT_GONE
from resilient_train.plan.view import Timing
from resilient_train.spec.messages import Hello
from resilient_train.spec.node import ExitInfo, NodeInfo
from resilient_train.spec.world import Former, Restore

from .membership_bench import LIMITS, Bench, node, worker, world

FENCE = Timing().fence
SILENT = "nothing was heard from it for 5 s"


def spare(*others: NodeInfo) -> Bench:
    """Node 2, whose worker is ready, beside a world of nodes 0 and 1."""
    bench = Bench(2, replace(LIMITS, max_nodes=2))
    bench.sees(*(others or (node(0, worker("n0/0.0")), node(1, worker("n1/0.0")))))
    bench.feed(ev.RecordSeen(world(0, 1, elastic=True)))
    bench.feed(ev.WorkerSpawned("n2/0.0"))
    bench.feed(ev.WorkerSaid("n2/0.0", Hello(member="n2/0.0")))
    bench.run_for(1)
    bench.effects.clear()
    return bench


def test_a_world_that_fell_silent_is_parked_and_followed_only_when_it_has_stopped() -> None:
    """It may train on until its word runs out, and it is asked for no later than the record was parked."""
    bench = spare()
    bench.sees(lost={"n0": SILENT, "n1": SILENT})
    bench.run_for(0.2)
    assert bench.record.members == ()
    assert bench.record.former == (Former(generation=1, nodes=("n0", "n1")),)
    bench.run_for(FENCE - 0.3)
    assert bench.record.members == ()
    bench.run_for(0.5)
    assert bench.record.members == ("n2/0.0",)


def test_a_world_whose_nodes_wait_longer_is_waited_for_as_long() -> None:
    """They were started with another --detect-within than those that take over, and may train as long as that says."""
    bench = Bench(2, replace(LIMITS, max_nodes=2))
    bench.sees(node(0, worker("n0/0.0")), node(1, worker("n1/0.0")))
    bench.feed(ev.RecordSeen(world(0, 1, elastic=True, fence=3 * FENCE)))
    bench.feed(ev.WorkerSpawned("n2/0.0"))
    bench.feed(ev.WorkerSaid("n2/0.0", Hello(member="n2/0.0")))
    bench.run_for(1)
    bench.sees(lost={"n0": SILENT, "n1": SILENT})
    bench.run_for(3 * FENCE - 0.3)
    assert bench.record.former == (Former(generation=1, nodes=("n0", "n1"), fence=3 * FENCE),)
    assert bench.record.members == ()
    bench.run_for(0.7)
    assert bench.record.members == ("n2/0.0",)
    assert bench.record.fence == FENCE


def test_the_fence_is_longer_than_the_word_holds_on_any_clock() -> None:
    """By 5% of drift and the time in which a loss is noticed, whatever that is."""
    for within in (0.5, 2.0, 5.0, 60.0):
        timing = Timing.scaled(within)
        assert timing.fence >= 1.05 * timing.vouch + within
        assert timing.vouch >= 20


def test_who_lost_one_agent_is_followed_at_once() -> None:
    """Nobody listens at one of its nodes, so its workers have ended, and the world lacks them."""
    bench = spare()
    bench.sees(lost={"n0": SILENT, "n1": AGENT_GONE})
    bench.run_for(0.2)
    assert bench.record.members == ("n2/0.0",)
    assert bench.record.former == ()


def test_who_lost_a_process_is_followed_at_once() -> None:
    """Its agent said so before it fell silent, or is there."""
    exited = ExitInfo(member="n0/0.0", code=-9, elastic=True, acknowledged=1, done=0)
    bench = spare(node(0, exits=(exited,)))
    bench.sees(node(0, exits=(exited,)), lost={"n1": SILENT})
    bench.run_for(0.2)
    assert bench.record.members == ("n2/0.0",)


def test_a_node_that_is_back_and_has_left_ends_the_wait() -> None:
    """It knows of the later generation, and its worker waits to be named."""
    bench = spare()
    bench.sees(lost={"n0": SILENT, "n1": SILENT})
    bench.run_for(5)
    assert bench.record.members == ()
    still = node(0, worker("n0/0.0"), generation=2)
    bench.sees(still, lost={"n1": SILENT})
    bench.run_for(0.2)
    assert bench.record.members == (), "it has not come to its boundary yet"
    bench.sees(replace(still, workers=(worker("n0/0.0", idle=True),)), lost={"n1": SILENT})
    bench.run_for(0.2)
    assert bench.record.members == ("n0/0.0", "n2/0.0")


def test_what_was_said_before_a_world_began_says_nothing_about_it() -> None:
    """A worker was idle as its agent knew the generation before."""
    bench = spare()
    bench.feed(ev.RecordSeen(world(revision=7, generation=3, former=(Former(generation=2, nodes=("n0",)),))))
    bench.sees(node(0, worker("n0/0.0", idle=True), generation=2, leaving="drained"))
    bench.run_for(FENCE)
    assert bench.record.members == ()


def test_a_world_that_shares_a_node_with_the_one_before_does_not_wait() -> None:
    """It cannot form before that node has left the old world; which is remembered until it has formed."""
    bench = Bench(2)
    bench.sees(node(0, worker("n0/0.0")))
    bench.feed(ev.RecordSeen(world(0, 2, elastic=True)))
    bench.train("n2/0.0")
    bench.sees(lost={"n0": SILENT})
    bench.run_for(0.2)
    assert bench.record.members == ("n2/0.0",)
    assert bench.record.former == (Former(generation=1, nodes=("n0", "n2")),)


def test_a_world_that_never_formed_hides_none_that_may_still_train() -> None:
    """Generation 2 shares node 0 with generation 1 and never heard of it: its successor waits for generation 1."""
    bench = spare()
    former = (Former(generation=1, nodes=("n0", "n1")),)
    bench.feed(ev.RecordSeen(world(0, 2, revision=5, generation=2, elastic=True, former=former)))
    bench.sees(lost={"n0": SILENT, "n1": SILENT})
    bench.run_for(FENCE - 0.5)
    assert bench.record.generation == 2
    bench.run_for(1)
    assert (bench.record.generation, bench.record.members) == (3, ("n2/0.0",))


def test_a_world_that_has_resumed_needs_nothing_known_of_those_before() -> None:
    """All its members had left them."""
    bench = spare()
    former = (Former(generation=1, nodes=("n0", "n1")),)
    resumed = (Restore(generation=2, lineage=2, source=None),)
    record = world(0, 2, revision=5, generation=2, elastic=True, former=former, restores=resumed)
    bench.feed(ev.RecordSeen(record))
    bench.sees(lost={"n0": SILENT, "n1": SILENT})
    bench.run_for(0.5)
    assert (bench.record.generation, bench.record.members) == (3, ("n2/0.0",))


def test_the_stores_word_holds_from_when_it_was_asked_for() -> None:
    """And only if the record that this node knows is the newest."""
    bench = spare()
    bench.feed(ev.Vouched(revision=1, asked_at=bench.now - 2))
    assert bench.taken(ev.Vouch) == [ev.Vouch(until=bench.now - 2 + Timing().vouch)]
    bench.feed(ev.Vouched(revision=2, asked_at=bench.now))
    assert bench.taken(ev.Vouch) == []
