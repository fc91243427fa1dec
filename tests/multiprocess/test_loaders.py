"""Loaders with worker processes in real jobs: a kill -9 loses no sample, doubles none, and leaves no process behind."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
import records

from resilient_train.testing.job import Job

SCRIPT = Path(__file__).parent / "scripts" / "load.py"
pytestmark = pytest.mark.timeout(300)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def killed_and_replaced(tmp_path: Path, data: str, steps: int, loaders: int) -> Job:
    """A job of three ranks that loses one, trains with two, and takes in a replacement, every rank with as many
    worker processes as it should have at each time; it has finished well, and nothing of it is left."""
    arguments = ["--record", str(tmp_path / "record"), "--data", data, "--steps", str(steps)]
    with Job(SCRIPT, arguments, flags=["--nproc-per-node=3"], log_dir=tmp_path / "logs") as running:
        running.wait_for_line("step 8 size 3", 90)
        victim = running.workers()["n0/1.0"]
        started = {pid: children(pid) for pid in running.workers().values()}
        assert {len(found) for found in started.values()} == {loaders}
        running.kill(1)
        running.wait_for_line("size 2 generation 2", 40)
        old = [one for found in started.values() for one in found]
        running.wait_for(lambda: not any(map(alive, [victim, *old])), 20, "the end of the first world's loaders")
        running.wait_for_line("size 3 generation 3", 90)
        # Two worlds later nobody has more processes than at first.
        running.wait_for(
            lambda: {len(children(pid)) for pid in running.workers().values()} == {loaders}, 30, "as many loaders again"
        )
        (tmp_path / "record" / "hurry").touch()
        assert running.finish(150) == 0, running.output
        assert running.leftovers() == []
        return running


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_data_loader_over_an_elastic_sampler(tmp_path: Path) -> None:
    """Two worker processes a rank that load eight batches ahead: every sample of every global batch is used once."""
    job = killed_and_replaced(tmp_path, "sampler", 250, loaders=2)
    records.check_every_batch_once(tmp_path / "record", job.events(), 250)


def test_stream_of_stateful_data_loaders(tmp_path: Path) -> None:
    """Six shards, each with a loader and its worker process, over three, two and three ranks: in the history that led to
    the final state every shard gave every sample of every epoch once and in order."""
    steps = 250
    job = killed_and_replaced(tmp_path, "stream", steps, loaders=2)
    history = records.surviving(records.read(tmp_path / "record"), records.restores(job.events()))
    assert sorted(history) == list(range(steps))
    used: dict[int, list[int]] = defaultdict(list)
    for step in range(steps):
        ranks = history[step]
        assert len(ranks) == ranks[0]["size"], "a finished step is one that all ranks wrote down"
        for number in (number for rank in ranks for number in rank["used"]):
            used[number // 1000 % 100].append(number)
    for shard in range(6):
        samples = 4 * steps
        assert used[shard] == [100000 * (i // 40) + 1000 * shard + i % 40 for i in range(samples)]
