"""Checkpoints of alike ranks on several nodes: every byte is written once per job, and read from where it must be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placed import FSDP, PLACED, SHAPES, TP_FSDP, R, check, made, meshes, values, zeros
from safetensors.torch import load_file
from test_state import written
from worlds import world as world_of

from resilient_train.errors import CheckpointDamaged, UnsupportedState
from resilient_train.keeper.persist import Job, persist
from resilient_train.keeper.progress import Progress
from resilient_train.plan import division
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import read_manifest
from resilient_train.storage.commit import folder_of
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.tools.export import export
from resilient_train.tools.inspect import inspect
from resilient_train.tools.verify import verify
from resilient_train.worker.fill import fill
from resilient_train.worker.images import Images
from resilient_train.worker.state import State

KEY = Key(1, 1)
DDP: PLACED = {name: [R] for name in SHAPES}


@pytest.fixture(autouse=True)
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "LEAST", 64)
        yield


@contextmanager
def jobs(states: list[State], per_node: int) -> Iterator[list[Job]]:
    """What the keepers of nodes with so many ranks each have to make durable."""
    slots = {rank: written(state, rank, len(states), alike=True) for rank, state in enumerate(states)}
    nodes = [list(slots)[at : at + per_node] for at in range(0, len(slots), per_node)]
    yield [
        Job(
            key=KEY,
            world=len(states),
            images={rank: slots[rank] for rank in ranks},
            origins=dict.fromkeys(ranks, f"node-{number}"),
            past={1: None},
            url="",
            keep_last=3,
            progress=Progress(KEY, 0),
        )
        for number, ranks in enumerate(nodes)
    ]
    for slot in slots.values():
        slot.close()


def save(tier: FilesystemTier, mesh: Mapping[str, int], placements: PLACED, per_node: int) -> None:
    states = [made(world_of(mesh, rank), placements, values) for rank in range(prod(mesh.values()))]
    with jobs(states, per_node) as all_of_them:
        done = [persist(tier, job).committed for job in all_of_them]
    assert done == [False] * (len(done) - 1) + [True]


def restore(tier: FilesystemTier, mesh: Mapping[str, int], placements: PLACED) -> None:
    """Every rank for itself."""
    manifest = read_manifest(tier, KEY)
    for rank in range(prod(mesh.values())):
        state = made(world_of(mesh, rank), placements, zeros)
        fill(state, Images.committed(tier, manifest), rank, prod(mesh.values()))
        check(state, placements)


def elements(tier: FilesystemTier) -> dict[str, int]:
    """How many elements of every tensor were written, over all files."""
    counts: dict[str, int] = {}
    for file in Path(tier.name, folder_of(KEY)).glob("*.safetensors"):
        for stored, tensor in load_file(file).items():
            name = stored.partition("@")[0]
            counts[name] = counts.get(name, 0) + tensor.numel()
    return counts


@settings(max_examples=20, deadline=None)
@given(meshes(), meshes(), st.integers(1, 3))
def test_any_mesh_on_any_nodes_restores_what_any_other_saved(
    old: tuple[dict[str, int], PLACED], new: tuple[dict[str, int], PLACED], per_node: int
) -> None:
    """Each element of a parameter is in one file, however many ranks and nodes held it."""
    with tempfile.TemporaryDirectory() as folder:
        tier = FilesystemTier(folder)
        save(tier, *old, per_node)
        assert read_manifest(tier, KEY).divided
        counts = elements(tier)
        assert {name: counts[f"model/{name}"] for name in SHAPES} == {name: prod(s) for name, s in SHAPES.items()}
        restore(tier, *new)
        restore(tier, *old)


def test_of_many_images_only_those_are_opened_that_something_is_taken_from(tmp_path: Path) -> None:
    """A rank of 12 that comes back as itself opens its own, and the first, which tells of all."""
    mesh = {"data": 12}
    tier = FilesystemTier(str(tmp_path))
    save(tier, mesh, FSDP, 4)
    opened: list[str] = []

    class Counted(FilesystemTier):
        def size(self, path: str) -> int:
            opened.append(Path(path).name)
            return super().size(path)

    state = made(world_of(mesh, 7), FSDP, zeros)
    fill(state, Images.committed(Counted(str(tmp_path)), read_manifest(tier, KEY)), 7, 12)
    check(state, FSDP)
    assert {"rank-00000-of-00012.safetensors", "rank-00007-of-00012.safetensors"} <= set(opened)
    # What all ranks hold in full (scales, counters) was divided among a few of them.
    assert len(opened) == len(set(opened)) <= 6


def test_a_node_that_computes_wrongly_is_found_when_the_state_is_committed(tmp_path: Path) -> None:
    """One bit of a replica on another node: nothing that mixes the two becomes durable."""
    states = [made(world_of({"data": 4}, rank), DDP, values) for rank in range(4)]
    for rank in (2, 3):
        with torch.no_grad():
            states[rank]._things["model"].up.to_local()[3, 3] += 1  # type: ignore[attr-defined]
    tier = FilesystemTier(str(tmp_path))
    with jobs(states, 2) as (one, other):
        assert not persist(tier, one).committed
        with pytest.raises(UnsupportedState, match="ranks 0 and 2, on different nodes, hold different model/down or"):
            persist(tier, other)
    with pytest.raises(CheckpointDamaged, match=r"manifest.json is missing|missing"):
        read_manifest(tier, KEY)


def test_ranks_that_only_seem_to_hold_alike_are_found_when_the_state_is_committed(tmp_path: Path) -> None:
    """Another name on another node: who writes what would not add up."""
    states = [made(world_of({"data": 2}, rank), DDP, values) for rank in range(2)]
    optim = states[1]._things["optim"]
    assert isinstance(optim, torch.optim.Optimizer)
    optim.state[optim.param_groups[0]["params"][0]]["further"] = torch.ones(3)
    tier = FilesystemTier(str(tmp_path))
    with jobs(states, 1) as (one, other):
        persist(tier, one)
        with pytest.raises(UnsupportedState, match="ranks 0 and 1, on different nodes, hold different names, shapes"):
            persist(tier, other)


@pytest.mark.parametrize(("mesh", "how"), [({"data": 4}, DDP), ({"data": 2, "tensor": 2}, TP_FSDP)])
def test_tools_read_what_was_divided(tmp_path: Path, mesh: dict[str, int], how: PLACED) -> None:
    """`rtctl verify` finds it whole, `inspect` tells how ranks held it, `export` puts it together."""
    tier = FilesystemTier(str(tmp_path / "run"))
    save(tier, mesh, how, 2)
    assert not verify(tier, KEY, progress=lambda done, total: None).damage
    content = inspect(tier, KEY)
    shards = {
        name: prod(mesh[dim] for dim, one in zip(mesh, how[name], strict=True) if one is not R) for name in SHAPES
    }
    assert {line.name.removeprefix("model/"): line.shards for line in content.tensors if "model/" in line.name} == {
        **shards,
        "mean": 1,
    }
    held = sum(part.entry.nbytes for part in made(world_of(mesh, 0), how, values).capture(0).parts)
    assert content.image == held
    export(tier, KEY, tmp_path / "out", part=None, limit=1 << 30, force=False, progress=lambda done, total: None)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, shape in SHAPES.items():
        assert np.array_equal(found[name].numpy(), values(name, shape).numpy())
