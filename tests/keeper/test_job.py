"""What several keepers decide together: which state is the last one, and who writes which of its images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import Cluster, rows_of, wait_until

from resilient_train.keeper.last import Last, last_state
from resilient_train.keeper.shelf import Listed, replica_owner
from resilient_train.keeper.survey import Finding
from resilient_train.spec.messages import Policy
from resilient_train.spec.shard import Stamp
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.storage.peer import HeldImage, HeldParity
from resilient_train.worker.images import open_image

pytestmark = pytest.mark.timeout(180)


class Images:
    """A shelf with these images."""

    def __init__(self, images: list[HeldImage]) -> None:
        self._images = images

    def images(self) -> list[Listed]:
        return [
            Listed(
                slot=i.slot,
                owner=replica_owner("x/0") if i.replica else "n/0.0",
                stamp=Stamp(key=i.key, rank=i.rank, world=i.world, json_length=0, crc=0),
                size=i.size,
            )
            for i in self._images
        ]

    def parities(self) -> list[HeldParity]:
        return []


def decide(held: dict[str, list[HeldImage]], own: str, chosen: Key | None = None) -> Last:
    others = {endpoint: images for endpoint, images in held.items() if endpoint != own}
    finding = Finding(images=others, chosen=dict.fromkeys(others, chosen))
    return last_state(Images(held[own]), finding, own)  # type: ignore[arg-type]


def image(slot: int, step: int, rank: int, *, replica: bool = False) -> HeldImage:
    return HeldImage(slot=slot, key=Key(1, step), rank=rank, world=3, size=1, replica=replica)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_all_nodes_that_see_the_same_write_every_image_of_one_state_once(data: st.DataObject) -> None:
    """Wherever its originals and copies are."""
    places = ["h:1", "h:2", "h:3"]
    held: dict[str, list[HeldImage]] = {place: [] for place in places}
    for slot in range(data.draw(st.integers(0, 14))):
        place = data.draw(st.sampled_from(places))
        one = image(slot, data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2)), replica=data.draw(st.booleans()))
        held[place].append(one)
    decisions = {place: decide(held, place) for place in places}
    keys = {last.key for last in decisions.values()}
    assert len(keys) == 1
    (key,) = keys
    written = [rank for last in decisions.values() for rank in last.images]
    assert sorted(written) == ([] if key is None else [0, 1, 2])
    for place, last in decisions.items():
        slots = {one.slot: one for one in held[place]}
        assert all(slots[slot].rank == rank and slots[slot].key == key for rank, slot in last.images.items())


def test_what_another_node_has_begun_to_save_is_the_last_state() -> None:
    """It may hold what is not to be seen any more."""
    held = {"h:1": [image(1, 5, 0)], "h:2": [image(1, 4, 1)]}
    assert decide(held, "h:1", chosen=Key(1, 5)) == Last(key=Key(1, 5), world=3, images={0: 1})


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
