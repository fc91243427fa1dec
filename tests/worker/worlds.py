"""Worlds as training functions see them, all ranks of them in one process and without process groups."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch.distributed.device_mesh import DeviceMesh

from resilient_train.worker.world import World


def world(mesh: Mapping[str, int], rank: int, generation: int = 1) -> World:
    """What ``rank`` sees of a world with this mesh."""
    size = prod(mesh.values())
    ranks = torch.arange(size).view(*mesh.values())
    device_mesh = DeviceMesh("cpu", ranks, mesh_dim_names=tuple(mesh), _init_backend=False, _rank=rank)
    return World(
        rank=rank,
        size=size,
        local_rank=rank,
        local_size=size,
        generation=generation,
        device=torch.device("cpu"),
        mesh=device_mesh,
        reason="test",
    )


def worlds(mesh: Mapping[str, int], generation: int = 1) -> list[World]:
    """What all ranks see of it."""
    return [world(mesh, rank, generation) for rank in range(prod(mesh.values()))]
