"""States on meshes: what any mesh saved, any other restores, whatever the placements; all ranks in one process."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_state import saved
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from worlds import world as world_of

from resilient_train.errors import CheckpointDamaged, StateMismatch, UnsupportedState
from resilient_train.image.native import engine
from resilient_train.image.reader import ImageReader
from resilient_train.image.verified import Row
from resilient_train.plan.recovery import Holders, not_covered
from resilient_train.spec.layout import Box
from resilient_train.worker.fill import fill
from resilient_train.worker.process_group import clear_dtensor_caches
from resilient_train.worker.sources import Images
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


class Sgd(torch.optim.SGD):
    """An optimizer whose state is set by hand: full and factored moments, and a counter."""


def made(world: World, placements: PLACED, value: Callable[[str, Sequence[int]], torch.Tensor]) -> State:
    """A module of DTensors (and a plain buffer) with an optimizer's state, all of ``value``."""
    clear_dtensor_caches()  # They take one rank's mesh for another's, which is none of this test's business.
    model = nn.Module()
    for name, how in placements.items():
        model.register_parameter(name, nn.Parameter(placed(value(name, SHAPES[name]), world, how)))
    model.register_buffer("mean", value("mean", (3,)))
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
        held = {name: parameter, f"{name} moment": optim.state[parameter]["moment"]}
        held |= {f"{name} row": optim.state[parameter]["row"]} if "row" in optim.state[parameter] else {}
        for what, tensor in held.items():
            assert isinstance(tensor, DTensor)
            local, box, shape = local_part(what, tensor)
            assert torch.equal(local, values(what, shape)[box.slices_in(Box.whole(shape))]), what
        assert torch.equal(optim.state[parameter]["step"], values(f"{name} step", ()))


def of_a_peer(reader: ImageReader) -> ImageReader:
    """The same image, read as from another node's memory: in rows where that spares something."""
    data = np.frombuffer(reader._read(0, reader.layout.total), dtype=np.uint8)

    def gather(offset: int, size: int, rows: Sequence[Row], buffer: memoryview) -> list[int]:
        target = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
        return engine.gather_rows(data.ctypes.data + offset, size, rows, target)

    return ImageReader(reader.name, len(data), reader._read, gather=gather)


def images(mesh: Mapping[str, int], placements: PLACED, *, alike: bool = True) -> list[ImageReader]:
    """What every rank of a world saves; every second image is on another node."""
    size = prod(mesh.values())
    held = [saved(made(world_of(mesh, rank), placements, values), rank, size, alike=alike) for rank in range(size)]
    return [of_a_peer(reader) if rank % 2 else reader for rank, reader in enumerate(held)]


def restore(readers: Sequence[ImageReader], ranks: Sequence[int], mesh: Mapping[str, int], placements: PLACED) -> None:
    """On every rank of another world, from the images of ``ranks``."""
    held = Holders(world=len(readers), ranks=ranks)
    for rank in range(prod(mesh.values())):
        state = made(world_of(mesh, rank), placements, zeros)
        fill(state, Images(held, readers.__getitem__, whole=True), rank, prod(mesh.values()))
        check(state, placements)


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


@settings(max_examples=30, deadline=None)
@given(meshes(), meshes(), st.data())
def test_any_mesh_restores_what_any_other_saved(
    old: tuple[dict[str, int], PLACED], new: tuple[dict[str, int], PLACED], data: st.DataObject
) -> None:
    """Uneven and empty shards, factored state, from all images or from those that are left of them."""
    readers = images(*old)
    ranks = data.draw(st.sets(st.sampled_from(range(len(readers))), min_size=1))
    covered = not not_covered(readers[0].entries(), Holders(world=len(readers), ranks=ranks))
    if not covered:
        with pytest.raises(CheckpointDamaged, match="do not cover"):
            restore(readers, sorted(ranks), *new)
    restore(readers, sorted(ranks) if covered else range(len(readers)), *new)


FSDP = {name: [S0] if shape else [R] for name, shape in SHAPES.items()}
TP_FSDP: dict[str, list[Placement]] = {
    "embed": [S0, R],
    "up": [_StridedShard(0, split_factor=2), S0],
    "down": [S0, S1],
    "norm": [S0, R],
    "scale": [R, R],
}


@pytest.mark.parametrize("alike", [True, False])
def test_tensor_parallel_and_back(alike: bool) -> None:
    """FSDP over TP to FSDP on another number of ranks, to HSDP, and back again; by layouts and by headers."""
    two, hybrid = {"data": 2, "tensor": 2}, {"replicate": 2, "shard": 3}
    over = {name: [R, *how] for name, how in FSDP.items()}
    for source in (images(two, TP_FSDP, alike=alike), images({"data": 3}, FSDP, alike=alike)):
        for mesh, how in (({"data": 3}, FSDP), (two, TP_FSDP), (hybrid, over), ({"data": 1}, FSDP)):
            restore(source, range(len(source)), mesh, how)


def test_one_replica_of_two_is_enough() -> None:
    """HSDP: the ranks of either replica hold everything; without one rank of each nothing is restored."""
    readers = images({"replicate": 2, "shard": 2}, {name: [R, *how] for name, how in FSDP.items()})
    for left in ((0, 1), (2, 3), (0, 3), (1, 2, 3)):
        restore(readers, left, {"data": 3}, FSDP)
    with pytest.raises(CheckpointDamaged, match="do not cover"):
        restore(readers, (0, 2), {"data": 3}, FSDP)


def test_placements_that_leave_several_blocks_are_refused_by_name() -> None:
    """A strided shard without anything that cuts further inside is no block of the tensor."""
    how = dict(FSDP, up=[_StridedShard(0, split_factor=2)])
    with pytest.raises(UnsupportedState, match="up: placement"):
        images({"data": 2}, how)


# ---- ranks that are of different makes ------------------------------------------------------------------------------

LAYERS = ("0", "1", "2", "3")


def stage(
    layers: Sequence[str], value: Callable[[str, Sequence[int]], torch.Tensor]
) -> tuple[State, nn.Module, torch.optim.Optimizer]:
    """A pipeline stage: some layers of a model, under the names that they have in all of it."""
    model = nn.ModuleDict({name: nn.Linear(3, 2, dtype=torch.float64) for name in layers})
    optim = torch.optim.AdamW(model.parameters(), lr=0.25 if value is values else 0.5)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(value(name, parameter.shape))
        if value is values:
            moments = {key: value(f"{name} {key}", parameter.shape) for key in ("exp_avg", "exp_avg_sq")}
            optim.state[parameter] = {"step": value(f"{name} step", ()), **moments}
    return State(model=model, optim=optim), model, optim


@pytest.mark.parametrize(
    "new", [[LAYERS], [("0", "1"), ("2", "3")], [("0",), ("1", "2"), ("3",)], [("1", "3"), ("0", "2")]]
)
def test_layers_move_between_pipeline_stages(new: Sequence[Sequence[str]]) -> None:
    """Saved by two stages, restored by any others: parameters, moments, steps and options of the layers they have."""
    readers = [saved(stage(layers, values)[0], rank, 2) for rank, layers in enumerate((("0", "1"), ("2", "3")))]
    for rank, layers in enumerate(new):
        state, model, optim = stage(layers, zeros)
        fill(state, Images.of(readers), rank, len(new))
        assert optim.param_groups[0]["lr"] == 0.25
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, values(name, parameter.shape))
            held = optim.state[parameter]
            assert torch.equal(held["step"], values(f"{name} step", ()))
            assert torch.equal(held["exp_avg"], values(f"{name} exp_avg", parameter.shape))


def test_a_layer_that_no_stage_saved_is_named() -> None:
    """Another model is not taken for another division of this one."""
    readers = [saved(stage(layers, values)[0], rank, 2) for rank, layers in enumerate((("0", "1"), ("2",)))]
    with pytest.raises(StateMismatch, match=r"model.3\.weight"):
        fill(stage(("2", "3"), zeros)[0], Images.of(readers), 1, 2)


def test_a_stage_whose_image_is_gone_is_missed() -> None:
    """What only the lost rank had nobody knows, so the others' images are not a whole state."""
    readers = [saved(stage(layers, values)[0], rank, 2) for rank, layers in enumerate((("0", "1"), ("2", "3")))]
    held = Holders(world=2, ranks=(0,))
    with pytest.raises(CheckpointDamaged, match="do not cover"):
        fill(stage(("0", "1"), zeros)[0], Images(held, readers.__getitem__, whole=True), 0, 1)
