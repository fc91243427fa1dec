"""Ranks of three nodes put together what four had: as a script, one process for each, with keepers that only count."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import placed
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from placed import FSDP, PLACED, S1, R, check, made, values, zeros
from test_state import KEY, written
from worlds import world as world_of

from resilient_train.errors import CheckpointDamaged, ResilientError, StateMismatch
from resilient_train.image.parcel import pack
from resilient_train.image.reader import ImageReader, memory_reader
from resilient_train.plan import transport as planned
from resilient_train.plan.recovery import Holders
from resilient_train.worker import transport
from resilient_train.worker.exchange import Exchange
from resilient_train.worker.fill import fill
from resilient_train.worker.images import Images
from resilient_train.worker.sources import Candidate, MemorySource

BEFORE, AFTER = 4, 3
placed.SHAPES.update({"embed": (3001, 700), "up": (1600, 1200), "down": (1200, 1600)})
PLACEMENTS: dict[str, PLACED] = {
    "rows": FSDP,
    "columns": {name: [S1] if len(shape) > 1 else [R] for name, shape in placed.SHAPES.items()},
    "copies": {name: [R] for name in placed.SHAPES},
}
NEAR = {0: [0, 3], 1: [1], 2: [2]}
"""Rank of the new world -> whose images its node holds: that of the lost rank is a copy."""


def say(text: str) -> None:
    os.write(1, (text.replace("\n", " ") + "\n").encode())


def flipped(wanted: Any, reader: Any) -> np.ndarray:
    parcel = pack(wanted, reader).copy()
    parcel[len(parcel) // 2] ^= 4
    return parcel


def gone(*_: Any) -> np.ndarray:
    raise CheckpointDamaged("the image is gone")


FAULTS: dict[str, Callable[..., np.ndarray]] = {"lies": flipped, "has lost it": gone}


def breaking(swap: Any) -> Any:
    """Fails in the middle of what others wait for."""
    calls = iter(range(100))

    def swapped(*messages: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("no room")
        return swap(*messages)

    return swapped


def nothing() -> AbstractContextManager[Images]:
    raise CheckpointDamaged("here is nothing")


def differs(*_: Any, **__: Any) -> None:
    raise StateMismatch("another model")


class Staged(Exchange):
    """Copies what it sends and receives, as to and from a device."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.staged = True


def images(rank: int, placements: PLACED) -> tuple[Images, list[int]]:
    """The old world's, as a rank of the new one sees them, and how many bytes were read of other nodes' keepers."""
    count = [0]
    mesh = {"data": BEFORE}
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)  # The images are the same in all processes, generators included.
    slots = [written(made(world_of(mesh, old), placements, values), old, BEFORE, alike=True) for old in range(BEFORE)]

    def opened(old: int) -> ImageReader:
        view = memoryview(slots[old].map)
        if old in NEAR[rank]:
            return memory_reader(f"memory of rank {old}", view)

        def read(offset: int, length: int) -> memoryview:
            count[0] += length
            return view[offset : offset + length]

        return ImageReader(f"rank {old}'s keeper", len(view), read)

    assert slots[0].stamp().key == KEY  # type: ignore[union-attr]
    return Images(Holders(world=BEFORE, ranks=range(BEFORE), near=NEAR[rank]), opened, whole=True), count


def work(rank: int, meeting: str, *cases: str) -> None:
    logging.basicConfig(format=f"{rank} %(message)s", stream=sys.stderr)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=AFTER)
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            restore(patch, rank, case)
        dist.barrier()
    dist.destroy_process_group()


def restore(patch: pytest.MonkeyPatch, rank: int, case: str) -> None:
    """One restore; ``case`` is a layout, the way that is to be faster, and what goes wrong."""
    kind, faster, *fault = case.split(":")
    patch.setattr(transport, "LEAST", 1 << 40 if faster == "too little" else 1)
    patch.setattr(planned, "_PART", 3)
    patch.setattr(planned, "MOST_TRIED", 1)
    if faster in ("group", "keepers"):
        measured = iter([1.0, 0.0, 2.0] if faster == "group" else [2.0, 0.0, 1.0])
        patch.setattr(transport, "rate", lambda _: next(measured))
    if fault and fault[0] == str(rank) and fault[1] in FAULTS:
        patch.setattr(transport, "pack", FAULTS[fault[1]])
    there, count = images(rank, PLACEMENTS[kind])
    state = made(world_of({"data": AFTER}, rank), PLACEMENTS[kind], zeros)
    exchange = (Staged if fault == ["staged"] else Exchange)(rank, AFTER)
    if fault == [str(rank), "breaks off"]:
        patch.setattr(exchange, "swap", breaking(exchange.swap))
    source = MemorySource(SimpleNamespace(everywhere=lambda: None), exchange)  # type: ignore[arg-type]
    bare = fault == [str(rank), "is bare"]
    patch.setattr(MemorySource, "_opened", lambda *_: nothing() if bare else nullcontext(there))
    if fault == [str(rank), "is another"]:
        patch.setattr(state, "targets", differs)
    try:
        with source.open(Candidate(key=KEY), rank) as together:
            fill(state, together, rank, AFTER, 4)
        check(state, PLACEMENTS[kind])
        say(f"{case} | {rank} | restored {together.brought} {together.moved} {together.passed} {count[0]}")
    except ResilientError as error:
        say(f"{case} | {rank} | {type(error).__name__}: {error}")
    except Exception as error:
        logging.exception("restoring")
        say(f"{case} | {rank} | {'adrift' if together.adrift else 'told'}: {type(error).__name__}")
        os._exit(3)


if __name__ == "__main__":
    for process in mp.spawn(work, tuple(sys.argv[1:]), nprocs=AFTER, join=False).processes:
        process.join()  # Each by itself: one that dies is not to take others along.
