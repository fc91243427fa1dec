"""Worlds of a few ranks for these tests: processes that are forked from a server which has imported torch already."""

from __future__ import annotations

import multiprocessing
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
# FSDP2 and optimizers import the compiler when they are first used.
_CONTEXT.set_forkserver_preload(["dcp_training", "torch._dynamo"])
_TIMEOUT = 60.0


def world(size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``function(folder, *args)`` returns on each of ``size`` ranks with a gloo group; none is left running."""
    store = folder / f"store-{uuid.uuid4().hex}"
    ends, processes = [], []
    for rank in range(size):
        mine, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(theirs, str(store), rank, size, function, folder, *args))
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    try:
        answers = [_answer(end) for end in ends]
    finally:
        for process in processes:
            process.join(10.0)
            process.kill()
            process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (well, text) in enumerate(answers) if not well]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


def _answer(end: Connection) -> tuple[bool, Any]:
    try:
        return end.recv() if end.poll(_TIMEOUT) else (False, f"no answer within {_TIMEOUT:g} s")
    except EOFError:
        return False, "ended without an answer"


def _rank(end: Connection, store: str, rank: int, size: int, function: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    try:
        group = dist.FileStore(store, size)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        value = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        end.send((True, value))
    except BaseException:
        end.send((False, traceback.format_exc()))
