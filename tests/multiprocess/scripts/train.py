"""A small training that writes down everything it did, for tests.

Every rank appends one JSON line per finished step to RECORD/<pid>.jsonl: which samples it used with which weight, in
which generation, and the digest of the state that the step ended with; and the digest of a state right after it was
restored.
"""

import argparse
import gc
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import resilient_train as rt

parser = argparse.ArgumentParser()
parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="fsdp")
parser.add_argument("--optim", choices=("adamw", "fused", "sgd"), default="adamw")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--step-time", type=float, default=0.02)
parser.add_argument("--record", type=Path)
parser.add_argument("--url")
parser.add_argument("--persist-every", default="auto")
parser.add_argument("--width", type=int, default=30)
parser.add_argument("--hidden", type=int, default=50)
parser.add_argument("--raise-at", type=int, default=-1)
parser.add_argument("--abort-at", type=int, default=-1)
parser.add_argument("--exit-rank", type=int, default=1)
parser.add_argument("--kill-self-at", type=int, default=-1)
args = parser.parse_args()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(model, optim):
    """A digest of the complete state, the same on every world size."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.removeprefix("module.").encode())
        total.update(whole(parameter.detach()).contiguous().numpy().tobytes())
        for key, value in sorted(optim.state.get(parameter, {}).items()):
            total.update(key.encode())
            if isinstance(value, torch.Tensor):
                total.update(str(value.dtype).encode())
                total.update(whole(value).contiguous().numpy().tobytes())
    return total.hexdigest()


def write(world, **fields):
    if args.record is None:
        return
    args.record.mkdir(parents=True, exist_ok=True)
    with (args.record / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(
            json.dumps({"generation": world.generation, "rank": world.rank, "size": world.size, **fields}) + "\n"
        )


def usage():
    """What this process holds when a generation begins."""
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads = len(os.listdir("/proc/self/task"))
    return {"rss": resident, "fds": len(os.listdir("/proc/self/fd")), "threads": threads, "tensors": tensors}


def optimizer(parameters):
    if args.optim == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-2, fused=args.optim == "fused")


@rt.elastic
def train(world):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(args.width, args.hidden), nn.Tanh(), nn.Dropout(0.1), nn.Linear(args.hidden, args.width)
    ).to(world.device)
    if args.parallel == "fsdp":
        fully_shard(model, mesh=world.mesh)
    else:
        model = DistributedDataParallel(model)
    optim = optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1.0 / (1 + step / 100))
    samples = torch.randn(501, args.width, generator=torch.Generator().manual_seed(1))
    data = rt.ElasticSampler(len(samples), global_batch=24, micro_batch=4, world=world, seed=0)
    every = int(args.persist_every) if args.persist_every.isdigit() else args.persist_every
    state = rt.State(model=model, optim=optim, schedule=schedule)
    ckpt = rt.Checkpointer(state, args.url, world=world, persist_every=every)
    first = True
    write(world, usage=usage())
    for step in ckpt.steps(args.steps):
        if first:
            write(world, restored=step, digest=digest(model, optim))
            first = False
        if step == args.raise_at and world.rank == args.exit_rank:
            raise ValueError(f"a bug at step {step}")
        if step == args.abort_at and world.rank == args.exit_rank:
            os.abort()
        once = args.record / "killed" if args.record else None
        if step == args.kill_self_at and world.rank == args.exit_rank and once and not once.exists():
            once.parent.mkdir(parents=True, exist_ok=True)
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        total, used = 0.0, []
        for micro in data.micro_batches(step):
            batch = samples[micro.indices].to(world.device)
            loss = (model(batch) - batch).square().mean() * micro.weight
            loss.backward()
            total += loss.item()
            if micro.weight:
                used += micro.indices.tolist()
        optim.step()
        optim.zero_grad()
        schedule.step()
        if args.step_time:
            time.sleep(args.step_time)
        write(world, step=step, used=used, loss=total, digest=digest(model, optim))
        if world.rank == 0:
            print(f"step {step} size {world.size} generation {world.generation}", flush=True)
    write(world, final=digest(model, optim))
    return world.size


if __name__ == "__main__":
    print("result", train(), file=sys.stderr, flush=True)
