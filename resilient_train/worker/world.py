"""The world as a training function sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from resilient_train.errors import ConfigError
from resilient_train.worker.keepsakes import Keepsakes
from resilient_train.worker.operations import LongOperations, check

_T = TypeVar("_T")

DATA_DIMS = frozenset(
    {"data", "dp", "replicate", "dp_replicate", "ddp", "shard", "dp_shard", "fsdp", "hsdp", "dp_cp", "batch"}
)
"""Mesh dimensions along which ranks have samples of their own."""
MODEL_DIMS = frozenset(
    {"tensor", "tp", "model", "mp", "pipeline", "pp", "stage", "context", "cp", "sequence", "sp", "expert", "ep"}
)
"""Mesh dimensions along which ranks share their samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who takes part in this generation; a new object for every generation."""

    rank: int
    """This process's rank, 0 to ``size - 1``."""
    size: int
    """Number of ranks."""
    local_rank: int
    """This process's place among the ranks of its node, 0 to ``local_size - 1``."""
    local_size: int
    """Number of ranks on this node."""
    generation: int
    """Number of this world; grows with every change."""
    device: torch.device
    """Where this rank computes; it stays the same while the process lives."""
    mesh: DeviceMesh
    """All ranks, in the dimensions that ``elastic(mesh=...)`` names."""
    reason: str
    """Why this generation began."""
    _operations: LongOperations | None = field(default=None, repr=False, compare=False)
    """Where long operations are announced; nowhere without an agent."""

    _keepsakes: Keepsakes = field(default_factory=Keepsakes, repr=False, compare=False)
    """What this process has kept from one generation to the next; nothing without an agent."""

    def keep(self, name: str, factory: Callable[[], _T]) -> _T:
        """What ``factory`` made under this name, when the function is entered again after a change of the world.

        It is made anew if the change touches it: if it holds DTensors, modules of FSDP, a `DistributedDataParallel`, or
        a process group, which belong to the ranks of one world.  A plain module and its optimizer are the same as
        before, with all that was spent on them (loading, compiling, moving to the device); wrap the module anew each
        time.  Gradients are dropped; tensors are as the step that was broken off has left them, until the
        `Checkpointer` restores them in place.

        Only some of the ranks may call ``factory``: it must not communicate.  Modules, optimizers, schedulers, lists,
        tuples and dicts of these are looked into; anything else is kept as it is.

        Args:
            name: one for each object.
            factory: makes it.

        Raises:
            ConfigError: without a name.

        Example::

            model = world.keep("model", build)
            optim = world.keep("optim", lambda: torch.optim.AdamW(model.parameters()))
            ddp = DistributedDataParallel(model)
        """
        return self._keepsakes.keep(name, factory, self.generation)

    def long_operation(self, name: str, seconds: float | None = None) -> AbstractContextManager[None]:
        """Announce that this rank is going to be away for long, so that nobody takes it for hanging.

        Compiling, evaluating or writing something on one rank while the others wait for it is no hang.  May be nested.
        Where there is no agent nothing happens.

        Args:
            name: what it is, for people.
            seconds: what it may take at most; None for any time.

        Raises:
            ConfigError: for an empty name, or a bound that is not a positive number.

        Example::

            with world.long_operation("evaluate"):
                evaluate(model)
        """
        check(name, seconds)
        return nullcontext() if self._operations is None else self._operations.announce(name, seconds)

    @property
    def data_size(self) -> int:
        """Number of ranks with samples of their own: the product of the mesh's data dimensions."""
        return prod(self.mesh.size(dim) for dim in self.data_dims)

    @property
    def data_rank(self) -> int:
        """This rank's place among them."""
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None, "who is not in the mesh gets no World"
        rank = 0
        for dim in self.data_dims:
            rank = rank * self.mesh.size(dim) + coordinate[dim]
        return rank

    @property
    def data_dims(self) -> list[int]:
        """The mesh's data dimensions, by number: those along which ranks have samples of their own."""
        names = self.mesh.mesh_dim_names or ()
        return [dim for dim, name in enumerate(names) if name not in MODEL_DIMS]


def check_mesh(mesh: Mapping[str, int]) -> int:
    """The number that the world size must be a multiple of.

    Raises:
        ConfigError: unless there is at most one -1, all other sizes are positive, and every name is one of
            `DATA_DIMS` or `MODEL_DIMS`, which say how samples are dealt out.
    """
    unknown = mesh.keys() - DATA_DIMS - MODEL_DIMS
    if unknown:
        raise ConfigError(
            f"mesh dimension {', '.join(sorted(unknown))}: the name must say whether ranks have samples of their own"
            f" ({', '.join(sorted(DATA_DIMS))}) or share them ({', '.join(sorted(MODEL_DIMS))})"
        )
    elastic = [name for name, n in mesh.items() if n == -1]
    if len(elastic) > 1 or any(n < 1 and n != -1 for n in mesh.values()) or not mesh:
        raise ConfigError(f"a mesh has at most one elastic dimension (-1) and positive sizes, got {dict(mesh)}")
    return prod(n for n in mesh.values() if n != -1)


def mesh_shape(mesh: Mapping[str, int], size: int) -> tuple[int, ...]:
    """The mesh's shape in a world of ``size`` ranks.

    Raises:
        ConfigError: if it does not fit.
    """
    fixed = check_mesh(mesh)
    shape = tuple(size // fixed if n == -1 else n for n in mesh.values())
    if prod(shape) != size:
        raise ConfigError(f"the mesh {dict(mesh)} does not fit {size} ranks")
    return shape
