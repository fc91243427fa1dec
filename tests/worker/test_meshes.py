"""States on meshes: what any mesh saved, any other restores, whatever the placements; all ranks in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placed import FSDP, PLACED, TP_FSDP, R, check, made, meshes, values, zeros
from test_state import images_of, saved
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Shard, _StridedShard
from worlds import world as world_of

from resilient_train.errors import CheckpointDamaged, StateMismatch, UnsupportedState
from resilient_train.image.native import engine
from resilient_train.image.reader import ImageReader
from resilient_train.image.verified import Row
from resilient_train.plan.recovery import Holders, not_covered
from resilient_train.worker.fill import fill
from resilient_train.worker.sources import Images
from resilient_train.worker.state import State
from resilient_train.worker.tensors import box_here


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


def test_ranks_are_alike_only_where_arithmetic_tells_who_holds_what() -> None:
    """Ranks that are numbered in another order than row by row know their own boxes only; an optimizer of other
    parameters is another make."""
    makes = [made(world_of({"data": 2}, rank), FSDP, values).make() for rank in range(2)]
    assert makes[0] == makes[1] is not None
    turned = DeviceMesh("cpu", torch.tensor([1, 0]), mesh_dim_names=("data",), _init_backend=False, _rank=0)
    assert made(dataclasses.replace(world_of({"data": 2}, 0), mesh=turned), FSDP, values).make() is None
    model = nn.Linear(3, 3)
    halves = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
    assert len({State(model=model, optim=half).make() for half in halves}) == 2


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
        fill(state, images_of(readers), rank, len(new))
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
        fill(stage(("2", "3"), zeros)[0], images_of(readers), 1, 2)


def test_a_stage_whose_image_is_gone_is_missed() -> None:
    """What only the lost rank had nobody knows, so the others' images are not a whole state."""
    readers = [saved(stage(layers, values)[0], rank, 2) for rank, layers in enumerate((("0", "1"), ("2", "3")))]
    held = Holders(world=2, ranks=(0,))
    with pytest.raises(CheckpointDamaged, match="do not cover"):
        fill(stage(("0", "1"), zeros)[0], Images(held, readers.__getitem__, whole=True), 0, 1)


def test_this_rank_may_stand_elsewhere_in_an_equal_mesh() -> None:
    """As in the next generation, while something still holds the mesh of the one before: what it holds is another."""

    class Mesh:
        """As much of one as is asked for; all are equal."""

        shape = (4,)

        def __init__(self, at: int) -> None:
            self._at = at

        def get_coordinate(self) -> list[int]:
            return [self._at]

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Mesh)

        def __hash__(self) -> int:
            return 0

    meshes = [Mesh(at) for at in (0, 3, 0, 2)]
    boxes = [box_here("t", (6, 2), cast(DeviceMesh, mesh), [Shard(0)]) for mesh in meshes]
    assert [(box.offset[0], box.shape[0]) for box in boxes] == [(0, 2), (6, 0), (0, 2), (4, 2)]
