"""Copies on other nodes: all ranks' images of one state, and what happens to them when keepers and nodes die."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nodes import Cluster, rows_of

from resilient_train.spec.world import Key
from resilient_train.worker.sources import MemorySource

pytestmark = pytest.mark.timeout(180)
Make = Callable[..., Cluster]


def copied(cluster: Cluster, after: int = 0) -> bool:
    """Whether all nodes know of a newer state that survives the loss of one."""
    return all(key is not None and key.step > after for key in cluster.kept())


def check(source: MemorySource, key: Key, world: int, rows: int = 4) -> None:
    """What is restored is what was computed."""
    with source.open(key) as readers:
        assert [reader.stamp.rank for reader in readers] == list(range(world))
        for rank, reader in enumerate(readers):
            (entry,) = reader.entries()
            assert torch.equal(reader.tensor(entry), rows_of(rank, world, key.step, rows))


def test_every_state_that_is_kept_survives_the_loss_of_any_node(cluster: Make) -> None:
    """Three nodes of two ranks: after the loss of one, the other two hold every rank's image of one state."""
    job = cluster(2, 2, 2)
    job.introduce()
    job.start_workers()
    job.step_until(lambda: copied(job))
    job.nodes[1].kill()
    for survivor in (job.nodes[0], job.nodes[2]):
        source = MemorySource(survivor.workers[0].link)
        kept = survivor.workers[0].link.board.kept()
        keys = source.keys({})
        assert kept is not None
        assert keys[0] >= kept
        check(source, keys[0], 6)


def test_states_go_on_being_kept_and_no_snapshot_is_skipped(cluster: Make) -> None:
    """With the slots that there are; the nodes agree on each state."""
    job = cluster(1, 1)
    job.introduce()
    job.start_workers()
    done, seen = [], set()
    for step in range(1, 120):
        done += job.step(Key(1, step))
        seen |= {key for key in job.kept() if key}
    assert all(done)
    job.step_until(lambda: copied(job, 120), first=120)
    assert len(job.nodes[0].deposits) <= 1 + 5 + 2
