"""What `bench_recovery.py` runs under every launcher: an FSDP2 model whose finished steps are timed.

Every rank appends ``step size generation pid monotonic-time`` to METRICS/<pid> when a step is finished.  A third
argument is the time in seconds that a step takes besides.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import resilient_train as rt

METRICS, STEPS = Path(sys.argv[1]), int(sys.argv[2])
STEP_TIME = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
WIDTH, LAYERS = 256, 3


def replica() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)))


def build(mesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = replica()
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def one_step(model: nn.Module, optim: torch.optim.Optimizer) -> None:
    model(torch.ones(8, WIDTH)).square().mean().backward()
    optim.step()
    optim.zero_grad()


@rt.elastic
def train(world: rt.World) -> None:
    model, optim = build(world.mesh)
    ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), world=world)
    with (METRICS / str(os.getpid())).open("a", buffering=1) as file:
        for step in ckpt.steps(STEPS):
            one_step(model, optim)
            time.sleep(STEP_TIME)
            file.write(f"{step} {world.size} {world.generation} {os.getpid()} {time.monotonic()}\n")


if __name__ == "__main__":
    train()
