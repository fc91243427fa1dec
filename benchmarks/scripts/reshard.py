"""What `bench_reshard.py` runs on every node: a sharded model of a given size, whose restores are timed.

    reshard.py FOLDER MIB DIM

Every rank appends a JSON object to FOLDER/<pid> when it has restored: seconds from when all ranks were ready, and the
bytes that went over the loopback interface until all had their part; and what rank 0 has told of it.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import resilient_train as rt

FOLDER, MIB, DIM = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
WIDTH = 1152


def build(mesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Parameters and AdamW's two moments, MIB in all, sharded over all ranks."""
    torch.manual_seed(0)
    layers = max(1, round(MIB * (1 << 20) / 3 / (4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda _: Shard(DIM))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def sent() -> int:
    """Bytes that went over the loopback interface."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


class Heard(logging.Handler):
    """What rank 0 says of its restores."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


HEARD = Heard()


@rt.elastic
def train(world: rt.World) -> None:
    model, optim = build(world.mesh)
    ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), world=world)
    dist.barrier()
    before, began = sent(), time.perf_counter()
    first = ckpt.restore()
    seconds = time.perf_counter() - began
    dist.barrier()
    row: dict[str, object] = {
        "generation": world.generation,
        "rank": world.rank,
        "size": world.size,
        "seconds": seconds,
    }
    row |= {"moved": sent() - before, "step": first, "told": HEARD.text}
    with (FOLDER / str(os.getpid())).open("a") as file:
        file.write(json.dumps(row) + "\n")
    for step in range(first, 1_000_000):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optim.step()
        optim.zero_grad()
        dist.barrier()
        ckpt.snapshot(step + 1)
        with (FOLDER / "steps").open("a") as file:
            file.write(f"{step + 1}\n" if world.rank == 0 else "")
        time.sleep(1.0)


if __name__ == "__main__":
    told = logging.getLogger("resilient_train.worker.checkpointer")
    told.setLevel(logging.INFO)
    told.addHandler(HEARD)
    train()
