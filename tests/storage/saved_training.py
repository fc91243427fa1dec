"""A small job of three ranks on two nodes, one parameter sharded and the rest replicated, and two checkpoints of it."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.snapshot import ImageWriter
from resilient_train.keeper.persist import Job, persist
from resilient_train.keeper.progress import Progress
from resilient_train.spec.shard import (
    plan_image,
)
from resilient_train.spec.world import Key
from resilient_train.storage.commit import folder_of
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.process_group import clear_dtensor_caches
from resilient_train.worker.state import State

OLD, NEW = Key(1, 17), Key(2, 41)
FOLDER = folder_of(NEW)
WORLD = 3

Files = dict[str, bytes]
Contents = tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, Any]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.short = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.empty(0, 4))
        # More than one block of checksums.
        self.register_buffer("table", torch.randn(270, 1000))
        self.register_buffer("flags", torch.rand(7) < 0.5)
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("tiny", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("exact", torch.randn(2, 2, dtype=torch.float64))
        self.note: Any = {"seen": 0}

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


class Counter:
    """State of one's own, with everything that the document can hold."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {"ema": torch.randn(4), "more": [torch.randn(2, dtype=torch.complex128)]}
        self.state |= {"pair": (1, 2.5), 5: [None, "x"], "best": float("inf"), "raw": b"\x00\xff"}

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.state = {key: state[key] for key in state}


class Training:
    """A model with all that belongs to it; ``mesh``: with its widest parameter sharded."""

    def __init__(self, seed: int, mesh: DeviceMesh | None = None) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        if mesh is not None:
            self.model.wide.weight = nn.Parameter(shard(self.model.wide.weight, mesh))
        first, *others = self.model.parameters()
        self.optim = torch.optim.AdamW([{"params": [first]}, {"params": others, "lr": 0.1}], lr=0.01, foreach=False)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optim, 2)
        self.counter = Counter()
        self.state = State(model=self.model, optim=self.optim, schedule=self.schedule, counter=self.counter)

    def train(self) -> None:
        """Steps of which the parameters see different numbers."""
        for skipped in range(3):
            for index, parameter in enumerate(self.model.parameters()):
                parameter.grad = torch.randn_like(parameter) if index >= skipped else None
            self.optim.step()
            self.schedule.step()
        self.model.note = {"seen": 3, "last": (1, float("nan"))}

    def follow(self, other: Training, mesh: DeviceMesh) -> None:
        """Take over all of ``other``, which is not sharded."""
        self.model.note, self.counter.state = other.model.note, other.counter.state
        self.schedule.load_state_dict(other.schedule.state_dict())
        for group, options in zip(self.optim.param_groups, other.optim.param_groups, strict=True):
            group.update({key: value for key, value in options.items() if key != "params"})
        with torch.no_grad():
            for mine, theirs in zip(self.model.buffers(), other.model.buffers(), strict=True):
                mine.copy_(theirs)
            for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
                sharded = isinstance(mine, DTensor)
                mine.copy_(shard(theirs, mesh) if sharded else theirs)
                state = other.optim.state[theirs].items()
                self.optim.state[mine] = {k: shard(v, mesh) if sharded and v.dim() else v.clone() for k, v in state}


def shard(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    local = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def contents(training: Training, rank: int) -> Contents:
    """Every tensor (dtype, shape, bytes) and the document."""
    frame = training.state.capture(rank)
    tensors = {}
    for part in frame.parts:
        raw = b"".join(source.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for source in part.sources)
        tensors[part.entry.name] = (part.entry.real_dtype or part.entry.dtype, part.entry.shape, raw)
    return tensors, json.loads(frame.document)


def seed_all(number: int) -> None:
    torch.manual_seed(number), np.random.seed(number), random.seed(number)


def image(training: Training, rank: int, key: Key) -> Slot:
    frame = training.state.capture(rank)
    layout = plan_image([part.entry for part in frame.parts], len(frame.document), alike=True)
    fd = create_memory("test", layout.total)
    slot = Slot(fd)
    os.close(fd)
    by_name = {part.entry.name: part for part in frame.parts}
    parts = [by_name[entry.name] for entry in layout.entries]
    writer = ImageWriter(layout, parts, rank, WORLD)
    assert writer.begin(slot, key, parts, frame.document)
    assert writer.conclude() == []
    return slot


def save(folder: Path, key: Key, seed: int) -> dict[int, Contents]:
    """Persist a checkpoint as two nodes would; what a restore must give on each rank."""
    whole = Training(seed)
    whole.train()
    expected, slots = {}, {}
    for rank in range(WORLD):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        try:
            mesh = DeviceMesh("cpu", list(range(WORLD)))
            mine = Training(seed + 1, mesh)
            mine.follow(whole, mesh)
            seed_all(100 + rank)
            slots[rank] = image(mine, rank, key)
            expected[rank] = contents(whole, rank)
        finally:
            dist.destroy_process_group()
            clear_dtensor_caches()
    for node in ((0, 1), (2,)):
        job = Job(
            key=key,
            world=WORLD,
            images={rank: slots[rank] for rank in node},
            origins=dict.fromkeys(node, "n"),
            past={1: 20, 2: None},
            url=str(folder),
            keep_last=2,
            progress=Progress(key, 0.0),
        )
        persist(FilesystemTier(str(folder)), job)
    for slot in slots.values():
        slot.close()
    return expected


@dataclass(frozen=True, kw_only=True)
class Saved:
    folder: Path
    files: Files
    expected: dict[Key, dict[int, Contents]]


def save_all(folder: Path) -> Saved:
    expected = {key: save(folder, key, 10 * key.lineage) for key in (OLD, NEW)}
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Saved(folder=folder, files=files, expected=expected)
