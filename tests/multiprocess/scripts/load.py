"""A small training whose data comes from loaders with worker processes, and that writes down every sample it uses.

Every rank appends one JSON line per finished step to RECORD/<pid>.jsonl.  A sample's number is the value of its
features, so what is written down is what was loaded, whatever was asked for.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import resilient_train as rt

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--step-time", type=float, default=0.05)
parser.add_argument("--load-time", type=float, default=0.002, help="seconds that loading a sample takes")
parser.add_argument("--record", type=Path)
args = parser.parse_args()


class Numbers(Dataset):
    """501 samples, each its own number four times."""

    def __len__(self):
        return 501

    def __getitem__(self, index):
        time.sleep(args.load_time)
        return torch.full((4,), float(index))


class Shard(IterableDataset):
    """A stream of 40 samples, numbered 1000 * shard + 100000 * epoch onwards, that knows how far it has been read."""

    def __init__(self, shard, epoch):
        self.first = 1000 * shard + 100000 * epoch
        self.at = 0

    def __iter__(self):
        while self.at < 40:
            time.sleep(args.load_time)
            self.at += 1
            yield torch.full((4,), float(self.first + self.at - 1))
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def open_shard(shard, epoch):
    return StatefulDataLoader(Shard(shard, epoch), batch_size=4, num_workers=1)


@rt.elastic
def train(world):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 1))
    optim = torch.optim.SGD(model.parameters(), lr=1e-12)
    data = rt.ElasticSampler(501, global_batch=24, micro_batch=4, world=world, seed=0)
    stream = rt.ElasticStream(open_shard, shards=6, micro_batches=6, world=world, seed=0)
    ckpt = rt.Checkpointer(rt.State(model=model, optim=optim, stream=stream), world=world)
    batches = None
    for step in ckpt.steps(args.steps):
        if batches is None:
            indices = data.batches_from(step)
            batches = iter(DataLoader(Numbers(), batch_sampler=indices, num_workers=2, prefetch_factor=4))
        used, streamed = [], []
        for micro, batch in zip(data.micro_batches(step), batches, strict=False):
            (model(batch).mean() * micro.weight).backward()
            used += [int(number) for number in batch[:, 0]] if micro.weight else []
        for micro in stream.micro_batches(step):
            (model(micro.batch).mean() * micro.weight).backward()
            streamed += [int(number) for number in micro.batch[:, 0]] if micro.weight else []
        optim.step()
        optim.zero_grad()
        if not (args.record / "hurry").exists():
            time.sleep(args.step_time)
        line = {"generation": world.generation, "rank": world.rank, "size": world.size, "step": step}
        line |= {"used": used, "streamed": streamed}
        with (args.record / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if world.rank == 0:
            print(f"step {step} size {world.size} generation {world.generation}", flush=True)


if __name__ == "__main__":
    args.record.mkdir(parents=True, exist_ok=True)
    train()
    print("done", file=sys.stderr, flush=True)
