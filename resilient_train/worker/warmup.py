"""Rehearse a training step in a replacement process before it says that it is ready.

torch imports and compiles much on first use (DTensor, FSDP2, optimizers reach for dynamo).  The members of a running
world would wait for that when the newcomer joins, so it does it alone and beforehand, on a group of one.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

logger = logging.getLogger(__name__)


def rehearse(device: torch.device) -> None:
    """Form a group of one, train one step of a tiny FSDP2 model, forget everything. Failures only cost the warmth."""
    if dist.is_initialized():
        return
    state = torch.get_rng_state()
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).to(device)
            mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("data",))
            if device.type == "cpu":
                fully_shard(model, mesh=mesh)
            optim = torch.optim.AdamW(model.parameters())
            model(torch.ones(2, 4, device=device)).sum().backward()
            optim.step()
        finally:
            dist.destroy_process_group()
    except (RuntimeError, ImportError, dist.DistError) as error:
        logger.warning("warming up failed, joining cold: %s", error)
    finally:
        torch.set_rng_state(state)
