"""The agent's state machine on one of several nodes: what it makes of the others, every transition by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilient_train.errors import ExitCode
from resilient_train.plan import events as ev
from resilient_train.plan.view import Limits
from resilient_train.spec.messages import Acknowledge, Hello, Promise
from resilient_train.spec.node import ExitInfo, WorkerInfo
from resilient_train.spec.world import Phase, Planned, node_of

from .membership_bench import LIMITS, Bench, node, training, worker, world


def test_nothing_is_proposed_before_the_record_was_read() -> None:
    """A newcomer does not begin a job that others are in."""
    bench = Bench(0)
    bench.sees()
    bench.run_for(60)
    assert bench.taken(ev.Swap) == []
    bench.feed(ev.RecordSeen(None))
    bench.run_for(60)
    assert bench.record.members == ("n0/0.0",)


def test_the_first_node_proposes_the_first_world_after_the_last_call() -> None:
    """Two of at most four are there: they wait a moment for further ones; the second one proposes nothing."""
    first, second = Bench(0), Bench(1)
    for bench, other in ((first, 1), (second, 0)):
        bench.sees(node(other))
        bench.feed(ev.RecordSeen(None))
        bench.run_for(LIMITS.last_call - 0.1)
        assert bench.taken(ev.Swap) == []
        bench.run_for(0.2)
    assert first.record.members == ("n0/0.0", "n1/0.0")
    assert second.taken(ev.Swap) == []


def test_a_lost_node_is_left_out_by_the_lowest_survivor_first() -> None:
    """The others wait their turn, and propose the same if the first does not."""
    first, second = training(1, 0, 2), training(2, 0, 1)
    first.sees(node(2, worker("n2/0.0")), lost={"n0": "its agent is gone"})
    second.sees(node(1, worker("n1/0.0")), lost={"n0": "its agent is gone"})
    first.run_for(0.021)
    second.run_for(0.021)
    assert first.record.members == ("n1/0.0", "n2/0.0")
    assert first.record.bootstrap == "n1:0"
    assert "its agent is gone" in first.record.reason
    assert second.record.generation == 1
    second.run_for(0.05)
    assert second.record.members == ("n1/0.0", "n2/0.0")


def test_a_node_that_was_never_seen_is_not_lost_at_once() -> None:
    """The store may have let everybody's announcement expire just before this node came."""
    bench = Bench(2)
    bench.feed(ev.RecordSeen(world(0, 1, elastic=True)))
    bench.run_for(1)
    assert bench.record.generation == 1
    bench.sees(node(0, worker("n0/0.0")), node(1, worker("n1/0.0")))
    bench.run_for(60)
    assert bench.record.generation == 1


def test_a_job_that_all_have_left_is_taken_over() -> None:
    """Nobody whom the record names is ever seen: the newcomer goes on once they have stopped for sure."""
    bench = Bench(2)
    bench.feed(ev.RecordSeen(world(0, 1, elastic=True)))
    assert [effect.member for effect in bench.taken(ev.Spawn)] == ["n2/0.0"]
    bench.feed(ev.WorkerSaid("n2/0.0", Hello(member="n2/0.0")))
    bench.run_for(30)
    assert bench.record.members == ()
    bench.run_for(15)
    assert bench.record.members == ("n2/0.0",)


def test_that_the_script_is_elastic_is_remembered_by_the_record() -> None:
    """Those who heard hello may all be gone; without that the newcomer would fail the job as torchrun does."""
    bench = training(1, 0)
    bench.sees(lost={"n0": "its agent is gone"})
    bench.run_for(0.1)
    assert bench.record.elastic


def test_many_nodes_lost_at_once_are_all_known_to_be_lost() -> None:
    """A switch fails: whom the record names is remembered, however many."""
    gone = range(1, 200)
    bench = training(0, *gone, limits=replace(LIMITS, max_nodes=200))
    bench.sees(lost={f"n{order}": "its agent is gone" for order in gone})
    bench.sees(lost={"n300": "another"})
    bench.run_for(0.1)
    assert bench.record.members == ("n0/0.0",)


def test_a_node_lost_before_anybody_said_hello_uses_up_no_restart() -> None:
    """The group restarts on those that are left; what a script does itself still counts."""
    bench = Bench(1)
    bench.sees(node(0, WorkerInfo(member="n0/0.0")), node(2, WorkerInfo(member="n2/0.0")))
    bench.feed(ev.RecordSeen(world(0, 1, 2)))
    bench.sees(node(2, WorkerInfo(member="n2/0.0")), lost={"n0": "its agent is gone"})
    bench.run_for(0.1)
    assert bench.record.members == ("n1/0.1", "n2/0.1")
    assert (bench.record.restarts, bench.record.phase) == (0, Phase.RUNNING)
    ended = ExitInfo(member="n2/0.1", code=1, elastic=False, acknowledged=0, done=0)
    bench.sees(node(2, exits=(ended,)))
    bench.run_for(0.1)
    assert bench.record.phase is Phase.FAILED
    assert "exited with code 1" in bench.record.error


def test_too_few_nodes_before_anybody_said_hello_are_waited_for() -> None:
    """For a bounded time; then the job ends with a code that says that trying again may help."""
    bench = Bench(1, replace(LIMITS, min_nodes=2))
    bench.sees(node(0, WorkerInfo(member="n0/0.0")))
    bench.feed(ev.RecordSeen(world(0, 1)))
    bench.sees(lost={"n0": "its agent is gone"})
    bench.run_for(LIMITS.patience - 1)
    assert bench.record.phase is Phase.RUNNING
    bench.run_for(2)
    assert (bench.record.phase, bench.record.exit_code) == (Phase.FAILED, ExitCode.PARKED)


def test_below_min_the_survivors_are_parked_and_begin_again() -> None:
    """They let go of their world; when enough are idle again, these form the next."""
    bench = training(1, 0, limits=replace(LIMITS, min_nodes=2))
    bench.sees(lost={"n0": "its agent is gone"})
    bench.run_for(0.1)
    assert (bench.record.generation, bench.record.members) == (2, ())
    bench.feed(ev.WorkerSaid("n1/0.0", Hello(member="n1/0.0")))
    bench.sees(node(2, WorkerInfo(member="n2/0.0", elastic=True, idle=True)))
    bench.run_for(0.1)
    assert bench.record.members == ("n1/0.0", "n2/0.0")


def test_what_the_mesh_lacked_is_said_when_nobody_came() -> None:
    """There are as many nodes as there have to be; it is ranks that are too few."""
    bench = training(1, 0, limits=LIMITS)
    bench.feed(ev.WorkerSaid("n1/0.0", Hello(member="n1/0.0", multiple=2)))
    bench.sees(lost={"n0": "its agent is gone"})
    bench.run_for(LIMITS.patience + 1)
    assert (bench.record.phase, bench.record.exit_code) == (Phase.FAILED, ExitCode.PARKED)
    assert bench.record.error == "fewer ranks than the mesh takes, which is a multiple of 2, for 600 s"


def test_who_is_doubted_proposes_nothing() -> None:
    """The others cannot reach this node, and reckon it among those to go."""
    bench = training(1, 0)
    bench.sees(lost={"n0": "other nodes cannot reach it"}, doubted=True)
    bench.run_for(60)
    assert bench.taken(ev.Swap) == []


def test_who_comes_back_stays_reachable_for_a_while_before_it_is_taken_in() -> None:
    """A line that comes and goes does not change the world each time."""
    bench = training(0, 1)
    bench.sees(lost={"n1": "nothing was heard from it"})
    bench.run_for(0.1)
    bench.train("n0/0.0")
    bench.feed(ev.Progress(2, 7))
    bench.sees(node(1, WorkerInfo(member="n1/0.0", elastic=True, idle=True)))
    bench.run_for(1.9)
    assert bench.record.planned is None
    bench.run_for(0.3)
    assert bench.record.planned is not None
    assert bench.record.planned.members == ("n0/0.0", "n1/0.0")


@pytest.mark.parametrize("boundary", [8, None])
def test_a_leaving_nodes_workers_go_on_up_to_their_boundary(boundary: int | None) -> None:
    """Ended before it, they would cost the others the steps up to it; where there is none, they end at once."""
    bench = training(1, 0)
    bench.feed(ev.LeaveAsked("drained"))
    bench.feed(ev.RecordSeen(world(0, revision=5, generation=2, boundary=boundary)))
    assert [stop.member for stop in bench.taken(ev.Stop)] == ([] if boundary else ["n1/0.0"])
    if boundary:
        bench.feed(ev.WorkerSaid("n1/0.0", Hello(member="n1/0.0")))
        assert [stop.member for stop in bench.taken(ev.Stop)] == ["n1/0.0"]


def test_a_leaving_worker_that_does_not_reach_its_boundary_is_ended() -> None:
    """Nobody waits for ever."""
    bench = training(1, 0)
    bench.feed(ev.LeaveAsked("drained"))
    bench.feed(ev.RecordSeen(world(0, revision=5, generation=2, boundary=8)))
    bench.run_for(bench.state.view.timing.acknowledge + 0.1)
    assert [stop.member for stop in bench.taken(ev.Stop)] == ["n1/0.0"]


def test_a_boundary_that_cannot_be_reached_is_given_up() -> None:
    """The leaving node is lost before it: the old world's step never ends, and no member of the new one is lost."""
    bench = training(0, 1, 2)
    leaving = node(1, worker("n1/0.0"), leaving="drained")
    bench.sees(leaving, node(2, worker("n2/0.0")))
    planned = Planned(number=2, boundary=8, members=("n0/0.0", "n2/0.0"), reason="n1 leaves")
    bench.feed(ev.RecordSeen(world(0, 1, 2, revision=2, planned=planned)))
    bench.feed(ev.WorkerSaid("n0/0.0", Promise(number=2, accepted=True)))
    bench.feed(ev.RecordSeen(world(0, 2, revision=3, generation=2, boundary=8, reason="n1 leaves")))
    bench.run_for(60)
    assert bench.record.generation == 2
    bench.sees(node(2, worker("n2/0.0")), lost={"n1": "nothing was heard from it"})
    bench.run_for(0.1)
    assert (bench.record.generation, bench.record.boundary) == (3, None)
    assert bench.record.members == ("n0/0.0", "n2/0.0")


def test_nodes_beyond_the_most_stand_by_and_take_a_lost_ones_place() -> None:
    """In the same transition, warm as they are."""
    bench = training(0, 1, limits=Limits(min_nodes=2, max_nodes=2))
    spare = node(2, WorkerInfo(member="n2/0.0", elastic=True, idle=True))
    bench.sees(node(1, worker("n1/0.0")), spare)
    bench.run_for(60)
    assert bench.taken(ev.Swap) == []
    bench.sees(spare, lost={"n1": "its agent is gone"})
    bench.run_for(0.1)
    assert {node_of(member) for member in bench.record.members} == {"n0", "n2"}


def test_nobody_is_late_while_the_store_is_silent() -> None:
    """What others could not announce is no fault of their workers; the time begins when the store answers again."""
    bench = training(0, 1)
    bench.feed(ev.RecordSeen(world(0, 1, revision=2, generation=2)))
    bench.feed(ev.WorkerSaid("n0/0.0", Acknowledge(generation=2, at=bench.now)))
    bench.feed(ev.StoreSilent("no answer", lasting=True))
    bench.run_for(60)
    bench.feed(ev.RecordSeen(bench.record))
    bench.run_for(bench.state.view.timing.acknowledge - 1)
    assert bench.record.generation == 2
    bench.run_for(2)
    assert bench.record.members == ("n0/0.0",)


def test_a_spare_that_is_not_heard_of_is_not_taken_in() -> None:
    """It may be about to be lost, and another node may know already; as soon as it is heard it is welcome."""
    bench = training(0, 1)
    spare = node(2, WorkerInfo(member="n2/0.0", elastic=True, idle=True))
    others = (node(1, worker("n1/0.0"), progress=(1, 5)), spare)
    bench.feed(ev.NodesSeen(nodes=others, fading=frozenset({"n2"})))
    bench.run_for(60)
    assert bench.record.planned is None
    bench.feed(ev.NodesSeen(nodes=others))
    bench.run_for(1)
    assert bench.record.planned is not None
    assert bench.record.planned.members == ("n0/0.0", "n1/0.0", "n2/0.0")
