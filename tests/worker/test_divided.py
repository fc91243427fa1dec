"""Checkpoints of alike ranks on several nodes: every byte is written once per job, and read from where it must be."""

from __future__ import annotations

import dataclasses
import queue
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
from torch import nn
from worlds import world as world_of

from resilient_train.errors import CheckpointDamaged, ReplicasDiffer
from resilient_train.keeper.persist import Job, persist
from resilient_train.keeper.persister import Outcome, Persister
from resilient_train.keeper.progress import Progress
from resilient_train.plan import division
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.commit import folder_of
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.tools.export import export
from resilient_train.tools.inspect import inspect
from resilient_train.tools.survey import COMMITTED, DIFFERED, survey
from resilient_train.tools.verify import verify
from resilient_train.worker.fill import fill
from resilient_train.worker.images import Images
from resilient_train.worker.state import State
from resilient_train.worker.stream import ElasticStream

KEY = Key(1, 1)
DDP: PLACED = {name: [R] for name in SHAPES}


@pytest.fixture(autouse=True)
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "LEAST", 64)
        yield


@contextmanager
def jobs(states: list[State], per_node: int, key: Key = KEY) -> Iterator[list[Job]]:
    """What the keepers of nodes with so many ranks each have to make durable."""
    slots = {rank: written(state, rank, len(states), alike=True, key=key) for rank, state in enumerate(states)}
    nodes = [list(slots)[at : at + per_node] for at in range(0, len(slots), per_node)]
    yield [
        Job(
            key=key,
            world=len(states),
            images={rank: slots[rank] for rank in ranks},
            origins=dict.fromkeys(ranks, f"node-{number}"),
            past={1: None},
            url="",
            keep_last=3,
            progress=Progress(key, 0),
        )
        for number, ranks in enumerate(nodes)
    ]
    for slot in slots.values():
        slot.close()


def save(tier: FilesystemTier, mesh: Mapping[str, int], placements: PLACED, per_node: int) -> None:
    states = [made(world_of(mesh, rank), placements, values) for rank in range(prod(mesh.values()))]
    with jobs(states, per_node) as all_of_them:
        done = [persist(tier, job).committed for job in all_of_them]
    assert read_manifest(tier, KEY).divided == division.LEAST
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
        with pytest.raises(
            ReplicasDiffer, match="ranks 0 and 2, on different nodes, hold different values in one or more of"
        ):
            persist(tier, other)
    with pytest.raises(CheckpointDamaged, match=r"manifest.json is missing|missing"):
        read_manifest(tier, KEY)


def only_one_owns(size: int) -> list[State]:
    """Replicas of which one has optimizer state that the others do not: an optimizer that shards its state."""
    states = [made(world_of({"data": size}, rank), DDP, values) for rank in range(size)]
    optim = states[1]._things["optim"]
    assert isinstance(optim, torch.optim.Optimizer)
    optim.state[optim.param_groups[0]["params"][0]]["further"] = torch.arange(3.0)
    return states


def test_ranks_that_only_seem_to_hold_alike_are_found_when_the_state_is_committed(tmp_path: Path) -> None:
    """Another name on another node: who writes what would not add up."""
    tier = FilesystemTier(str(tmp_path))
    with jobs(only_one_owns(2), 1) as (one, other):
        persist(tier, one)
        with pytest.raises(ReplicasDiffer, match="ranks 0 and 1, on different nodes, hold different names, shapes"):
            persist(tier, other)


def test_ranks_of_one_node_that_only_seem_to_hold_alike_divide_nothing(tmp_path: Path) -> None:
    """Everything that any of them has is there, once."""
    tier = FilesystemTier(str(tmp_path))
    with jobs(only_one_owns(2), 2) as (job,):
        assert persist(tier, job).committed
    assert read_manifest(tier, KEY).divided == 0
    assert elements(tier)["optim/model.embed/further"] == 3
    assert elements(tier)["model/up"] == prod(SHAPES["up"])


@pytest.mark.parametrize("gone", [[1], [1, 2]])
def test_a_keeper_that_stands_in_for_a_node_does_not_mix_replicas_that_differ(tmp_path: Path, gone: list[int]) -> None:
    """Where another keeper has to know it is refused; where this one has everything it writes one of them whole."""
    states = [made(world_of({"data": 3}, rank), DDP, values) for rank in range(3)]
    with torch.no_grad():
        states[1]._things["model"].up.to_local()[3, 3] += 1  # type: ignore[attr-defined]
    tier = FilesystemTier(str(tmp_path))
    with jobs(states, 1) as (one, *others):
        taken = {rank: slot for job in others for rank, slot in job.images.items() if rank in gone}
        origins = {0: "node-0", **{rank: f"node-{rank}" for rank in gone}}
        job = dataclasses.replace(one, images={**one.images, **taken}, origins=origins)
        if len(gone) == 1:
            with pytest.raises(ReplicasDiffer, match="on different nodes"):
                persist(tier, job)
            return
        assert persist(tier, job).committed
    assert read_manifest(tier, KEY).divided == 0
    restore(tier, {"data": 2}, DDP)


def test_a_buffer_comes_back_from_a_rank_of_the_same_node(tmp_path: Path) -> None:
    """Nodes whose buffers differ, with ranks on each that hold the same."""
    states = [made(world_of({"data": 4}, rank), DDP, values) for rank in range(4)]
    for rank in (2, 3):
        states[rank]._things["model"].mean += 1  # type: ignore[attr-defined]
    tier = FilesystemTier(str(tmp_path))
    with jobs(states, 2) as all_of_them:
        assert [persist(tier, job).committed for job in all_of_them] == [False, True]
    for rank in range(4):
        state = made(world_of({"data": 4}, rank), DDP, zeros)
        fill(state, Images.committed(tier, read_manifest(tier, KEY)), rank, 4)
        assert torch.equal(state._things["model"].mean, values("mean", (3,)) + (rank > 1))  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [4, 2, 1])
def test_a_stream_of_several_nodes_is_found_by_any_number_of_ranks(tmp_path: Path, size: int) -> None:
    """The places of all its shards, each of which one rank has written."""

    def streaming(rank: int, ranks: int) -> State:
        world = world_of({"data": ranks}, rank)
        stream = ElasticStream(lambda *_: [1], shards=12, micro_batches=12, world=world, seed=0, state_bytes=64)
        return State(model=nn.Linear(2, 2), stream=stream)

    torch.manual_seed(0)
    replica = streaming(0, 1)._things["model"].state_dict()
    saved = [streaming(rank, 4) for rank in range(4)]
    for state in saved:
        state._things["model"].load_state_dict(replica)
    tier = FilesystemTier(str(tmp_path))
    with jobs(saved, 2) as all_of_them:
        assert [persist(tier, job).committed for job in all_of_them] == [False, True]
    for rank in range(size):
        state = streaming(rank, size)
        fill(state, Images.committed(tier, read_manifest(tier, KEY)), rank, size)
        found = state._things["model"].state_dict()
        assert all(torch.equal(found[name], replica[name]) for name in replica)


def test_what_was_divided_by_another_measure_is_read_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions to come may divide more or less finely."""
    save(FilesystemTier(str(tmp_path)), {"data": 4}, DDP, 2)
    monkeypatch.setattr(division, "LEAST", 1000)
    restore(FilesystemTier(str(tmp_path)), {"data": 3}, DDP)


def test_where_replicas_differ_each_node_writes_all_of_it_from_then_on(tmp_path: Path) -> None:
    """Training goes on, so it is saved: the state over which it was found is given up, said, and removed."""
    states = [made(world_of({"data": 2}, rank), DDP, values) for rank in range(2)]
    with torch.no_grad():
        states[1]._things["model"].up.to_local()[3, 3] += 1  # type: ignore[attr-defined]
    outcomes: tuple[queue.SimpleQueue[Outcome], ...] = queue.SimpleQueue(), queue.SimpleQueue()
    keepers = [Persister(outcome.put) for outcome in outcomes]
    tier = FilesystemTier(str(tmp_path))
    for step in (1, 2):
        with jobs(states, 1, Key(1, step)) as nodes:
            for job, keeper in zip(nodes, keepers, strict=True):
                keeper.submit(dataclasses.replace(job, url=str(tmp_path)))
            for told in outcomes:
                while (last := told.get(timeout=60)).awaited:
                    pass
                assert last.error.partition("; ")[2] == (
                    "from now on every node writes all of what it holds" if step == 1 else ""
                )
                assert bool(last.error) == (step == 1), last.error
    assert listing(tier) == ([Key(1, 2)], [])
    assert [(one.state, one.note) for one in survey(tier)] == [(COMMITTED, DIFFERED)]
    assert not read_manifest(tier, Key(1, 2)).divided
    state = made(world_of({"data": 1}, 0), DDP, zeros)
    fill(state, Images.committed(tier, read_manifest(tier, Key(1, 2))), 0, 1)
    check(state, DDP)
    # Another generation has restored one of them everywhere.
    with jobs([states[0], states[0]], 1, Key(2, 3)) as nodes:
        for job, keeper in zip(nodes, keepers, strict=True):
            keeper.submit(dataclasses.replace(job, url=str(tmp_path)))
        for told in outcomes:
            while (last := told.get(timeout=60)).awaited:
                pass
            assert not last.error
    assert read_manifest(tier, Key(2, 3)).divided
    assert survey(tier)[-1].note == ""


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
        "table": shards["up"],
    }
    held = sum(part.entry.nbytes for part in made(world_of(mesh, 0), how, values).capture(0).parts)
    assert content.image == held
    export(tier, KEY, tmp_path / "out", part=None, limit=1 << 30, force=False, progress=lambda done, total: None)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, shape in SHAPES.items():
        assert np.array_equal(found[name].numpy(), values(name, shape).numpy())
