"""Objects that outlive a change of the world, in the processes that do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from resilient_train.errors import ConfigError

_T = TypeVar("_T")
_WRAPPERS = (nn.parallel.DistributedDataParallel, FSDPModule, FullyShardedDataParallel)
"""Between a forward and the end of its backward the parameters of such a module may look like anybody's."""


class Keepsakes:
    """What `World.keep` has made in this process."""

    def __init__(self) -> None:
        self._things: dict[str, Any] = {}
        self._generation = 0

    def keep(self, name: str, factory: Callable[[], _T], generation: int) -> _T:
        """See `World.keep`."""
        if not isinstance(name, str) or not name:
            raise ConfigError(f"keep() needs a name, it got {name!r:.50}")
        if generation != self._generation:
            self._generation = generation
            # All of it before anything is made anew, so that there is memory for it.
            self._things = {name: thing for name, thing in self._things.items() if not is_laid_out(thing)}
            for thing in self._things.values():
                _drop_gradients(thing)
        if name not in self._things:
            self._things[name] = factory()
        return self._things[name]  # type: ignore[no-any-return]


def is_laid_out(thing: Any) -> bool:
    """Whether anything in it belongs to one world: tensors that are sharded over its ranks, modules that wrap others
    for them, its process groups and meshes."""
    match thing:
        case ProcessGroup() | DeviceMesh():
            return True
        case nn.Module() if any(isinstance(module, _WRAPPERS) or _refers(module) for module in thing.modules()):
            return True
        case Mapping():
            return any(map(is_laid_out, thing.values()))
        case list() | tuple():
            return any(map(is_laid_out, thing))
    optimizer = getattr(thing, "optimizer", None)
    wraps = isinstance(optimizer, torch.optim.Optimizer) and is_laid_out(optimizer)
    return wraps or _refers(thing) or any(isinstance(tensor, DTensor) for tensor in _tensors(thing))


def _refers(thing: Any) -> bool:
    """Whether it holds a process group, or a mesh of ranks, itself."""
    return any(isinstance(value, (ProcessGroup, DeviceMesh)) for value in getattr(thing, "__dict__", {}).values())


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    """The tensors of modules, of optimizers, of what refers to an optimizer, and of containers of these."""
    match thing:
        case torch.Tensor():
            yield thing
        case nn.Module():
            yield from thing.parameters()
            yield from thing.buffers()
        case torch.optim.Optimizer():
            yield from _tensors([group["params"] for group in thing.param_groups])
            yield from _tensors(list(thing.state.values()))
        case Mapping():
            yield from _tensors(list(thing.values()))
        case list() | tuple():
            for part in thing:
                yield from _tensors(part)
        case _ if isinstance(optimizer := getattr(thing, "optimizer", None), torch.optim.Optimizer):
            yield from _tensors(optimizer)


def _drop_gradients(thing: Any) -> None:
    """What the step that was broken off has left would be added to the next one's."""
    for tensor in _tensors(thing):
        if tensor.is_leaf:
            tensor.grad = None
