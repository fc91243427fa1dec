"""Two ways to feed an elastic training from loaders with worker processes: data with an index, and streams.

    rtrun --nproc-per-node=3 examples/train_loaders.py

Kill any of its processes while it runs (``kill -9``): no sample is lost, none is used twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset

import resilient_train as rt


class Points(Dataset):
    """Samples with an index: each a point of four numbers."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


class Log(IterableDataset):
    """A stream that knows how far it has been read. ``torchdata.StatefulDataLoader`` keeps this right for workers."""

    def __init__(self, shard: int, epoch: int) -> None:
        self.shard, self.epoch, self.at = shard, epoch, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 100:
            self.at += 1
            yield torch.full((8, 4), float(self.shard))  # a batch

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@rt.elastic
def train(world: rt.World) -> None:
    model = DistributedDataParallel(nn.Linear(4, 1).to(world.device))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = rt.ElasticSampler(len(Points()), global_batch=64, micro_batch=8, world=world, seed=0)
    stream = rt.ElasticStream(Log, shards=12, micro_batches=6, world=world, seed=0)  # Log(shard, epoch) opens a shard

    ckpt = rt.Checkpointer(rt.State(model=model, optim=optim, stream=stream), world=world)
    batches: Iterator[torch.Tensor] | None = None
    for step in ckpt.steps(200):
        if batches is None:  # the worker processes load ahead from the step that was restored
            batches = iter(DataLoader(Points(), batch_sampler=data.batches_from(step), num_workers=2))
        for micro, batch in zip(data.micro_batches(step), batches, strict=False):  # in this order: `batches` has no end
            (model(batch.to(world.device)).square().mean() * micro.weight).backward()
        for micro in stream.micro_batches(step):
            (model(micro.batch.to(world.device)).square().mean() * micro.weight).backward()
        optim.step()
        optim.zero_grad()
        if world.rank == 0:
            print(f"step {step} on {world.size} ranks", flush=True)


if __name__ == "__main__":
    train()
