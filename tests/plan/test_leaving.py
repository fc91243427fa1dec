"""Nodes that leave, fewer nodes by wish, and whose errors end a job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilient_train.errors import ExitCode
from resilient_train.plan import events as ev
from resilient_train.plan.view import Limits
from resilient_train.spec.messages import Acknowledge, Done, Hello, Promise, Stage, UserFailed
from resilient_train.spec.node import WorkerInfo
from resilient_train.spec.world import Phase

from .membership_bench import LIMITS, Bench, node, training, worker, world


def ended(bench: Bench) -> list[ExitCode]:
    """Its workers end when they are told to; how it ends itself."""
    for stop in bench.taken(ev.Stop):
        bench.feed(ev.WorkerExited(stop.member, -15))
    return [end.code for end in bench.taken(ev.End)]


def test_when_all_nodes_leave_the_job_is_parked_and_interrupted() -> None:
    """SIGTERM to every node: at a boundary nobody is left, and each ends with a code that says: start it again."""
    bench = training(0, 1)
    bench.feed(ev.Progress(1, 7))
    bench.feed(ev.LeaveAsked("SIGTERM"))
    bench.sees(node(1, worker("n1/0.0"), leaving="SIGTERM"))
    bench.run_for(0.1)
    planned = bench.record.planned
    assert planned is not None
    assert planned.members == ()
    bench.sees(node(1, worker("n1/0.0", promised=planned.number), leaving="SIGTERM"))
    bench.feed(ev.WorkerSaid("n0/0.0", Promise(number=planned.number, accepted=True)))
    assert (bench.record.members, bench.record.phase) == ((), Phase.RUNNING)
    bench.feed(ev.WorkerSaid("n0/0.0", Hello(member="n0/0.0")))
    assert ended(bench) == [ExitCode.INTERRUPTED]


@pytest.mark.parametrize(("by_name", "code"), [(True, ExitCode.SUCCESS), (False, ExitCode.INTERRUPTED)])
def test_who_leaves_too_few_behind_is_wanted_back_unless_it_was_drained(by_name: bool, code: ExitCode) -> None:
    """The others wait for nodes, with all that they have; a signal below MIN is no failure of the job."""
    bench = training(0, 1, limits=replace(LIMITS, min_nodes=2))
    if not by_name:
        bench.feed(ev.LeaveAsked("SIGTERM"))
    assert bench.record.phase is Phase.RUNNING
    leave = ("n0",) if by_name else ()
    bench.feed(ev.RecordSeen(replace(world(), revision=9, generation=2, leave=leave)))
    assert ended(bench) == [code]


def test_who_leaves_while_others_go_on_has_done_its_part() -> None:
    """By signal or by name: its exit code is 0."""
    bench = training(1, 0)
    bench.feed(ev.LeaveAsked("SIGTERM"))
    bench.feed(ev.RecordSeen(world(0, revision=5, generation=2)))
    assert ended(bench) == []
    bench.run_for(60)
    assert ended(bench) == [ExitCode.SUCCESS]


def test_a_second_signal_concerns_this_node_only() -> None:
    """It leaves at once; the job is not failed."""
    bench = training(0, 1)
    bench.feed(ev.LeaveAsked("SIGTERM"))
    assert bench.taken(ev.Stop) == []
    bench.feed(ev.LeaveAsked("SIGTERM"))
    assert ended(bench) == [ExitCode.SUCCESS]
    assert bench.record.phase is Phase.RUNNING


def test_a_nodes_only_peer_is_gone_before_it_could_leave() -> None:
    """A signal to a job's last node ends the job, in good order."""
    bench = training(0, 1)
    bench.sees(lost={"n1": "its agent is gone"})
    bench.run_for(0.1)
    bench.feed(ev.LeaveAsked("SIGTERM"))
    assert (bench.record.phase, bench.record.exit_code) == (Phase.FAILED, ExitCode.INTERRUPTED)


def test_fewer_nodes_are_taken_at_a_boundary() -> None:
    """`rtctl scale`: nobody is interrupted, and who joined last stands by."""
    bench = training(0, 1, 2)
    bench.feed(ev.Progress(1, 7))
    bench.feed(ev.Wished((), 2))
    bench.run_for(0.1)
    assert bench.record.generation == 1
    assert bench.record.planned is not None
    assert bench.record.planned.members == ("n0/0.0", "n1/0.0")


def test_wishes_add_up() -> None:
    """Two nodes are drained one after the other, before the first wish is agreed."""
    bench = training(0, 1, 2)
    bench.answers = False
    bench.feed(ev.Wished(("n1",), 0))
    bench.feed(ev.Wished(("n2",), 0))
    bench.answers = True
    bench.feed(ev.RecordSeen(bench.record))
    assert bench.record.leave == ("n1", "n2")


def late(bench: Bench, idle: bool) -> None:
    """Node 0 is ready for a new generation, node 1 does not come free."""
    spare = (node(2, WorkerInfo(member="n2/0.0", elastic=True, idle=True, multiple=2)),) if idle else ()
    bench.sees(node(1, worker("n1/0.0", multiple=2)), *spare)
    bench.feed(ev.RecordSeen(world(0, 1, revision=2, generation=2)))
    bench.feed(ev.WorkerSaid("n0/0.0", Acknowledge(generation=2, at=bench.now)))
    bench.run_for(bench.state.view.timing.acknowledge + 0.1)


def test_an_idle_worker_takes_the_place_of_one_that_is_late() -> None:
    """The mesh stays whole."""
    bench = training(0, 1)
    late(bench, idle=True)
    assert bench.record.members == ("n0/0.0", "n2/0.0")


@pytest.mark.parametrize("limits", [LIMITS, Limits(min_nodes=2, max_nodes=4)])
def test_too_few_without_the_late_one_are_parked(limits: Limits) -> None:
    """No world that the mesh or MIN does not take."""
    bench = training(0, 1, limits=limits)
    late(bench, idle=False)
    assert bench.record.members == ()
    assert "too few are left" in bench.record.reason


def test_a_leaving_node_of_a_script_without_boundaries_goes() -> None:
    """After a while, though the running step is lost: it goes anyway."""
    bench = Bench(0)
    bench.sees(node(1, worker("n1/0.0", stepping=0)))
    bench.feed(ev.RecordSeen(world(0, 1)))
    for message in (
        Hello(member="n0/0.0"),
        Acknowledge(generation=1, at=bench.now),
        Stage(generation=1, stage="formed", at=bench.now),
    ):
        bench.feed(ev.WorkerSaid("n0/0.0", message))
    bench.sees(node(1, worker("n1/0.0", stepping=0), leaving="drained"))
    bench.run_for(1)
    assert bench.record.generation == 1
    bench.run_for(bench.state.view.timing.no_boundary)
    assert bench.record.members == ("n0/0.0",)


def test_an_error_of_a_worker_that_the_job_went_on_without_ends_nothing() -> None:
    """A node that was cut off comes back and still says how its worker ended."""
    bench = training(0, 1)
    bench.feed(ev.RecordSeen(world(0, revision=2, generation=2)))
    failed = {"failed": "OSError: no route", "culprit": "n1/0.0"}
    bench.sees(node(1, failed_in=1, **failed))
    assert bench.record.phase is Phase.RUNNING
    bench.sees(node(1, failed_in=2, **failed))
    assert bench.record.phase is Phase.FAILED


def test_an_error_of_a_member_ends_the_job_whenever_it_happened() -> None:
    """Another loss may have changed the world just before."""
    bench = training(0, 1)
    bench.feed(ev.RecordSeen(world(0, 1, revision=2, generation=2)))
    bench.feed(ev.WorkerSaid("n0/0.0", UserFailed(generation=1, text="ValueError: x")))
    assert (bench.record.phase, bench.record.error) == (Phase.FAILED, "ValueError: x")


@pytest.mark.parametrize("order", [0, 1])
def test_the_end_is_agreed_by_the_first_in_turn_at_once(order: int) -> None:
    """The others wait, and do it if the first does not: not all nodes write the record at one moment."""
    bench = training(order, 1 - order)
    bench.feed(ev.WorkerSaid(f"n{order}/0.0", Done(generation=1)))
    bench.sees(node(1 - order, worker(f"n{1 - order}/0.0", done=1)))
    assert (bench.record.phase is Phase.FINISHED) is (order == 0)
    bench.run_for(0.06)
    assert bench.record.phase is Phase.FINISHED


def test_a_job_that_waits_for_nodes_saves_its_state_once() -> None:
    """As soon as the last worker has come free, and not before: until then a newer state may come."""
    bench = training(0, 1, limits=replace(LIMITS, min_nodes=2))
    bench.feed(ev.RecordSeen(replace(world(), revision=9, generation=2)))
    assert bench.taken(ev.Save) == []
    bench.feed(ev.WorkerSaid("n0/0.0", Hello(member="n0/0.0")))
    bench.run_for(5.0)
    assert len(bench.taken(ev.Save)) == 1


def test_who_is_to_leave_when_the_store_has_ended_leaves_alone() -> None:
    """Nobody can agree on a boundary any more: at once, and interrupted, as nobody can go on from there."""
    bench = training(0, 1)
    bench.feed(ev.StoreSilent("nobody listens there any more", lasting=False, gone=True))
    bench.run_for(100.0)
    assert not bench.taken(ev.End)
    bench.feed(ev.LeaveAsked("its agent got SIGTERM"))
    (end,) = bench.taken(ev.End)
    assert end.code is ExitCode.INTERRUPTED
    assert end.text == "its agent got SIGTERM; nobody listens there any more"
