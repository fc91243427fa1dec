"""What several keepers decide together: which state is the last one, and who writes which of its images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nodes import Cluster, rows_of, wait_until

from resilient_train.spec.messages import Policy
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.images import open_image

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("group", [0, 3])
def test_the_last_state_of_all_nodes_becomes_durable(
    cluster: Callable[..., Cluster], tmp_path: Path, group: int
) -> None:
    """Of one that was lost too: its neighbour writes what it has kept for it, or makes it again from parities."""
    job = cluster(1, 1, 1)
    job.introduce()
    for worker in job.start_workers(group=group):
        worker.link.set_policy(Policy(url=str(tmp_path), every_steps=10**6, every_seconds=0.0, keep_last=3))
    job.step_until(lambda: all(job.kept()))
    job.nodes.pop(1).kill()
    for node in job.nodes:
        for worker in node.workers:
            worker.close()
        node.workers = []
        node.flush()
    for node in job.nodes:
        wait_until(lambda node=node: node.flushed is not None, "Flushed")
        assert node.flushed is not None
        assert node.flushed.text == "", job.report()
    tier = FilesystemTier(str(tmp_path))
    (key,), unfinished = listing(tier)
    assert unfinished == []
    manifest = read_manifest(tier, key)
    for rank, file in enumerate(manifest.files):
        reader = open_image(tier, manifest, file)
        assert torch.equal(reader.tensor(reader.entries()[0]), rows_of(rank, 3, key.step))
    assert len(manifest.files) == 3


@pytest.mark.soak
def test_a_node_that_fails_to_save_removes_nothing_of_the_others(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """And says so; what the other has written stays until a newer state is complete, and it says that it is not
    durable either, after a while."""
    job = cluster(1, 1)
    job.introduce()
    (tmp_path / "blocked").write_text("")
    for worker, place in zip(job.start_workers(), (tmp_path / "good", tmp_path / "blocked"), strict=True):
        worker.link.set_policy(Policy(url=str(place), every_steps=10**6, every_seconds=0.0, keep_last=3))
    job.step_until(lambda: all(job.kept()))
    for node in job.nodes:
        for worker in node.workers:
            worker.close()
        node.workers = []
        node.flush()
    for node in job.nodes:
        wait_until(lambda node=node: node.flushed is not None, "Flushed", 150.0)
        assert node.flushed is not None
        assert "could not be made durable" in node.flushed.text
    (folder,) = (tmp_path / "good").iterdir()
    assert any(name.startswith("rank-00000") for name in os.listdir(folder))
