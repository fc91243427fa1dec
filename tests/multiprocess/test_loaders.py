"""Loaders with worker processes in a real job: a kill -9 loses no sample, doubles none, and leaves no process."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
import records

from resilient_train.testing.job import Job

SCRIPT = Path(__file__).parent / "scripts" / "load.py"
STEPS = 200
LOADERS = 4
"""Worker processes of each of three ranks: two of a DataLoader, and one for each of two shards."""


def children(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def check_shards(history: dict[int, list[dict]]) -> None:
    """Every shard gave every sample of every epoch once and in order."""
    streamed: dict[int, list[int]] = defaultdict(list)
    for step in range(STEPS):
        assert len(history[step]) == history[step][0]["size"], "a finished step is one that all ranks wrote down"
        for number in (number for rank in history[step] for number in rank["streamed"]):
            streamed[number // 1000 % 100].append(number)
    for shard in range(6):
        assert streamed[shard] == [100000 * (i // 40) + 1000 * shard + i % 40 for i in range(4 * STEPS)]


@pytest.mark.soak
@pytest.mark.timeout(450)
def test_a_rank_is_killed_while_its_loaders_and_the_others_load_ahead(tmp_path: Path) -> None:
    """Three ranks, two, three again: every sample of every global batch is used once, so is every sample of every
    shard of a stream of StatefulDataLoaders; the loaders of a world end with it."""
    arguments = ["--record", str(tmp_path / "record"), "--steps", str(STEPS)]
    with Job(SCRIPT, arguments, flags=["--nproc-per-node=3"], log_dir=tmp_path / "logs") as running:
        running.wait_for_line("step 8 size 3", 120)
        before = [one for pid in running.workers().values() for one in children(pid)]
        assert len(before) == 3 * LOADERS
        running.kill(1)
        running.wait_for_line("size 2 generation 2", 40)
        running.wait_for(lambda: not any(map(alive, before)), 20, "the end of the first world's loaders")
        running.wait_for_line("size 3 generation 3", 120)
        counts = lambda: [len(children(pid)) for pid in running.workers().values()]  # noqa: E731
        running.wait_for(lambda: counts() == [LOADERS] * 3, 30, "as many loaders as at first")
        (tmp_path / "record" / "hurry").touch()
        assert running.finish(150) == 0, running.output
        assert running.leftovers() == []
        events = running.events()
    records.check_every_batch_once(tmp_path / "record", events, STEPS)
    check_shards(records.surviving(records.read(tmp_path / "record"), records.restores(events)))


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
