"""A job of several nodes, without its agents and its training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from nodes import Cluster

from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.keeper.persist import Job
from resilient_train.keeper.progress import Progress
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes nodes with so many workers each."""
    made: list[Cluster] = []

    def make(*workers: int) -> Cluster:
        made.append(Cluster(*workers))
        return made[-1]

    yield make
    for one in made:
        one.close()


KEY = Key(1, 7)


@pytest.fixture
def make() -> Iterator[Callable[..., Job]]:
    """Makes the job of a keeper that has the images of some ranks, of a state at step 7; each node has two ranks."""
    slots: list[Slot] = []

    def image(rank: int, world: int, key: Key, alike: bool) -> Slot:
        entry = Entry(name="t", dtype="F32", shape=(4, 5), global_shape=(4 * world, 5), offset=(4 * rank, 0))
        if alike:
            entry = Entry(name="t", dtype="F32", shape=(4, 5), global_shape=(4, 5), offset=(0, 0))
        layout = plan_image([entry], 10)
        fd = create_memory("test", layout.total)
        slots.append(Slot(fd))
        os.close(fd)
        parts = [Part(entry=entry, sources=(torch.full((4, 5), 1.0 if alike else float(rank)),))]
        writer = ImageWriter(layout, parts, rank, world)
        assert writer.begin(slots[-1], key, parts, b"{}")
        assert writer.conclude() == []
        return slots[-1]

    def job(
        ranks: list[int], world: int = 2, key: Key = KEY, keep_last: int = 3, alike: bool = False, url: str = ""
    ) -> Job:
        return Job(
            key=key,
            world=world,
            images={rank: image(rank, world, key, alike) for rank in ranks},
            origins={rank: f"node-{rank // 2}" for rank in ranks},
            past={1: None},
            url=url,
            keep_last=keep_last,
            progress=Progress(key, 0),
        )

    yield job
    for slot in slots:
        slot.close()
