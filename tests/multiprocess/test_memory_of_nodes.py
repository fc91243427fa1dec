"""Nodes lost with all they held: the others go on from memory, with nothing on any disk."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from records import check_every_batch_once, digests, read, restores

from resilient_train.plan.placement import place
from resilient_train.spec.topology import Topology
from resilient_train.spec.world import Key, node_of
from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
BEGIN = ("--nproc-per-node=2", "--rdzv-conf=last_call_timeout=90")
pytestmark = pytest.mark.timeout(300)


def nodes(tmp_path: Path, *args: str, count: int, flags: tuple[str, ...] = ()) -> Nodes:
    """Two ranks a node, and no URL; a slow node's start is waited for."""
    record = ["--record", str(tmp_path / "record")]
    return Nodes(SCRIPT, [*record, *args], count=count, flags=[*BEGIN, *flags], folder=tmp_path / "logs")


def check_restored(tmp_path: Path, running: Nodes) -> None:
    """What a later world restored equals, bit for bit, what the world before had computed."""
    found = digests(read(tmp_path / "record"))
    log = restores(running.events())
    computed = {
        Key(restore.lineage, step): digest
        for restore in log
        for when in ("restored", "finished")
        for step, digest in found.get(restore.generation, {}).get(when, {}).items()
    }
    later = [restore for restore in log if restore.generation > 1]
    assert later
    for restore in later:
        assert restore.source is not None
        restored = found[restore.generation]["restored"]
        assert restored == {restore.source.step: computed[restore.source]}, restore


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.soak)])
@pytest.mark.soak
def test_a_node_lost_with_its_keeper_is_restored_from_its_neighbours_memory(tmp_path: Path, parallel: str) -> None:
    """SIGKILL of agent, workers and keeper: the survivors resume a state that is a few steps old, bit for bit."""
    args = ("--steps", "120", "--step-time", "0.05", "--parallel", parallel)
    with nodes(tmp_path, *args, count=2, flags=("--nnodes=1:2",)) as running:
        first = running.jobs[0]
        first.wait_for_line("step 30 size 4", 90)
        running.kill(1)
        first.wait_for_line("size 2", 60)
        last = max(int(line.split()[1]) for _, line in first.lines if " size 4 " in line)
        assert running.finish(120) == [0], running.output
        restore = restores(running.events())[-1]
        assert restore.source is not None
        assert last - 12 <= restore.source.step <= last + 1, running.output
        check_restored(tmp_path, running)
        check_every_batch_once(tmp_path / "record", running.events(), 120)
        assert first.leftovers() == []


def test_two_nodes_lost_at_once_cost_at_most_one_step_with_two_copies(tmp_path: Path) -> None:
    """A node and the one that has its first copy: four nodes are two, go on from memory, and everybody's last step but
    one is there."""
    # A busy machine copies a state within a step all the same.
    args = ("--steps", "30", "--step-time", "1.0", "--replicas", "2")
    with nodes(tmp_path, *args, count=4, flags=("--nnodes=2:4", "--nproc-per-node=1")) as running:
        first = running.jobs[0]
        first.wait_for_line("step 8 size 4", 150)
        names = {node_of(member): index for index, job in enumerate(running.jobs) for member in job.workers()}
        copies = place(Topology(dict.fromkeys(names, ())), 1)
        doomed = next((one, copies[one][0]) for one in names if 0 not in (names[one], names[copies[one][0]]))
        last = max(int(line.split()[1]) for _, line in first.lines if " size 4 " in line)
        running.kill(*(names[node] for node in doomed))
        first.wait_for_line("size 2", 90)
        (tmp_path / "record" / "hurry").touch()
        assert running.finish(120) == [0, 0], running.output
        restore = restores(running.events())[-1]
        assert restore.source is not None
        # The line of step n is written when n + 1 steps are finished: their state was due only now.
        assert restore.source.step >= last, running.output
        check_restored(tmp_path, running)
        check_every_batch_once(tmp_path / "record", running.events(), 30)


@pytest.mark.soak
def test_a_node_is_made_again_from_parities(tmp_path: Path) -> None:
    """Three nodes without copies: what one held is folded into the others' parities; two go on from there."""
    args = ("--steps", "40", "--step-time", "0.5", "--redundancy", "xor:3")
    with nodes(tmp_path, *args, count=3, flags=("--nnodes=2:3", "--nproc-per-node=1")) as running:
        first = running.jobs[0]
        first.wait_for_line("step 14 size 3", 150)
        last = max(int(line.split()[1]) for _, line in first.lines if " size 3 " in line)
        running.kill(1)
        first.wait_for_line("size 2", 90)
        (tmp_path / "record" / "hurry").touch()
        assert running.finish(120) == [0, 0], running.output
        restore = restores(running.events())[-1]
        assert restore.source is not None
        assert restore.source.step >= last, running.output
        check_restored(tmp_path, running)
        check_every_batch_once(tmp_path / "record", running.events(), 40)


@pytest.mark.soak
def test_a_keeper_whose_agent_was_killed_serves_the_survivors(tmp_path: Path) -> None:
    """Only the agent dies, and its workers with it: not even the last finished step is lost."""
    with nodes(tmp_path, "--steps", "100", "--step-time", "0.05", count=2, flags=("--nnodes=1:2",)) as running:
        first = running.jobs[0]
        first.wait_for_line("step 20 size 4", 90)
        running.kill(1, keeper=False)
        first.wait_for_line("size 2", 60)
        last = max(int(line.split()[1]) for _, line in first.lines if " size 4 " in line)
        assert running.finish(120) == [0], running.output
        restore = restores(running.events())[-1]
        assert restore.source is not None
        assert restore.source.step >= last
        check_restored(tmp_path, running)
        assert running.jobs[1].leftovers(70.0) == []


@pytest.mark.soak
def test_a_node_that_leaves_is_needed_until_its_images_are_read(tmp_path: Path) -> None:
    """SIGTERM to one agent: the others restore the very boundary at which its ranks left, from its keeper."""
    with nodes(tmp_path, "--steps", "100", "--step-time", "0.05", count=2, flags=("--nnodes=1:2",)) as running:
        first, second = running.jobs
        first.wait_for_line("step 10 size 4", 90)
        second.signal(signal.SIGTERM)
        assert second.finish(60) == 0, running.output
        assert running.finish(90) == [0, 0], running.output
        check_restored(tmp_path, running)
        check_every_batch_once(tmp_path / "record", running.events(), 100)
        assert len([line for _, line in first.lines if line.startswith("step ")]) == 100
        assert second.leftovers() == []
