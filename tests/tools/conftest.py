"""Small checkpoints as a job would leave them, made in this process: images of several ranks, parts, manifest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.native import checksum
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.spec.shard import peek, plan_image
from resilient_train.spec.sharding import Cut, held_box
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import commit
from resilient_train.storage.commit import ImageFile, Manifest, folder_of, image_name
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.state import State

Make = Callable[..., State]


class Net(nn.Module):
    """Tied embeddings, bfloat16, a scalar, an empty tensor, a tensor that has fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.wide = nn.Linear(6, 10, dtype=torch.bfloat16)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.one = nn.Parameter(torch.randn(1, 3, dtype=torch.float64))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("seen", torch.arange(5))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("temporary", torch.zeros(3), persistent=False)


def state_of(net: nn.Module) -> State:
    """A state with an optimizer that has stepped, and a scheduler."""
    optim = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step()
    return State(model=net, optim=optim, schedule=torch.optim.lr_scheduler.StepLR(optim, 3))


def _share(part: Part, rank: int, world: int) -> Part | None:
    """What a rank has of a tensor: rows, of ``wide`` columns; what cannot be cut is the first rank's."""
    entry = part.entry
    if entry.name.startswith("rng/"):
        return part
    if not entry.shape or len(part.sources) > 1 or entry.real_dtype:
        return part if rank == 0 else None
    cuts = (Cut(1 if "wide.weight" in entry.name else 0, world, 1),)
    box = held_box(entry.shape, cuts, rank)
    (source,) = part.sources
    cut = source[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
    return Part(entry=replace(entry, shape=box.shape, offset=box.offset, cuts=cuts), sources=(cut,))


def _image(state: State, key: Key, rank: int, world: int) -> bytes:
    frame = state.capture(rank)
    shares = [share for part in frame.parts if (share := _share(part, rank, world)) is not None]
    layout = plan_image([share.entry for share in shares], len(frame.document) + 10)
    by_entry = {share.entry: share for share in shares}
    parts = [by_entry[entry] for entry in layout.entries]
    fd = create_memory("test", layout.total)
    slot = Slot(fd)
    os.close(fd)
    writer = ImageWriter(layout, parts, rank, world)
    assert writer.begin(slot, key, parts, frame.document)
    assert writer.conclude() == []
    data = bytes(slot.map)
    slot.close()
    return data


def save(
    url: object, step: int, lineage: int = 1, *, state: State | None = None, ranks: int = 2, last: int = 0
) -> State:
    """Write the checkpoint of ``step``; without the parts of the ``last`` ranks it stays unfinished."""
    state = state or state_of(Net())
    tier, key = FilesystemTier(str(url)), Key(lineage, step)
    for rank in range(ranks - last):
        data = _image(state, key, rank, ranks)
        length = 8 + int.from_bytes(data[:8], "little")
        file = ImageFile(
            name=image_name(rank, ranks),
            rank=rank,
            size=len(data),
            header_crc=checksum(data[:length]),
            table_crc=peek(data).crc,  # type: ignore[union-attr]
        )
        tier.put(f"{folder_of(key)}/{file.name}", [data])
        commit(tier, Manifest(key=key, world=ranks, files=(file,), past={lineage: None}))
    return state


@pytest.fixture
def make() -> Make:
    """See `save`."""
    return save
