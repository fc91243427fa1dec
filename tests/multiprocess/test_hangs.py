"""Real jobs with a rank that hangs: the right one goes, with its stacks in the log, and nobody else."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import records

from resilient_train.spec.world import slot_of
from resilient_train.testing.job import Job
from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
DETECT_WITHIN = 2.0
STEPS = 60
pytestmark = pytest.mark.timeout(300)


def job(tmp_path: Path, *args: str) -> Job:
    return Job(
        SCRIPT,
        ["--record", str(tmp_path / "record"), "--steps", str(STEPS), "--step-time", "0.05", *args],
        flags=["--nproc-per-node=3", f"--detect-within={DETECT_WITHIN:g}"],
        log_dir=tmp_path / "logs",
    )


def hung_at(tmp_path: Path) -> float:
    """When the hang began, as the rank wrote it down."""
    return next(r["at"] for r in records.read(tmp_path / "record") if "hang" in r)


def check_only_rank_1_was_lost(tmp_path: Path, running: Job, began: float, before: dict[str, int], why: str) -> None:
    """Its stacks are in the log, the others keep their processes, and every step of the result was computed."""
    running.wait_for_line("size 2 generation 2", 60)
    after = running.workers()
    (lost,) = [event for event in running.events() if event.kind == "lost"]
    print(f"hang to eviction: {lost.at - began:.2f} s; the bar is {DETECT_WITHIN + 2:g} s")
    assert lost.member == "n0/1.0"
    assert why in lost.text
    assert {m: p for m, p in after.items() if slot_of(m) != 1} == {m: p for m, p in before.items() if slot_of(m) != 1}
    assert running.finish(120) == 0, running.output
    assert "most recent call first" in running.output
    assert f"lost rank 1 (hung: rank 1 {why}" in running.output
    log = records.restores(running.events())
    assert sorted(records.surviving(records.read(tmp_path / "record"), log)) == list(range(STEPS))
    assert running.leftovers() == []


def test_a_stopped_worker(tmp_path: Path) -> None:
    """SIGSTOP: it wakes up to write its stacks down, and to nothing else."""
    with job(tmp_path) as running:
        running.wait_for_line("step 10 size 3", 90)
        before = running.workers()
        began = running.kill(1, number=signal.SIGSTOP)
        check_only_rank_1_was_lost(tmp_path, running, began, before, "has been stopped (SIGSTOP)")


@pytest.mark.parametrize(
    ("how", "why", "where"),
    [
        pytest.param("sleep", "has not entered operation", "time.sleep", marks=pytest.mark.soak),
        pytest.param("spin", "has not entered operation", "while True", marks=pytest.mark.soak),
        ("gil", "does not answer", "re.match"),
        pytest.param("overdue", "has not entered operation", "time.sleep(600)", marks=pytest.mark.soak),
    ],
)
def test_a_stuck_training_thread(tmp_path: Path, how: str, why: str, where: str) -> None:
    """It sleeps, computes for ever, holds Python's lock in native code, or is longer in an operation than announced."""
    with job(tmp_path, "--hang", how, "--hang-at", "10") as running:
        running.wait_for_line("step 5 size 3", 90)
        before = running.workers()
        running.wait_for_event("lost", 60)
        check_only_rank_1_was_lost(tmp_path, running, hung_at(tmp_path), before, why)
        lines = SCRIPT.read_text().splitlines()
        shown = [line for line in running.output.splitlines() if f"{SCRIPT}" in line and line.endswith("in hang")]
        assert any(where in lines[int(line.split("line ")[1].split()[0]) - 1] for line in shown) or how == "spin", shown


@pytest.mark.soak
def test_ranks_that_wait_for_each_other(tmp_path: Path) -> None:
    """A rank left a collective out: the stacks of all are in the log, and the same processes form again and go on."""
    with job(tmp_path, "--hang", "skip", "--hang-at", "10") as running:
        running.wait_for_line("step 5 size 3", 90)
        before = running.workers()
        running.wait_for_line("size 3 generation 2", 60)
        assert running.workers() == before
        (lost,) = [event for event in running.events() if event.kind == "lost"]
        print(f"hang to decision: {lost.at - hung_at(tmp_path):.2f} s; the bar is {DETECT_WITHIN + 2:g} s")
        assert running.finish(120) == 0, running.output
        assert "hung: all ranks wait in communication: rank 1 at train.py" in running.output
        assert sum("stacks of n0/" in line for _, line in running.lines) == 3
        assert running.leftovers() == []


@pytest.mark.soak
def test_ranks_that_wait_for_each_other_at_the_same_step_again_and_again(tmp_path: Path) -> None:
    """A mismatch that comes back ends the job, and says where."""
    with job(tmp_path, "--hang", "skip", "--hang-at", "10", "--hang-always") as running:
        assert running.finish(240) == 66, running.output
        assert "3 losses in a row set the job back to step 10; the last: hung: all ranks wait" in running.output
        assert running.leftovers() == []


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(("--hang", "announced", "--hang-at", "10", "--pause", "7"), id="announced"),
        pytest.param(("--slow-start", "9"), id="first step", marks=pytest.mark.soak),
    ],
)
@pytest.mark.soak
def test_what_is_slow_does_not_hang(tmp_path: Path, args: tuple[str, ...]) -> None:
    """An evaluation on one rank that was announced, and a first step that was not, both longer than the limit."""
    with job(tmp_path, *args) as running:
        assert running.finish(180) == 0, running.output
        assert "hung" not in running.output
        assert running.output.count("result 3") == 3
        assert running.leftovers() == []


@pytest.mark.soak
def test_a_rank_that_is_stuck_where_a_node_is_lost_is_ended_below_min(tmp_path: Path) -> None:
    """Nobody waits for it in a collective any more: it was left out, and its slot is needed."""
    hangs = tmp_path / "hangs"
    hangs.mkdir()
    args = ["--record", str(tmp_path / "record"), "--steps", "200", "--step-time", "0.05", "--hang-folder", str(hangs)]
    flags = ["--nnodes=2:3", "--nproc-per-node=1", f"--detect-within={DETECT_WITHIN:g}"]
    with Nodes(SCRIPT, args, count=3, flags=flags, folder=tmp_path / "logs") as running:
        first = running.jobs[0]
        first.wait_for_line("step 20 size 3", 90)
        (stuck,) = running.jobs[2].workers().values()
        (hangs / str(stuck)).write_text("spin")
        first.wait_for(lambda: any("hang" in row for row in records.read(tmp_path / "record")), 30, "the hang")
        running.kill(1)
        running.jobs[2].wait_for_line("has not come free for", 60)
        first.wait_for_line("size 2", 60)
        assert running.finish(120) == [0, 0], running.output
        assert "too few are left, waiting for replacements" in running.output
        assert "most recent call first" in running.jobs[2].output
