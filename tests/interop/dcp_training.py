"""A small training with a bit of everything, alone or with FSDP2, and what its ranks do in these tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import resilient_train as rt
from resilient_train.interop import dcp as rt_dcp
from resilient_train.launch import rtctl
from resilient_train.storage.filesystem import open_tier
from resilient_train.worker.fill import fill
from resilient_train.worker.sources import TierSource

# DCP says that it works without a process group, and that planners are asked to keep typed storages.
warnings.filterwarnings("ignore", module="torch.*")


class Net(nn.Module):
    """Tied weights, bfloat16, fewer rows than ranks, buffers without dimensions, an empty buffer, an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.wide = nn.Linear(6, 5, dtype=torch.bfloat16)
        self.one = nn.Linear(5, 1, bias=False)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("empty", torch.empty(0, 3))
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.norm(self.embed(tokens))
        return self.head(x).square().mean() + self.one(self.wide(x.bfloat16()).float()).square().mean()

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "pair": (1, 2.5)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["pair"] == (1, 2.5)
        self.calls = state["calls"]


def made(seed: int) -> tuple[Net, torch.optim.Optimizer]:
    """A model, sharded where there are ranks, and an optimizer with two groups."""
    torch.manual_seed(seed)
    model = Net()
    if dist.is_initialized():
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.wide, mesh=mesh)
        fully_shard(model, mesh=mesh)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "lr": 0.02}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: Net, optim: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps ``first`` to ``last - 1``, the same batch on every rank."""
    for step in range(first, last):
        tokens = torch.randint(0, 7, (8,), generator=torch.Generator().manual_seed(step))
        model(tokens).backward()
        optim.step()
        optim.zero_grad()


def staged(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers, which a pipeline would give to two ranks, and an optimizer that has stepped."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    optim = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    model(torch.ones(2, 3)).sum().backward()
    optim.step()
    return model, optim


def state_of(model: Net, optim: torch.optim.Optimizer, *, joined: bool = False) -> dict[str, Any]:
    """The state dict as DCP's users have it."""
    options = StateDictOptions(flatten_optimizer_state_dict=joined)
    return {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optim, options=options)}


def whole(tree: Any) -> Any:
    """A state dict with whole tensors of its own."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value) for value in tree)
    return (tree.full_tensor() if isinstance(tree, DTensor) else tree).clone() if torch.is_tensor(tree) else tree


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Two state dicts have the same bits, dtypes and types."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    elif torch.is_tensor(one):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert (
            one.contiguous().view(-1).view(torch.uint8).tolist()
            == other.contiguous().view(-1).view(torch.uint8).tolist()
        ), path
    else:
        assert one == other, path


def loaded(url: Path, step: int | None = None, *, joined: bool = False) -> dict[str, Any]:
    """Whole tensors of what `rt_dcp.Reader` puts into a fresh model and optimizer."""
    model, optim = made(99)
    state = state_of(model, optim, joined=joined)
    dcp.load(state, storage_reader=rt_dcp.Reader(url, step=step))
    return whole(state)


def keep(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write down what the next world is to find."""
    if dist.get_rank() == 0:
        torch.save(state, folder / name)


def restored(url: Path, step: int) -> tuple[Net, torch.optim.Optimizer, rt.Checkpointer]:
    """A fresh model and optimizer that `rt.Checkpointer` filled with the newest state, which is that of ``step``."""
    model, optim = made(98)
    ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), str(url))
    assert ckpt.restore() == step
    return model, optim, ckpt


def filled(url: Path, **things: Any) -> None:
    """What `rt.Checkpointer` does to restore the newest checkpoint at a place, without a keeper."""
    source = TierSource(open_tier(str(url)))
    with source.open(source.candidates({})[0]) as images:
        fill(rt.State(**things), images, 0, 1)


# ---- what ranks do ---------------------------------------------------------------------------------------------------


def save_and_go_on(folder: Path) -> None:
    """dcp.save, then on by rt.Checkpointer to the same bits; that by dcp.load; DCP's own through ``rtctl import``."""
    url, plain, imported = folder / "run", folder / "plain-2", folder / "imported"
    model, optim = made(0)
    train(model, optim, 0, 2)
    saved = whole(state_of(model, optim))
    dcp.save(state_of(model, optim), storage_writer=rt_dcp.Writer(url, step=2))
    dcp.save(state_of(model, optim), storage_writer=dcp.FileSystemWriter(plain))
    train(model, optim, 2, 4)
    expected = whole(state_of(model, optim))
    keep(folder, "saved", saved)
    keep(folder, "expected", expected)

    other, its, ckpt = restored(url, 2)
    assert_same(whole(state_of(other, its)), saved)
    train(other, its, 2, 4)
    assert_same(whole(state_of(other, its)), expected)
    assert ckpt.snapshot(4)
    ckpt.persist()
    ckpt.wait()
    ckpt.close()
    dist.barrier()
    assert_same(loaded(url), expected)

    if dist.get_rank() == 0:
        assert rtctl.run(["import", str(plain), "--to", str(imported)]) == 0
    dist.barrier()
    other, its, ckpt = restored(imported, 2)
    train(other, its, 2, 4)
    assert_same(whole(state_of(other, its)), expected)
    ckpt.close()


def load_both(folder: Path) -> None:
    """What the two ranks left is read by this world, in both forms of optimizer states."""
    assert_same(loaded(folder / "run", 2), torch.load(folder / "saved"))
    assert_same(loaded(folder / "run", 4), torch.load(folder / "expected"))
    assert_same(loaded(folder / "imported"), torch.load(folder / "saved"))


class Failing(DefaultSavePlanner):
    """A planner whose second rank cannot give its data."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError("the device is gone")
        return super().resolve_data(write_item)


def refused(save: Any) -> str:
    """What DCP raises."""
    try:
        save()
    except CheckpointException as error:
        return str(error)
    raise AssertionError("nothing was raised")


def fail_and_save(folder: Path) -> None:
    """A rank that fails; steps that differ; keys of a rank's own; a save in the background."""
    url = folder / "run"
    rank = dist.get_rank()
    model, optim = made(0)
    train(model, optim, 0, 2)
    state = state_of(model, optim)
    failing = rt_dcp.Writer(url, step=1)
    assert "the device is gone" in refused(lambda: dcp.save(state, storage_writer=failing, planner=Failing()))
    differing = rt_dcp.Writer(url, step=1 + rank)
    assert "different steps: 1, 2" in refused(lambda: dcp.save(state, storage_writer=differing))
    dist.barrier()
    assert not list(url.glob("*/manifest.json"))

    layers, its = staged(0)
    part = state_of(layers, its, joined=True)  # type: ignore[arg-type]
    layer = {"model": f"{rank}.", "optim": f".{rank}."}
    kept = {name: {k: v for k, v in one.items() if layer[name] in k} for name, one in part.items()}
    dcp.save(kept, storage_writer=rt_dcp.Writer(folder / "pipeline", step=1))

    mine = {f"stage{rank}": {"weight": torch.full((3,), float(rank)), "options": {"rank": rank, "pair": (rank, 1)}}}
    dcp.save(mine, storage_writer=rt_dcp.Writer(folder / "stages", step=1))

    expected = whole(state)
    # The training goes on with collectives of its own meanwhile.
    group = dist.new_group(backend="gloo")
    future = dcp.async_save(state, storage_writer=rt_dcp.Writer(url, step=2), process_group=group)
    train(model, optim, 2, 3)
    future.result()
    assert_same(loaded(url), expected)
