"""A job of several nodes, each an ``rtrun`` on this machine: what becomes of it when nodes come, leave and die."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from records import check_every_batch_once

from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
START = 200
"""Seconds in which nodes start and step together, on a machine that does ten other things."""
SLOWLY = ("--step-time", "0.3")
"""Steps are left when a node has started anew, until `hurry`."""
pytestmark = pytest.mark.timeout(450)


def nodes(tmp_path: Path, *args: str, count: int, flags: tuple[str, ...] = ()) -> Nodes:
    """Two ranks a node; their state is in memory only."""
    common = ["--nproc-per-node=2", "--rdzv-conf=last_call_timeout=150"]
    script = ["--record", str(tmp_path / "record"), *args]
    return Nodes(SCRIPT, script, count=count, flags=[*common, *flags], folder=tmp_path / "logs")


def hurry(tmp_path: Path) -> None:
    """No step waits any more."""
    (tmp_path / "record" / "hurry").touch()


def check_nothing_left(running: Nodes) -> None:
    for job in running.jobs:
        assert job.leftovers() == []


def test_a_killed_node_is_out_and_another_takes_its_place(tmp_path: Path) -> None:
    """3 nodes, one SIGKILLed with its workers and keeper; a fourth joins at a boundary; every batch used once."""
    with nodes(tmp_path, "--steps", "200", *SLOWLY, count=3, flags=("--nnodes=1:3",)) as running:
        first = running.jobs[0]
        first.wait_for_line("step 10 size 6", START)
        running.kill(2)
        first.wait_for_line("size 4", 60)
        assert "its agent is gone" in first.output
        running.start()
        first.wait_for_line("joined by 2 workers; 6 ranks", START)
        hurry(tmp_path)
        assert running.finish(120) == [0, 0, 0], running.output
        check_every_batch_once(tmp_path / "record", running.events(), 200)
        check_nothing_left(running)


def test_without_the_node_that_serves_the_record_the_job_ends_and_says_why(tmp_path: Path) -> None:
    """The embedded store dies with its node: the others end with exit code 67 and name etcd."""
    with nodes(tmp_path, "--steps", "100000", count=2, flags=("--nnodes=1:2",)) as running:
        running.jobs[0].wait_for_line("step 5 size 4", START)
        running.kill(0)
        # However slow the machine is: each call to the store, and the silence that makes it lost, is bounded.
        assert running.finish(150) == [67], running.output
        assert "--rdzv-backend=etcd" in running.jobs[1].output
        check_nothing_left(running)


def test_when_the_store_has_left_with_its_node_nobody_is_left_hanging(tmp_path: Path) -> None:
    """SIGTERM to the node that serves the record, then to another: it ends with 130, and the last one with 67."""
    flags = ("--nnodes=1:3", "--detect-within=2")
    with nodes(tmp_path, "--steps", "100000", "--step-time", "0.05", count=3, flags=flags) as running:
        first, second, third = running.jobs
        first.wait_for_line("step 5 size 6", START)
        first.signal(signal.SIGTERM)
        assert first.finish(60) == 0, running.output
        second.wait_for_line("training goes on until the world has to change", 60)
        # Rank 0 is on either.
        second.wait_for(lambda: (second.output + third.output).count("size 4") >= 20, 60, "20 steps")
        second.signal(signal.SIGTERM)
        assert second.finish(60) == 130, running.output
        assert third.finish(60) == 67, running.output
        assert "--rdzv-backend=etcd" in third.output
        check_nothing_left(running)


def test_a_node_that_was_started_unlike_the_others_takes_no_part(tmp_path: Path) -> None:
    """It ends with 2 and names both commands' flags; the job does not notice."""
    with nodes(tmp_path, "--steps", "60", *SLOWLY, count=2, flags=("--nnodes=1:2",)) as running:
        running.jobs[0].wait_for_line("step 2 size 4", START)
        other = running.start("--detect-within=2")
        assert other.finish(60) == 2, running.output
        assert "--nnodes=1:2 --detect-within=2" in other.output
        assert "--detect-within=5" in other.output
        hurry(tmp_path)
        assert running.finish(60) == [0, 0, 2], running.output
        assert "generation 2" not in running.jobs[0].output
        check_nothing_left(running)


def test_a_node_that_is_told_to_end_leaves_at_a_boundary(tmp_path: Path) -> None:
    """SIGTERM to one agent: its ranks leave together, no step is computed twice, its exit code is 0."""
    with nodes(tmp_path, "--steps", "120", "--step-time", "0.05", count=2, flags=("--nnodes=1:2",)) as running:
        running.jobs[0].wait_for_line("step 10 size 4", START)
        running.jobs[1].signal(signal.SIGTERM)
        assert running.jobs[1].finish(60) == 0, running.output
        assert "this node has left the job" in running.jobs[1].output
        assert running.finish(90) == [0, 0], running.output
        assert "leaves (its agent got SIGTERM); 2 ranks" in running.jobs[0].output
        check_every_batch_once(tmp_path / "record", running.events(), 120)
        steps = [line for _, line in running.jobs[0].lines if line.startswith("step ")]
        assert len(steps) == 120
        check_nothing_left(running)


@pytest.mark.soak
def test_a_standby_worker_takes_a_lost_ones_place_at_once(tmp_path: Path) -> None:
    """With --standby 1 the world that follows a loss is as large as the one before."""
    flags = ("--nnodes=1:2", "--standby=1")
    with nodes(tmp_path, "--steps", "150", *SLOWLY, count=2, flags=flags) as running:
        first, second = running.jobs
        first.wait_for_line("step 5 size 4", START)
        second.wait_for(lambda: len(second.workers()) == 3, 60, "the standby's start")
        second.wait_for(
            lambda: any(e.kind == "ready" and e.member == "n1/2.0" for e in second.events()),
            60,
            "the standby's readiness",
        )
        second.kill(1)
        first.wait_for_line("generation 2: lost rank 3", 60)
        hurry(tmp_path)
        assert running.finish(120) == [0, 0], running.output
        assert "generation 2: lost rank 3 (was ended by signal 9); 4 ranks" in first.output
        check_every_batch_once(tmp_path / "record", running.events(), 150)


@pytest.mark.soak
def test_a_silent_node_is_out_and_comes_back(tmp_path: Path) -> None:
    """An agent and its workers, stopped: out as --detect-within says; continued, they are taken in again."""
    flags = ("--nnodes=1:2", "--detect-within=2")
    with nodes(tmp_path, "--steps", "300", *SLOWLY, count=2, flags=flags) as running:
        first, second = running.jobs
        first.wait_for_line("step 10 size 4", START)
        pids = [second.pid, *second.workers().values()]
        for pid in pids:
            second.signal_process(pid, signal.SIGSTOP)
        first.wait_for_line("2 ranks", 60)
        assert "lost ranks 2, 3 (node n1: " in first.output
        first.wait_for_line("size 2", 60, count=10)
        for pid in pids:
            second.signal_process(pid, signal.SIGCONT)
        first.wait_for_line("joined by 2 workers; 4 ranks", 90)
        hurry(tmp_path)
        assert running.finish(120) == [0, 0], running.output
        assert second.pid in pids
        assert set(second.workers().values()) <= set(pids)
        check_every_batch_once(tmp_path / "record", running.events(), 300)
        check_nothing_left(running)


@pytest.mark.soak
def test_too_few_nodes_wait_and_go_on_when_another_comes(tmp_path: Path) -> None:
    """--nnodes=2:2: one of two lost, the other waits with its processes, and goes on with a new one."""
    with nodes(tmp_path, "--steps", "100", "--step-time", "0.05", count=2, flags=("--nnodes=2:2",)) as running:
        first = running.jobs[0]
        first.wait_for_line("step 10 size 4", START)
        pids = set(first.workers().values())
        running.kill(1)
        first.wait_for_line("too few are left, waiting for replacements", 60)
        running.start()
        first.wait_for_line("4 workers are ready again; 4 ranks", 90)
        assert set(first.workers().values()) == pids
        assert running.finish(120) == [0, 0], running.output
        check_every_batch_once(tmp_path / "record", running.events(), 100)


def test_too_few_nodes_for_too_long_is_an_error(tmp_path: Path) -> None:
    """--patience bounds the wait for MIN nodes: exit code 68, which says that starting again can help."""
    with nodes(tmp_path, count=1, flags=("--nnodes=2:2", "--patience=1")) as running:
        assert running.finish(60) == [68], running.output
        assert "2 nodes" in running.jobs[0].output
