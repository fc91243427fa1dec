"""The agent's state machine under a manual clock: one node, no processes, every transition by hand."""

from __future__ import annotations

from resilient_train.errors import ExitCode
from resilient_train.plan import events as ev
from resilient_train.plan import membership as m
from resilient_train.plan.view import Limits
from resilient_train.spec.messages import (
    Acknowledge,
    Done,
    Hello,
    Promise,
    Resumed,
    Stage,
    UserFailed,
)
from resilient_train.spec.world import Key, Phase, Restore, slot_of

from .node_bench import Bench, running


def test_the_first_world_has_all_slots() -> None:
    """One node alone forms a world at once and starts its workers."""
    bench = Bench(slots=2)
    assert bench.record.members == ("n/0.0", "n/1.0")
    assert [e.member for e in bench.taken(ev.Spawn)] == ["n/0.0", "n/1.0"]


def test_a_loss_shrinks_after_coalescing() -> None:
    """Two deaths within 20 ms are one change; survivors keep their order."""
    bench = running()
    bench.feed(ev.WorkerExited("n/1.0", -9))
    assert bench.record.generation == 1
    bench.run_for(0.01)
    bench.feed(ev.WorkerExited("n/3.0", -9))
    bench.run_for(0.02)
    assert bench.record.generation == 2
    assert bench.record.members == ("n/0.0", "n/2.0")
    assert bench.record.boundary is None
    assert "rank" in bench.record.reason


def test_replacements_start_when_the_survivors_run() -> None:
    """Not before the new generation has formed, and not at once: importing torch takes processor time."""
    bench = running()
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(5)
    assert bench.taken(ev.Spawn) == []
    bench.enter()
    bench.run_for(m.RESPAWN_AFTER)
    assert [e.member for e in bench.taken(ev.Spawn)] == ["n/1.1"]


def lose_and_replace(bench: Bench) -> None:
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(1)
    bench.enter()
    bench.run_for(m.RESPAWN_AFTER)
    bench.feed(ev.Progress(2, 40))
    bench.say("n/1.1", Hello(member="n/1.1"))
    bench.run_for(0.1)


def test_growth_waits_for_promises_and_happens_at_a_boundary() -> None:
    """Nobody is interrupted: the members promise a boundary ahead of all progress, then the record names the world."""
    bench = running()
    lose_and_replace(bench)
    planned = bench.record.planned
    assert planned is not None
    assert planned.boundary > 40
    assert bench.record.generation == 2
    for member in bench.record.members:
        bench.say(member, Promise(number=planned.number, accepted=True))
    assert bench.record.generation == 3
    assert bench.record.boundary == planned.boundary
    assert bench.record.members == ("n/0.0", "n/1.1", "n/2.0", "n/3.0"), "the newcomer gets its slot's rank back"


def test_a_declined_boundary_is_tried_again_further_ahead() -> None:
    """Fast steps: the margin doubles until everybody can promise."""
    bench = running()
    lose_and_replace(bench)
    first = bench.record.planned
    assert first is not None
    bench.say("n/0.0", Promise(number=first.number, accepted=False))
    assert bench.record.planned is None
    bench.run_for(1)
    second = bench.record.planned
    assert second is not None
    assert second.boundary - 40 == 2 * (first.boundary - 40)


def test_a_promise_that_does_not_come_is_not_waited_for() -> None:
    """A planned change expires; training goes on in the old world."""
    bench = running()
    lose_and_replace(bench)
    number = bench.record.planned.number
    boundary = bench.record.planned.boundary
    bench.run_for(2.1)
    assert bench.record.planned is None or bench.record.planned.number > number
    assert bench.record.generation == 2
    bench.run_for(60)
    assert bench.record.planned is None or bench.record.planned.boundary == boundary, "it was not too close"


def test_a_loss_during_a_planned_change_goes_first() -> None:
    """The plan is dropped, the survivors regroup at once, and the idle newcomer joins in the same transition."""
    bench = running()
    lose_and_replace(bench)
    bench.feed(ev.WorkerExited("n/0.0", -9))
    bench.run_for(0.05)
    assert bench.record.generation == 3
    assert bench.record.planned is None
    assert bench.record.members == ("n/1.1", "n/2.0", "n/3.0")


def test_a_loss_between_agreement_and_boundary_aborts_the_boundary() -> None:
    """A newer generation without boundary replaces the one that was to begin at it."""
    bench = running()
    lose_and_replace(bench)
    for member in bench.record.members:
        bench.say(member, Promise(number=bench.record.planned.number, accepted=True))
    bench.feed(ev.WorkerExited("n/3.0", -9))
    bench.run_for(0.05)
    assert bench.record.generation == 4
    assert bench.record.boundary is None
    assert "n/3.0" not in bench.record.members


def test_nobody_plans_a_change_while_ranks_are_done() -> None:
    """The end of a job is not disturbed by joiners."""
    bench = running()
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(1)
    bench.enter()
    bench.run_for(m.RESPAWN_AFTER)
    bench.say("n/0.0", Done(generation=2))
    bench.say("n/1.1", Hello(member="n/1.1"))
    bench.run_for(10)
    assert bench.record.generation == 2
    assert bench.record.planned is None


def test_a_script_without_boundaries_grows_at_once_after_a_while() -> None:
    """No steps(): the change costs the running step, but it comes; not where there is no state to resume."""
    bench = running()
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(1)
    for member in bench.record.members:
        bench.say(member, Acknowledge(generation=2, at=bench.now))
        bench.say(member, Stage(generation=2, stage="formed", at=bench.now))
    bench.run_for(m.RESPAWN_AFTER)
    bench.say("n/1.1", Hello(member="n/1.1"))
    bench.run_for(30)
    assert bench.record.generation == 2
    bench.say("n/0.0", Resumed(generation=2, lineage=2, source=(1, 5), text=""))
    bench.run_for(10)
    assert bench.record.generation == 3
    assert bench.record.boundary is None


def test_the_job_finishes_when_all_are_done() -> None:
    """Finished is agreed; workers then end by themselves and their success is the job's."""
    bench = running(slots=2)
    bench.say("n/0.0", Done(generation=1))
    assert bench.record.phase is Phase.RUNNING
    bench.say("n/1.0", Done(generation=1))
    assert bench.record.phase is Phase.FINISHED
    bench.feed(ev.WorkerExited("n/0.0", 0))
    assert bench.taken(ev.End) == []
    bench.feed(ev.WorkerExited("n/1.0", 0))
    assert [e.code for e in bench.taken(ev.End)] == [ExitCode.SUCCESS]


def test_a_rank_that_is_done_is_called_back_by_a_loss() -> None:
    """The others had not finished: everybody who is left forms the next generation."""
    bench = running(slots=3)
    bench.say("n/0.0", Done(generation=1))
    bench.feed(ev.WorkerExited("n/2.0", -9))
    bench.run_for(0.1)
    assert bench.record.generation == 2
    assert bench.record.members == ("n/0.0", "n/1.0")
    bench.enter()
    bench.say("n/0.0", Done(generation=2))
    bench.say("n/1.0", Done(generation=2))
    assert bench.record.phase is Phase.FINISHED


def test_standbys_are_stopped_at_the_end() -> None:
    """Who is not a member when the job finishes is ended."""
    bench = running()
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(1)
    bench.enter()
    bench.run_for(m.RESPAWN_AFTER)
    for member in bench.record.members:
        bench.say(member, Done(generation=2))
    assert [e.member for e in bench.taken(ev.Stop)] == ["n/1.1"]


def test_a_users_error_fails_the_job() -> None:
    """Nobody restarts anything; the error and the culprit are in the record."""
    bench = running()
    bench.say("n/2.0", UserFailed(generation=1, text="ValueError: x"))
    assert bench.record.phase is Phase.FAILED
    assert (bench.record.error, bench.record.culprit) == ("ValueError: x", "n/2.0")
    for slot in range(4):
        bench.feed(ev.WorkerExited(f"n/{slot}.0", 1))
    (end,) = bench.taken(ev.End)
    assert (end.code, end.text) == (ExitCode.USER_ERROR, "ValueError: x")


def test_workers_that_do_not_end_after_a_failure_are_stopped() -> None:
    """Ranks stuck in user code do not keep a failed job alive."""
    bench = running(slots=2)
    bench.say("n/0.0", UserFailed(generation=1, text="boom"))
    bench.feed(ev.WorkerExited("n/0.0", 1))
    bench.run_for(m.GRACE + 1)
    assert [e.member for e in bench.taken(ev.Stop)] == ["n/1.0"]


def test_crashing_again_at_the_same_step_fails_the_job() -> None:
    """Crashes that set the job back to the same step each time, however far it got between, are no progress."""
    bench = running(slots=2)
    bench.say("n/0.0", Resumed(generation=1, lineage=1, source=None, text=""))
    for incarnation in range(4):
        bench.feed(ev.Progress(bench.record.generation, 17))
        bench.feed(ev.WorkerExited(f"n/1.{incarnation}", -6))
        bench.run_for(0.1)
        if bench.record.phase is Phase.FAILED:
            break
        bench.enter()
        resume(bench, 10)
        bench.run_for(m.RESPAWN_AFTER)
        newcomer = f"n/1.{incarnation + 1}"
        bench.feed(ev.Progress(bench.record.generation, 11))
        bench.say(newcomer, Hello(member=newcomer))
        bench.run_for(0.1)
        for member in bench.record.members:
            bench.say(member, Promise(number=bench.record.planned.number, accepted=True))
        bench.enter()
        resume(bench, 10)
    assert bench.record.phase is Phase.FAILED
    assert "3 losses in a row set the job back to step 10" in bench.record.error
    for worker in list(bench.state.info.workers):
        bench.feed(ev.WorkerExited(worker.member, 1))
    assert [e.code for e in bench.taken(ev.End)] == [ExitCode.NO_PROGRESS]


def resume(bench: Bench, step: int) -> None:
    """Rank 0 says which step the generation resumed."""
    generation = bench.record.generation
    source = (generation - 1, step)
    bench.say(bench.record.members[0], Resumed(generation=generation, lineage=generation, source=source, text=""))


def test_kills_with_progress_between_never_fail_the_job() -> None:
    """Losing ranks is what the job is made for, as long as steps are finished between."""
    bench = running(slots=2)
    for incarnation in range(12):
        bench.feed(ev.Progress(bench.record.generation, 10 * incarnation))
        bench.feed(ev.WorkerExited(f"n/1.{incarnation}", -9))
        bench.run_for(0.1)
        bench.enter()
        bench.run_for(m.RESPAWN_AFTER)
        newcomer = f"n/1.{incarnation + 1}"
        bench.feed(ev.Progress(bench.record.generation, 10 * incarnation + 1))
        bench.say(newcomer, Hello(member=newcomer))
        bench.run_for(0.1)
        for member in bench.record.members:
            bench.say(member, Promise(number=bench.record.planned.number, accepted=True))
        bench.enter()
        resume(bench, 10 * incarnation + 2)
    assert bench.record.phase is Phase.RUNNING
    assert bench.record.members == ("n/0.0", "n/1.12")


def test_all_killed_at_once_waits_for_replacements() -> None:
    """With nobody left there is nobody to disturb: replacements start at once and the first one goes on."""
    bench = running(slots=2)
    bench.feed(ev.WorkerExited("n/0.0", -9))
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(1)
    assert bench.record.generation == 1
    assert {e.member for e in bench.taken(ev.Spawn)} == {"n/0.1", "n/1.1"}
    bench.say("n/1.1", Hello(member="n/1.1"))
    bench.run_for(0.1)
    assert bench.record.members == ("n/1.1",)


def test_a_late_member_is_left_out_alive_and_returns() -> None:
    """Nobody is waited for whose main thread does not come free; it is not killed, and joins again when it does."""
    bench = running(slots=3)
    bench.feed(ev.WorkerExited("n/2.0", -9))
    bench.run_for(0.1)
    bench.say("n/0.0", Acknowledge(generation=2, at=bench.now))
    bench.run_for(10.1)
    assert bench.record.generation == 3
    assert bench.record.members == ("n/0.0",)
    assert bench.taken(ev.Stop) == []
    bench.enter()
    bench.feed(ev.Progress(3, 5))
    bench.say("n/1.0", Hello(member="n/1.0"))
    bench.run_for(0.1)
    assert bench.record.planned is not None
    assert "n/1.0" in bench.record.planned.members


def test_who_is_still_starting_is_waited_for() -> None:
    """A worker that has not entered its function yet is not late: importing takes as long as it takes."""
    bench = Bench(slots=2)
    bench.say("n/0.0", Hello(member="n/0.0"))
    bench.say("n/0.0", Acknowledge(generation=1, at=bench.now))
    bench.run_for(300)
    assert bench.record.generation == 1


def test_a_slot_whose_replacements_never_get_warm_is_given_up() -> None:
    """Three replacements that die before they are warm: the job goes on without the slot."""
    bench = running(slots=2)
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(0.1)
    bench.enter()
    for incarnation in range(1, 4):
        bench.run_for(2)
        assert [e.member for e in bench.taken(ev.Spawn)] == [f"n/1.{incarnation}"]
        bench.feed(ev.WorkerExited(f"n/1.{incarnation}", 1))
    bench.run_for(10)
    assert bench.taken(ev.Spawn) == []
    assert bench.record.phase is Phase.RUNNING
    assert [e.text for e in bench.taken(ev.Say)] == ["slot 1 is given up: 3 replacements in a row died while starting"]


def test_when_every_slot_is_given_up_the_job_ends() -> None:
    """Nobody runs and nobody can be started: an error that says so instead of waiting for ever."""
    bench = running(slots=2)
    for slot in (0, 1):
        bench.feed(ev.WorkerExited(f"n/{slot}.0", -9))
    bench.run_for(0.1)
    for incarnation in range(1, 4):
        for slot in (0, 1):
            bench.feed(ev.WorkerExited(f"n/{slot}.{incarnation}", 3))
        bench.run_for(2)
    (end,) = bench.taken(ev.End)
    assert end.code is ExitCode.USER_ERROR
    assert "none can be started any more; the last one exited with code 3" in end.text


def test_a_kill_after_the_agreed_end_changes_nothing() -> None:
    """The training has finished; only what a process does wrong by itself still counts."""
    for code, expected in ((-9, ExitCode.SUCCESS), (5, ExitCode.USER_ERROR)):
        bench = running(slots=2)
        for member in bench.record.members:
            bench.say(member, Done(generation=1))
        assert bench.record.phase is Phase.FINISHED
        bench.feed(ev.WorkerExited("n/1.0", code))
        bench.feed(ev.WorkerExited("n/0.0", 0))
        assert [e.code for e in bench.taken(ev.End)] == [expected]


def test_a_mesh_of_a_fixed_size_takes_no_more() -> None:
    """Of four ranks two train, the others stand by and one of them replaces a lost one at once."""
    bench = Bench(slots=4)
    for member in bench.record.members:
        bench.say(member, Hello(member=member, multiple=2, most=2))
    assert bench.record.members == ("n/0.0", "n/1.0")
    bench.say("n/2.0", Hello(member="n/2.0", multiple=2, most=2))
    bench.enter()
    bench.feed(ev.WorkerExited("n/0.0", -9))
    bench.run_for(0.1)
    assert bench.record.members == ("n/1.0", "n/2.0")


def test_restores_are_logged_once() -> None:
    """Rank 0's report goes into the record; a repeated or late one does not."""
    bench = running(slots=2)
    bench.say("n/0.0", Resumed(generation=1, lineage=4, source=(3, 9), text=""))
    assert bench.record.restores == (Restore(generation=1, lineage=4, source=Key(3, 9)),)
    bench.say("n/0.0", Resumed(generation=1, lineage=5, source=None, text=""))
    assert len(bench.record.restores) == 1


def test_scripts_that_are_not_elastic_restart_as_a_group() -> None:
    """torchrun's semantics: one failure stops and restarts everybody, --max-restarts times."""
    bench = Bench(slots=2, limits=Limits(max_restarts=1))
    bench.taken(ev.Spawn)
    bench.feed(ev.WorkerExited("n/1.0", 1))
    bench.run_for(0.1)
    assert bench.record.restarts == 1
    assert bench.record.members == ("n/0.1", "n/1.1")
    assert [e.member for e in bench.taken(ev.Stop)] == ["n/0.0"]
    assert bench.taken(ev.Spawn) == [], "the old process may still hold its device"
    bench.feed(ev.WorkerExited("n/0.0", -15))
    assert [e.member for e in bench.taken(ev.Spawn)] == ["n/0.1", "n/1.1"]
    bench.feed(ev.WorkerExited("n/0.1", 3))
    bench.run_for(0.1)
    assert bench.record.phase is Phase.FAILED
    assert "exited with code 3" in bench.record.error


def test_a_script_that_is_not_elastic_succeeds_when_all_do() -> None:
    """Exit code 0 of every worker is the end."""
    bench = Bench(slots=2)
    bench.feed(ev.WorkerExited("n/0.0", 0))
    bench.run_for(100)
    assert bench.record.phase is Phase.RUNNING
    bench.feed(ev.WorkerExited("n/1.0", 0))
    assert [e.code for e in bench.taken(ev.End)] == [ExitCode.SUCCESS]


def test_an_error_at_startup_of_an_elastic_script_fails_the_job() -> None:
    """A worker that ends itself before it entered train() has a broken script: no replacement helps."""
    bench = Bench(slots=2)
    bench.say("n/0.0", Hello(member="n/0.0"))
    bench.feed(ev.WorkerExited("n/1.0", 1))
    bench.run_for(0.1)
    assert bench.record.phase is Phase.FAILED


def test_being_asked_to_stop_ends_the_job() -> None:
    """SIGTERM to the agent: agreed as a failure, reported as an interruption."""
    bench = running(slots=1)
    bench.feed(ev.StopAsked("the agent got SIGTERM"))
    assert bench.record.phase is Phase.FAILED
    bench.feed(ev.WorkerExited("n/0.0", 1))
    assert [e.code for e in bench.taken(ev.End)] == [ExitCode.INTERRUPTED]


def test_slots_of_members_are_their_devices() -> None:
    """A replacement takes the slot of the process it replaces."""
    bench = running()
    lose_and_replace(bench)
    assert sorted(map(slot_of, bench.record.planned.members)) == [0, 1, 2, 3]


def test_ranks_that_do_not_fit_the_mesh_stand_by() -> None:
    """A mesh with a fixed dimension of 2: of five ranks four train, and a loss takes the standby in at once."""
    bench = Bench(slots=5)
    for member in bench.record.members:
        bench.say(member, Hello(member=member, multiple=2))
    assert bench.record.generation == 2
    assert bench.record.members == ("n/0.0", "n/1.0", "n/2.0", "n/3.0")
    bench.say("n/4.0", Hello(member="n/4.0", multiple=2))
    bench.enter()
    bench.run_for(30)
    assert bench.record.generation == 2, "the standby alone makes no other mesh possible"
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(0.1)
    assert bench.record.members == ("n/0.0", "n/2.0", "n/3.0", "n/4.0")


def test_too_few_for_the_mesh_wait_for_replacements() -> None:
    """A mesh of exactly two: the survivor lets go of its world, a replacement starts at once, both begin again."""
    bench = Bench(slots=2)
    for member in bench.record.members:
        bench.say(member, Hello(member=member, multiple=2))
    bench.enter()
    bench.taken(ev.Spawn)
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(0.1)
    assert (bench.record.generation, bench.record.members) == (2, ())
    assert bench.record.phase is Phase.RUNNING
    assert [e.member for e in bench.taken(ev.Spawn)] == ["n/1.1"]
    bench.say("n/0.0", Hello(member="n/0.0", multiple=2))
    bench.run_for(1)
    assert bench.record.generation == 2
    bench.say("n/1.1", Hello(member="n/1.1", multiple=2))
    bench.run_for(0.1)
    assert bench.record.members == ("n/0.0", "n/1.1")


def test_a_process_that_cannot_be_started_ends_the_job() -> None:
    """Nothing waits for a process that never was, and nobody is told that trying again may help."""
    bench = Bench(slots=1)
    bench.feed(ev.StopAsked("cannot start python", ExitCode.USER_ERROR))
    bench.feed(ev.WorkerExited("n/0.0", 1))
    assert bench.taken(ev.End) == [ev.End(ExitCode.USER_ERROR, "cannot start python")]


def test_a_late_report_of_a_restore_is_still_logged() -> None:
    """Its generation is over, but its images exist and must stay in the ancestry."""
    bench = running(slots=2)
    bench.feed(ev.WorkerExited("n/1.0", -9))
    bench.run_for(0.1)
    bench.say("n/0.0", Resumed(generation=1, lineage=1, source=None, text=""))
    bench.say("n/0.0", Resumed(generation=2, lineage=2, source=(1, 5), text=""))
    assert [restore.generation for restore in bench.record.restores] == [1, 2]
    bench.say("n/0.0", Resumed(generation=1, lineage=9, source=None, text=""))
    assert len(bench.record.restores) == 2


def test_kills_after_a_restore_to_an_older_state_count_its_progress() -> None:
    """Progress is counted from the step that the generation before had resumed, not from the furthest ever."""
    bench = running(slots=5)
    bench.feed(ev.Progress(1, 100))
    for lost, resumed, stalls in ((3, 90, 1), (2, 50, 1), (1, 60, 2)):
        bench.feed(ev.WorkerExited(f"n/{lost}.0", -9))
        bench.run_for(0.1)
        assert bench.record.stalls == stalls
        bench.enter()
        resume(bench, resumed)
    bench.feed(ev.WorkerExited("n/0.0", -9))
    bench.run_for(0.1)
    assert (bench.record.best_step, bench.record.stalled_at, bench.record.stalls) == (100, 60, 1)


def test_a_long_error_is_told_short() -> None:
    """What all nodes read stays small enough for every store; how it begins says what it is."""
    bench = Bench()
    bench.start()
    bench.say("n/0.0", UserFailed(generation=1, text="rank 0: RuntimeError: " + "x" * 10_000_000))
    assert bench.record.phase is Phase.FAILED
    assert bench.record.error.startswith("rank 0: RuntimeError: xxx")
    assert len(bench.record.error) < 5000
