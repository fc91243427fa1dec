"""What several keepers write of one state is a checkpoint when all of it is there, and no keeper says so before."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from resilient_train.errors import StorageError
from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.keeper import persist as persisting
from resilient_train.keeper.persist import Job, persist
from resilient_train.keeper.progress import Progress
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing
from resilient_train.storage.filesystem import FilesystemTier

KEY = Key(1, 7)


@pytest.fixture
def make() -> Iterator[Callable[..., Job]]:
    """Makes the job of a keeper that has the images of some ranks."""
    slots: list[Slot] = []

    def image(rank: int, world: int, key: Key) -> Slot:
        entry = Entry(name="t", dtype="F32", shape=(4, 5), global_shape=(4 * world, 5), offset=(4 * rank, 0))
        layout = plan_image([entry], 10)
        fd = create_memory("test", layout.total)
        slots.append(Slot(fd))
        os.close(fd)
        parts = [Part(entry=entry, sources=(torch.full((4, 5), float(rank)),))]
        writer = ImageWriter(layout, parts, rank, world)
        assert writer.begin(slots[-1], key, parts, b"{}")
        assert writer.conclude() == []
        return slots[-1]

    def job(ranks: list[int], world: int = 2, key: Key = KEY, keep_last: int = 3) -> Job:
        images = {rank: image(rank, world, key) for rank in ranks}
        return Job(
            key=key, world=world, images=images, past={1: None}, url="", keep_last=keep_last, progress=Progress(key, 0)
        )

    yield job
    for slot in slots:
        slot.close()


class Unlisted(FilesystemTier):
    """Answers no listing once a part is there."""

    def folders(self) -> dict[str, set[str]]:
        found = super().folders()
        if any(name.startswith("part-") for names in found.values() for name in names):
            raise StorageError("503 slow down")
        return found


class Lagging(FilesystemTier):
    """Shows parts too late."""

    def folders(self) -> dict[str, set[str]]:
        return {
            folder: {name for name in names if not name.startswith("part-")}
            for folder, names in super().folders().items()
        }


def test_a_listing_that_fails_is_no_success(make: Callable[..., Job], tmp_path: Path) -> None:
    """Without the manifest there is no checkpoint, whatever was written; and what was written stays."""
    with pytest.raises(StorageError, match="503"):
        persist(Unlisted(str(tmp_path)), make([0, 1]))
    assert listing(FilesystemTier(str(tmp_path))) == ([], [KEY])


def test_a_keeper_needs_no_listing_for_its_own_part(make: Callable[..., Job], tmp_path: Path) -> None:
    """It knows what it has just written."""
    persist(Lagging(str(tmp_path)), make([0, 1]))
    assert listing(FilesystemTier(str(tmp_path))) == ([KEY], [])


def test_the_first_keeper_waits_for_the_last_one(make: Callable[..., Job], tmp_path: Path) -> None:
    """Nobody says durable before the manifest is there; the one that puts the last part writes it."""
    first = threading.Thread(target=persist, args=(FilesystemTier(str(tmp_path)), make([0])))
    first.start()
    part = tmp_path / "step-000000007.g1" / "part-00000.json"
    deadline = time.monotonic() + 30
    while not part.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.join(0.5)
    assert first.is_alive()
    persist(FilesystemTier(str(tmp_path)), make([1]))
    first.join(30)
    assert not first.is_alive()
    assert listing(FilesystemTier(str(tmp_path))) == ([KEY], [])


def test_a_state_that_other_nodes_do_not_complete_is_not_durable(
    make: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said after a while, and what is there is left to them."""
    monkeypatch.setattr(persisting, "_OTHERS", 0.0)
    with pytest.raises(StorageError, match="1 of 2 ranks"):
        persist(FilesystemTier(str(tmp_path)), make([0]))
    persist(FilesystemTier(str(tmp_path)), make([1]))
    assert listing(FilesystemTier(str(tmp_path))) == ([KEY], [])


def test_a_keeper_that_fails_late_leaves_what_another_has_committed(make: Callable[..., Job], tmp_path: Path) -> None:
    """Its part is put, so the other may have taken it for granted, and removed the older ones."""
    persist(FilesystemTier(str(tmp_path)), make([0, 1], key=Key(1, 6), keep_last=1))
    other = make([1], keep_last=1)

    class Overtaken(FilesystemTier):
        """Another keeper commits, and then the place does not answer."""

        def put(self, path: str, chunks: Iterable[bytes | memoryview]) -> int:
            written = super().put(path, chunks)
            if "part-" in path:
                persist(FilesystemTier(str(tmp_path)), other)
                self.dead = True
            return written

        def folders(self) -> dict[str, set[str]]:
            if getattr(self, "dead", False):
                raise StorageError("503 slow down")
            return super().folders()

    with pytest.raises(StorageError, match="503"):
        persist(Overtaken(str(tmp_path)), make([0], keep_last=1))
    assert listing(FilesystemTier(str(tmp_path))) == ([KEY], [])
