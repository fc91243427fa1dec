"""world.keep: what outlives a change of the world, and what cannot."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from worlds import world

from resilient_train.errors import ConfigError
from resilient_train.worker.world import World


def after(before: World) -> World:
    """The next world of the same process."""
    return replace(before, generation=before.generation + 1)


def test_a_plain_module_and_its_optimizer_are_the_same_after_a_change() -> None:
    """Without the gradients of the step that was broken off."""
    first = world({"data": 2}, 0)
    model = first.keep("model", lambda: nn.Linear(2, 2))
    optim = first.keep("optim", lambda: torch.optim.AdamW(model.parameters()))
    schedule = first.keep("schedule", lambda: torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1.0))
    model(torch.ones(1, 2)).sum().backward()
    assert first.keep("model", lambda: nn.Linear(2, 2)) is model
    assert model.weight.grad is not None, "in the same world nothing is touched"
    second = after(first)
    assert second.keep("model", lambda: nn.Linear(2, 2)) is model
    assert second.keep("optim", lambda: torch.optim.AdamW(model.parameters())) is optim
    assert second.keep("schedule", lambda: None) is schedule
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_sharded_is_made_anew() -> None:
    """Its parts are those of one world: modules, optimizers, what refers to these, and containers of them."""
    first = world({"shard": 2}, 0)

    def build() -> nn.Module:
        model = nn.Module()
        local = torch.zeros(2, 3)
        model.weight = nn.Parameter(DTensor.from_local(local, first.mesh, [Shard(0)], run_check=False))
        return model

    model = first.keep("model", build)
    optim = first.keep("optim", lambda: torch.optim.SGD(model.parameters(), lr=0.1))
    schedule = first.keep("schedule", lambda: torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1.0))
    both = first.keep("both", lambda: {"of it": [model]})
    second = after(first)
    for name, thing in (("model", model), ("optim", optim), ("schedule", schedule), ("both", both)):
        assert second.keep(name, lambda: "another") == "another", thing


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPED: dict[str, Callable[[], Any]] = {
    "ddp": lambda: nn.parallel.DistributedDataParallel(nn.Linear(2, 2)),
    "in a tuple": lambda: (nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), "and more"),
    "in a dict": lambda: {"model": [nn.parallel.DistributedDataParallel(nn.Linear(2, 2))]},
    "fsdp2": lambda: fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,))),
    "sync batch norm": lambda: nn.Sequential(nn.SyncBatchNorm(2, process_group=dist.group.WORLD)),
    "zero": lambda: ZeroRedundancyOptimizer(nn.Linear(2, 2).parameters(), torch.optim.SGD, lr=0.1),
    "a group": lambda: dist.group.WORLD,
    "what has a mesh": lambda: types.SimpleNamespace(mesh=init_device_mesh("cpu", (1,))),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_wraps_a_module_for_one_world_is_made_anew(alone: None, kind: str) -> None:
    """Wherever it stands, and in the middle of a step too, when FSDP's parameters look like any others."""
    first = world({"data": 1}, 0)
    thing = first.keep("it", WRAPPED[kind])
    if kind == "fsdp2":
        thing(torch.ones(1, 2))
        assert not any(isinstance(parameter, DTensor) for parameter in thing.parameters())
    assert after(first).keep("it", lambda: "another") == "another"


def test_anything_else_is_kept_as_it_is() -> None:
    """Data sets, tokenizers, numbers; each under its name."""
    first = world({"data": 2}, 0)
    data = first.keep("data", lambda: object())
    assert first.keep("other", lambda: None) is None
    assert after(first).keep("data", lambda: object()) is data
    assert after(after(first)).keep("other", lambda: 1) is None


def test_all_that_was_sharded_goes_before_anything_is_made_anew() -> None:
    """There may be no memory for both; what is not asked for again goes too."""
    first = world({"shard": 2}, 0)

    def build() -> DTensor:
        return DTensor.from_local(torch.zeros(2, 3), first.mesh, [Shard(0)], run_check=False)

    held = [weakref.ref(first.keep(name, build)) for name in ("model", "optim")]
    assert all(ref() is not None for ref in held)
    assert after(first).keep("model", lambda: [ref() for ref in held]) == [None, None]


def test_a_factory_that_fails_leaves_nothing_behind() -> None:
    """It is called again."""
    first = world({"data": 2}, 0)
    with pytest.raises(ZeroDivisionError):
        first.keep("it", lambda: 1 // 0)
    assert first.keep("it", lambda: 1) == 1


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_needed(name: object) -> None:
    """By which it is found again."""
    with pytest.raises(ConfigError, match="needs a name"):
        world({"data": 1}, 0).keep(name, lambda: 1)  # type: ignore[arg-type]
