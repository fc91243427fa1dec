"""States on meshes of any kind, all ranks in one process: what each holds is known by its place."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from resilient_train.spec.layout import Box
from resilient_train.worker.process_group import clear_dtensor_caches
from resilient_train.worker.state import State
from resilient_train.worker.tensors import local_part
from resilient_train.worker.world import World

PLACED = Mapping[str, Sequence[Placement]]
R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = {"embed": (13, 4), "up": (8, 12), "down": (12, 8), "norm": (5,), "scale": ()}


def values(name: str, shape: Sequence[int]) -> torch.Tensor:
    """What a tensor of this name holds: every element is known by its place."""
    first = zlib.crc32(name.encode()) % 10_000
    return torch.arange(first, first + prod(shape), dtype=torch.float64).view(tuple(shape))


def placed(whole: torch.Tensor, world: World, placements: Sequence[Placement]) -> DTensor:
    """This rank's part of a tensor, as torch would have it."""
    shape, stride = whole.shape, whole.stride()
    coordinate = world.mesh.get_coordinate()
    assert coordinate is not None
    local_shape, offset = _compute_local_shape_and_global_offset(shape, world.mesh.shape, coordinate, placements)
    local = whole[Box(tuple(offset), tuple(local_shape)).slices_in(Box.whole(shape))].clone()
    return DTensor.from_local(local, world.mesh, placements, run_check=False, shape=shape, stride=stride)


FSDP = {name: [S0] if shape else [R] for name, shape in SHAPES.items()}
TP_FSDP: dict[str, list[Placement]] = {
    "embed": [S0, R],
    "up": [_StridedShard(0, split_factor=2), S0],
    "down": [S0, S1],
    "norm": [S0, R],
    "scale": [R, R],
}


class Sgd(torch.optim.SGD):
    """An optimizer whose state is set by hand: full and factored moments, and a counter."""


def made(world: World, placements: PLACED, value: Callable[[str, Sequence[int]], torch.Tensor]) -> State:
    """A module of DTensors (and a plain buffer) with an optimizer's state, all of ``value``."""
    clear_dtensor_caches()  # They take one rank's mesh for another's, which is none of this test's business.
    model = nn.Module()
    for name, how in placements.items():
        model.register_parameter(name, nn.Parameter(placed(value(name, SHAPES[name]), world, how)))
    model.register_buffer("mean", value("mean", (3,)))
    model.register_buffer("table", placed(value("table", (8, 12)), world, placements["up"]))
    optim = Sgd(model.parameters(), lr=0.1)
    for name, parameter in model.named_parameters():
        shape = SHAPES[name]
        state = optim.state[parameter]
        state["moment"] = placed(value(f"{name} moment", shape), world, placements[name])
        state["step"] = value(f"{name} step", ())
        if len(shape) == 2 and not any(isinstance(p, _StridedShard) for p in placements[name]):
            rows = [p if isinstance(p, Shard) and p.dim == 0 else R for p in placements[name]]
            state["row"] = placed(value(f"{name} row", (shape[0], 1)), world, rows)
    return State(model=model, optim=optim)


def zeros(name: str, shape: Sequence[int]) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64)


def check(state: State, placements: PLACED) -> None:
    """Every element that this rank holds is the one that belongs there."""
    model, optim = (state._things[name] for name in ("model", "optim"))
    assert isinstance(model, nn.Module)
    assert isinstance(optim, torch.optim.Optimizer)
    assert torch.equal(model.mean, values("mean", (3,)))
    for name, parameter in model.named_parameters():
        held = {name: parameter, f"{name} moment": optim.state[parameter]["moment"], "table": model.table}
        held |= {f"{name} row": optim.state[parameter]["row"]} if "row" in optim.state[parameter] else {}
        for what, tensor in held.items():
            assert isinstance(tensor, DTensor)
            local, box, shape = local_part(what, tensor)
            assert torch.equal(local, values(what, shape)[box.slices_in(Box.whole(shape))]), what
        assert torch.equal(optim.state[parameter]["step"], values(f"{name} step", ()))


@st.composite
def meshes(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, list[Placement]]]:
    """Up to three dimensions, of which any may cut any tensor; FSDP over TP wherever torch would do it."""
    mesh = {
        f"d{i}": n
        for i, n in enumerate(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda m: prod(m) <= 8)))
    }
    placements: dict[str, list[Placement]] = {}
    for name, shape in SHAPES.items():
        kinds: list[Placement] = []
        for _ in mesh:
            dim = draw(st.integers(-1, len(shape) - 1))
            kinds.append(R if dim < 0 else Shard(dim))
        placements[name] = kinds
    return mesh, placements
