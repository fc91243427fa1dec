"""What the agent's state machine makes of ranks that hang, wait for each other, or fail without a reason."""

from __future__ import annotations

from resilient_train.errors import ExitCode
from resilient_train.plan import events as ev
from resilient_train.spec.messages import (
    Busy,
    Hello,
    Troubled,
)
from resilient_train.spec.world import Phase

from .node_bench import Bench, running


def test_a_hung_worker_is_a_loss_before_its_process_ends() -> None:
    """The others go on at once, and the record says why; its end changes nothing, but frees its slot."""
    bench = Bench()
    bench.start()
    bench.enter()
    bench.feed(ev.Hung("n/1.0", "hung: rank 1 sleeps"))
    bench.run_for(1.0)
    assert bench.record.generation == 2
    assert bench.record.members == ("n/0.0", "n/2.0", "n/3.0")
    assert bench.record.reason == "lost rank 1 (hung: rank 1 sleeps)"
    bench.say("n/1.0", Hello(member="n/1.0"))
    bench.enter()
    bench.run_for(10.0)
    assert bench.record.generation == 2, "who hangs is not taken back in"
    bench.feed(ev.WorkerExited("n/1.0", -9))
    assert bench.record.generation == 2
    bench.run_for(2.0)
    assert bench.state.worker("n/1.1") is not None


def test_deadlocked_ranks_form_again_a_few_times() -> None:
    """The same members, in a new generation; at the same step again and again it ends the job."""
    bench = Bench()
    bench.start()
    members = bench.record.members
    for _ in range(2):
        bench.enter()
        bench.feed(ev.Deadlocked(bench.record.generation, "hung: all wait"))
        bench.feed(ev.Deadlocked(bench.record.generation, "hung: all wait"))
        bench.run_for(1.0)
        assert bench.record.members == members
        assert bench.record.reason == "hung: all wait; all form again"
    assert bench.record.generation == 3
    bench.feed(ev.Deadlocked(2, "hung: of a generation before"))
    bench.run_for(1.0)
    assert bench.record.generation == 3
    bench.enter()
    bench.feed(ev.Deadlocked(3, "hung: all wait"))
    bench.run_for(1.0)
    assert bench.record.phase is Phase.FAILED
    assert bench.record.exit_code == ExitCode.NO_PROGRESS
    assert "the last: hung: all wait" in bench.record.error


def test_announced_operations_are_told_to_all() -> None:
    """A rank's long operation stands in its node's announcement until it is over."""
    bench = Bench()
    bench.start()
    bench.say("n/2.0", Busy(name="evaluate"))
    assert bench.state.view.workers()["n/2.0"].busy == "evaluate"
    bench.say("n/2.0", Busy(name=""))
    assert bench.state.view.workers()["n/2.0"].busy == ""


def test_a_failed_collective_that_nobody_explains_has_all_form_again() -> None:
    """The same members, a new generation; if that helps nobody, the job ends and says what failed."""
    bench = running(slots=2)
    for generation in (1, 2, 3):
        bench.say("n/1.0", Troubled(generation=generation - 1, text="of a generation before"))
        bench.run_for(1.0)
        assert bench.record.generation == generation
        bench.say("n/1.0", Troubled(generation=generation, text="rank 1 could not communicate"))
        bench.run_for(1.0)
        if bench.record.phase is Phase.RUNNING:
            assert bench.record.members == ("n/0.0", "n/1.0")
            bench.enter()
    assert bench.record.phase is Phase.FAILED
    assert "rank 1 could not communicate" in bench.record.error
