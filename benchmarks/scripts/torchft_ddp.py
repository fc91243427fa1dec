"""The model of `train.py` under torchft: ``torchft_ddp.py METRICS STEPS REPLICA default|tuned``.

Replicated and not sharded: torchft averages gradients over replicas, and FSDP alone is not what it serves.

Every process is a replica group of its own.  TORCHFT_LIGHTHOUSE says where the lighthouse is.  A step counts as
finished once it is committed; the generation that is written down is always 0, for torchft has none.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

sys.path.insert(0, str(Path(__file__).parent))
import train as script

# A replica that is no neighbour of the dead one in gloo's ring is freed by the group's timeout only.
GROUP_TIMEOUT = {"default": timedelta(seconds=60), "tuned": timedelta(seconds=1)}


def main() -> None:
    name, mode = sys.argv[3:]
    module = script.replica()
    adam = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def load(state: dict[str, dict]) -> None:
        module.load_state_dict(state["model"])
        adam.load_state_dict(state["optim"])

    store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=GROUP_TIMEOUT[mode]),
        load_state_dict=load,
        state_dict=lambda: {"model": module.state_dict(), "optim": adam.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        hostname="localhost",
        replica_id=f"replica_{name}",
    )
    model, optim = DistributedDataParallel(manager, module), Optimizer(manager, adam)
    with (script.METRICS / str(os.getpid())).open("a", buffering=1) as file:
        while (step := manager.current_step()) < script.STEPS:
            optim.zero_grad()
            model(torch.ones(8, script.WIDTH)).square().mean().backward()
            optim.step()
            if manager.current_step() > step:
                file.write(f"{step} {manager.num_participants()} 0 {os.getpid()} {time.monotonic()}\n")


if __name__ == "__main__":
    main()
