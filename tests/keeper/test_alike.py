"""What has one name on several ranks is written once if it is the same, by each if it may differ, and else refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from resilient_train.errors import UnsupportedState
from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.keeper.persist import Job, persist
from resilient_train.keeper.progress import Progress
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.sources import Candidate, TierSource

KEY = Key(1, 7)
DOCUMENT = json.dumps(
    {
        "m": {"kind": "module", "aliases": {}, "buffers": ["mean"]},
        "o": {"kind": "optimizer"},
        "s": {"kind": "stateful"},
    }
).encode()


@pytest.fixture
def make() -> Iterator[Callable[..., Job]]:
    """Makes a job of one image per mapping of names to tensors."""
    slots: list[Slot] = []

    def image(rank: int, world: int, tensors: dict[str, torch.Tensor]) -> Slot:
        entries = [
            Entry(name=name, dtype="F32", shape=tuple(t.shape), global_shape=tuple(t.shape), offset=(0,) * t.dim())
            for name, t in tensors.items()
        ]
        layout = plan_image(entries, len(DOCUMENT))
        fd = create_memory("test", layout.total)
        slots.append(Slot(fd))
        os.close(fd)
        parts = [Part(entry=entry, sources=(tensors[entry.name],)) for entry in layout.entries]
        writer = ImageWriter(layout, parts, rank, world)
        assert writer.begin(slots[-1], KEY, parts, DOCUMENT)
        assert writer.conclude() == []
        return slots[-1]

    def job(*ranks: dict[str, torch.Tensor]) -> Job:
        images = {rank: image(rank, len(ranks), tensors) for rank, tensors in enumerate(ranks)}
        return Job(
            key=KEY,
            world=len(ranks),
            images=images,
            origins=dict.fromkeys(images, "n"),
            past={1: None},
            url="",
            keep_last=3,
            progress=Progress(KEY, 0),
        )

    yield job
    for slot in slots:
        slot.close()


def held(folder: Path) -> list[dict[str, torch.Tensor]]:
    with TierSource(FilesystemTier(str(folder))).open(Candidate(key=KEY)) as images:
        return [{entry.name: reader.tensor(entry).clone() for entry in reader.entries()} for reader in images.all()]


BIG = torch.arange(700_000, dtype=torch.float32)


def test_what_is_the_same_is_written_once(make: Callable[..., Job], tmp_path: Path) -> None:
    """Wherever it stands in the images, and whatever stands beside it."""
    shared = {"m/w": BIG, "m/b": torch.ones(3), "o/x": BIG + 1}
    persist(FilesystemTier(str(tmp_path)), make(shared, {**shared, "s/own": torch.ones(999)}, shared))
    names = [name for image in held(tmp_path) for name in image]
    assert sorted(names) == ["m/b", "m/w", "o/x", "s/own"]


@pytest.mark.parametrize("name", ["m/w", "o/x"])
def test_parameters_and_optimizer_state_must_be_the_same(make: Callable[..., Job], tmp_path: Path, name: str) -> None:
    """One element of a large tensor is enough; the tensor and the ranks are named, nothing is written."""
    shared = {"m/w": BIG, "o/x": BIG + 1}
    other = shared[name].clone()
    other[400_000] = -1
    with pytest.raises(UnsupportedState, match=f"ranks 0 and 2 hold different values of {name}:"):
        persist(FilesystemTier(str(tmp_path)), make(shared, shared, {**shared, name: other}))
    assert list(tmp_path.iterdir()) == []


def test_other_shapes_under_one_name_are_refused(make: Callable[..., Job], tmp_path: Path) -> None:
    """Nothing could be restored from them."""
    with pytest.raises(UnsupportedState, match="m/w"):
        persist(FilesystemTier(str(tmp_path)), make({"m/w": torch.ones(3)}, {"m/w": torch.ones(4)}))


def test_what_may_differ_is_written_by_each(make: Callable[..., Job], tmp_path: Path) -> None:
    """Buffers and the tensors of other objects: every rank finds its own again."""
    shared = {"m/w": BIG, "m/mean": torch.zeros(3), "s/t": torch.zeros(2)}
    other = {**shared, "m/mean": torch.ones(3), "s/t": torch.ones(2)}
    persist(FilesystemTier(str(tmp_path)), make(shared, other))
    first, second = held(tmp_path)
    assert sum("m/w" in image for image in (first, second)) == 1
    for name in ("m/mean", "s/t"):
        assert torch.equal(first[name], shared[name])
        assert torch.equal(second[name], other[name])
