"""Rehearse a training step before a process says that it is ready.

torch imports much on first use (DTensor, FSDP2, optimizers reach for dynamo), and so does this package.  The members of
a running world would wait for that when a replacement joins, so it does it alone and beforehand, on a group of one; the
first workers do the same, and have it behind them when they tell the garbage collector what stays.
"""

from __future__ import annotations

import logging
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import resilient_train
from resilient_train.worker.process_group import clear_dtensor_caches

logger = logging.getLogger(__name__)


def rehearse(device: torch.device) -> None:
    """Import this package, form a group of one, train a step of a tiny FSDP2 model, forget that. Failures only cost the
    warmth."""
    if dist.is_initialized():
        return
    state, hook = torch.get_rng_state(), sys.excepthook
    try:
        for name in resilient_train.__all__:
            getattr(resilient_train, name)
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
            clear_dtensor_caches()
    except Exception as error:  # A rehearsal: whatever fails here will fail again, with a meaning, in the user's code.
        logger.warning("warming up failed, joining cold: %s", error)
    finally:
        torch.set_rng_state(state)
        sys.excepthook = hook
