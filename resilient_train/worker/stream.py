"""``ElasticStream``: data that can only be read one after the other, exactly once, whatever the world does.

The stream is cut into a fixed number of shards, each with a loader of its own, and every shard is read by one data rank
at a time (`plan.lanes`).  What is saved is a tensor with one row of bytes for every shard, sharded over the ranks as
they share the shards.  So a shard's place is in the image of the rank that reads it, and a restore on any number of
ranks puts the rows together as it does for any other tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from resilient_train.errors import ConfigError, StateMismatch
from resilient_train.plan.batch import mix
from resilient_train.plan.lanes import count_lanes, turns
from resilient_train.worker.rng import seed_generators
from resilient_train.worker.shard_reader import OpenShard, Place, ShardReader, decode_place, encode_place, shard_of
from resilient_train.worker.tensors import box_here
from resilient_train.worker.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamBatch:
    """One forward and backward of this rank."""

    batch: Any
    """What the shard's loader gave. A filler repeats a batch."""
    shard: int
    """The shard that it comes from; -1 for a filler."""
    weight: float
    """Factor for its mean loss, such that gradients summed over passes and averaged over ranks are the mean over all
    micro-batches of the step; 0 for a filler."""
    last: bool
    """Whether gradients are to be synchronised after this pass (``no_sync`` before)."""


class ElasticStream:
    """Deals the shards of a stream to the ranks there are, and is a part of the state.

    A step takes a fixed number of micro-batches, in turns from all shards; which ones they are depends on their number
    only. Each batch of each shard is used once an epoch of the shard, and a shard that ends begins its next epoch,
    whatever the others do. A shard that moves to another rank goes on where it stood in the state that was restored:
    by its loader's own ``load_state_dict`` if it has one, else by reading again what had been delivered.

    Args:
        open_shard: ``open_shard(shard, epoch)`` returns an iterable of batches, each of one micro-batch: a
            ``torchdata.StatefulDataLoader``, anything with ``state_dict`` and ``load_state_dict`` of tensors and JSON
            values, or, without these, anything that gives the same batches when it is opened again. Called when the
            first batch of the shard is needed here, with torch's generators seeded by ``seed``, shard and epoch.
        shards: number of shards, 0 to ``shards - 1``; it stays the same for as long as the training lasts.
        micro_batches: micro-batches per step, over all ranks. It divides ``shards``, or ``shards`` divides it. At most
            ``min(shards, micro_batches)`` data ranks have work.
        world: who takes part.
        seed: seeds the generators of every unit of work.
        state_bytes: most bytes that the place of one shard takes in the state.

    Raises:
        ConfigError: for malformed arguments.

    Example::

        def open_shard(shard: int, epoch: int):
            return StatefulDataLoader(Documents(files[shard]), batch_size=8, drop_last=True)

        stream = rt.ElasticStream(open_shard, shards=64, micro_batches=16, world=world, seed=0)
        ckpt = rt.Checkpointer(rt.State(model=model, optim=optim, stream=stream), world=world)
        for step in ckpt.steps(10_000):
            for micro in stream.micro_batches(step):
                (model(micro.batch).mean() * micro.weight).backward()
    """

    def __init__(
        self,
        open_shard: OpenShard,
        *,
        shards: int,
        micro_batches: int,
        world: World,
        seed: int,
        state_bytes: int = 16384,
    ) -> None:
        if not callable(open_shard):
            raise ConfigError(f"open_shard must be a function of shard and epoch, it is {open_shard!r}")
        if not isinstance(world, World):
            raise ConfigError(f"world must be the World that the elastic function got, it is {world!r}")
        numbers = {"shards": shards, "micro_batches": micro_batches, "seed": seed, "state_bytes": state_bytes}
        for name, value in numbers.items():
            if not isinstance(value, int) or (name != "seed" and value < 1):
                raise ConfigError(f"{name} must be a whole number and at least 1, it is {value!r}")
        try:
            self._lanes = count_lanes(shards, micro_batches)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._open_shard = open_shard
        self._shards, self._units = shards, micro_batches
        self._world = world
        self._seed = seed
        self._placements = [Shard(0) if dim in world.data_dims else Replicate() for dim in range(world.mesh.ndim)]
        mine = box_here("the stream's places", (self._lanes,), world.mesh, self._placements)
        self._first, self._count = mine.offset[0], mine.shape[0]
        self._rows = torch.zeros(self._count, shards // self._lanes, state_bytes, dtype=torch.uint8)
        self._latest: Any = None
        self._begin({})

    def _begin(self, places: dict[int, Place]) -> None:
        """Read on from these places; shards that are not named begin."""
        self._readers = {}
        for lane in range(self._first, self._first + self._count):
            for shard in range(lane, self._shards, self._lanes):
                place = places.get(shard, Place())
                reader = ShardReader(self._open_shard, shard, place, self._seed, self._world.device)
                self._readers[shard] = reader
        self._read_since = set(self._readers)
        """The shards whose rows are to be written anew."""

    def micro_batches(self, step: int) -> Iterator[StreamBatch]:
        """This rank's share of step ``step``; equally many micro-batches on every rank.

        Reads on: asked twice for one step, it gives other batches. Before each one is given out, torch's generators
        are seeded from (seed, step, unit).
        """
        if not isinstance(step, int) or step < 0:
            raise ConfigError(f"micro_batches() needs the number of a step, it got {step!r}")
        for turn in turns(
            step,
            shards=self._shards,
            units=self._units,
            first=self._first,
            count=self._count,
            ranks=self._world.data_size,
        ):
            batch = self._next(turn.shard) if turn.unit >= 0 else self._filler()
            unit = turn.unit if turn.unit >= 0 else -1 - self._world.data_rank
            seed_generators(mix(self._seed, step, unit), self._world.device)
            yield StreamBatch(batch=batch, shard=turn.shard, weight=turn.weight, last=turn.last)

    def _next(self, shard: int) -> Any:
        self._read_since.add(shard)
        self._latest = self._readers[shard].next()
        return self._latest

    def _filler(self) -> Any:
        """A batch that has been used before, or, on a rank without shards, one of which nobody takes note."""
        if self._latest is None:
            self._latest = ShardReader(self._open_shard, 0, Place(), self._seed, self._world.device).next()
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """The places of all shards: uint8, shape [lanes, shards of a lane, ``state_bytes``], sharded by lanes.

        Raises:
            UnsupportedState: naming the shard whose loader has a state that cannot be saved.
        """
        for shard in sorted(self._read_since):
            row = self._rows[shard % self._lanes - self._first, shard // self._lanes]
            encode_place(shard, self._readers[shard].place(), row)
        self._read_since.clear()
        shape = torch.Size((self._lanes, *self._rows.shape[1:]))
        places = DTensor.from_local(
            self._rows.clone(),
            self._world.mesh,
            self._placements,
            run_check=False,
            shape=shape,
            stride=(shape[1] * shape[2], shape[2], 1),
        )
        return {"places": places}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these places.

        Args:
            state_dict: ``places``, whole, as `state_dict` shapes them, on any number of lanes.

        Raises:
            StateMismatch: if they are of another number of shards.
        """
        rows = state_dict["places"].cpu().flatten(0, 1)
        told = {shard_of(row): row for row in rows}
        if sorted(told) != list(range(self._shards)):
            raise StateMismatch(f"the checkpoint's stream has {len(told)} shards, this one has {self._shards}")
        self._latest = None
        self._begin({shard: decode_place(told[shard]) for shard in self._readers})
