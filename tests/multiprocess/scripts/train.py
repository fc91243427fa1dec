"""A small training that writes down everything it did, for tests.

Every rank appends one JSON line per finished step to RECORD/<pid>.jsonl: which samples it used with which weight, in
which generation, and its part of a digest of the state that the step ended with; and of the state right after it was
restored, and at the end.
"""

import argparse
import gc
import json
import os
import re
import signal
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import resilient_train as rt

parser = argparse.ArgumentParser()
parser.add_argument("--parallel", choices=("ddp", "fsdp", "hsdp", "tp"), default="fsdp")
parser.add_argument("--optim", choices=("adamw", "fused", "sgd"), default="adamw")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--step-time", type=float, default=0.02)
parser.add_argument("--record", type=Path)
parser.add_argument("--url")
parser.add_argument("--persist-every", default="auto")
parser.add_argument("--snapshot-every", type=int, default=1)
parser.add_argument("--replicas", type=int, default=1)
parser.add_argument("--redundancy")
parser.add_argument("--keep", action="store_true", help="the same module and optimizer after a change")
parser.add_argument("--eval", action="store_true", help="an evaluation at the end of every step")
parser.add_argument("--linger", type=float, default=0.0, help="seconds to live on after train() returned")
parser.add_argument("--width", type=int, default=30)
parser.add_argument("--hidden", type=int, default=50)
parser.add_argument("--raise-at", type=int, default=-1)
parser.add_argument("--abort-at", type=int, default=-1)
parser.add_argument("--stop-file", type=Path, help="says, from some time on, after how many steps to end")
parser.add_argument("--parameters", action="store_true", help="write down the parameters at the end")
parser.add_argument("--exit-rank", type=int, default=1)
parser.add_argument("--pause", type=float, default=0.0, help="seconds that an announced operation takes")
parser.add_argument("--kill-self-at", type=int, default=-1)
parser.add_argument("--hang", choices=("sleep", "spin", "gil", "skip", "announced", "overdue"))
parser.add_argument("--hang-at", type=int, default=-1)
parser.add_argument("--hang-always", action="store_true")
parser.add_argument("--hang-folder", type=Path, help="a file PID in it has that process hang, as the file says")
parser.add_argument("--slow-start", type=float, default=0.0, help="seconds that rank 1 takes for its first step")
args = parser.parse_args()


def part(tensor, name):
    """This rank's part of a digest of a tensor's bits: (its number in the sum, which part it is, of how many).

    Those of all parts add up (mod 2^64) to that of the whole.
    """
    local, places, which, parts = tensor.detach(), torch.arange(tensor.numel()).view(tensor.shape), "", 1
    if isinstance(tensor, DTensor):
        local = tensor.to_local().detach()
        mesh, placements = tensor.device_mesh, tensor.placements
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
            places = places.narrow(dim, start, size) if size else places[:0]
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():
                parts *= mesh.size(dim)
                which += f"{(mesh.mesh_dim_names or ('',))[dim]}{mesh.get_local_rank(dim)} "
    bits = local.contiguous().view(-1).numpy().view(f"u{tensor.element_size()}").astype(np.uint64)
    numbers = places.reshape(-1).numpy().astype(np.uint64)
    salt = np.uint64(zlib.crc32(f"{name} {tensor.dtype}".encode()) | 1)
    total = ((bits + np.uint64(1)) * (numbers * np.uint64(2) + np.uint64(1)) * salt).sum(dtype=np.uint64)
    return int(total), which, parts


def digest(model, optim):
    """This rank's parts of a digest of the complete state, which is the same on every world size and mesh.

    A tensor's part that several ranks hold has the same name on all: (name -> number, how many names there are in all).
    """
    totals, parts = {}, {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        for key, value in [("", parameter), *optim.state.get(parameter, {}).items()]:
            if isinstance(value, torch.Tensor):
                number, which, count = part(value, f"{name}.{key}")
                totals[which] = (totals.get(which, 0) + number) % 2**64
                parts["".join(filter(str.isalpha, which))] = count
    return totals, sum(parts.values())


def whole(parameter):
    """All of a parameter's values."""
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write(world, **fields):
    if args.record is None:
        return
    args.record.mkdir(parents=True, exist_ok=True)
    with (args.record / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(
            json.dumps(
                {
                    "generation": world.generation,
                    "rank": world.rank,
                    "size": world.size,
                    "at": time.monotonic(),
                    **fields,
                }
            )
            + "\n"
        )


def hang(world, how):
    """Never come back; or, announced, after a while."""
    write(world, hang=how)
    if how == "sleep":
        while True:
            time.sleep(0.1)
    if how == "spin":
        while True:
            pass
    if how == "gil":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if how == "announced":
        with world.long_operation("evaluate", seconds=600), world.long_operation("part of it"):
            time.sleep(args.pause)
    if how == "overdue":
        with world.long_operation("evaluate", seconds=1.5):
            time.sleep(600)


def usage():
    """What this process holds when a generation begins."""
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    rollup = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    memory = int(rollup["Private_Dirty"].split()[0]) * 1024
    threads = len(os.listdir("/proc/self/task"))
    return {"memory": memory, "fds": len(os.listdir("/proc/self/fd")), "threads": threads, "tensors": tensors}


def optimizer(parameters):
    if args.optim == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-2, fused=args.optim == "fused")


def build(device):
    torch.manual_seed(0)
    layers = (nn.Linear(args.width, args.hidden), nn.Tanh(), nn.Dropout(0.1), nn.Linear(args.hidden, args.width))
    return nn.Sequential(*layers).to(device)


MESHES = {"hsdp": {"replicate": -1, "shard": 2}, "tp": {"data": -1, "tensor": 2}}


@rt.elastic(mesh=MESHES.get(args.parallel))
def train(world):
    model = world.keep("model", lambda: build(world.device)) if args.keep else build(world.device)
    if args.parallel == "tp":
        parallelize_module(model, world.mesh["tensor"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
    if args.parallel != "ddp":
        fully_shard(model, mesh=world.mesh["data"] if args.parallel == "tp" else world.mesh)
    else:
        model = DistributedDataParallel(model)
    make = partial(optimizer, list(model.parameters()))
    optim = world.keep("optim", make) if args.keep else make()
    write(world, made=[id(model.module if args.parallel == "ddp" else model), id(optim)])
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1.0 / (1 + step / 100))
    samples = torch.randn(501, args.width, generator=torch.Generator().manual_seed(1))
    data = rt.ElasticSampler(len(samples), global_batch=24, micro_batch=4, world=world, seed=0)
    every = int(args.persist_every) if args.persist_every.isdigit() else args.persist_every
    state = rt.State(model=model, optim=optim, schedule=schedule)
    often = {"persist_every": every, "snapshot_every": args.snapshot_every}
    ckpt = rt.Checkpointer(state, args.url, world=world, replicas=args.replicas, redundancy=args.redundancy, **often)
    first = first_step = True
    write(world, usage=usage())
    for step in ckpt.steps(args.steps):
        if first:
            write(world, restored=step, digest=digest(model, optim))
            first = False
        if args.stop_file and args.stop_file.exists() and step >= int(args.stop_file.read_text()):
            break
        if step == args.raise_at and world.rank == args.exit_rank:
            raise ValueError(f"a bug at step {step}")
        if step == args.abort_at and world.rank == args.exit_rank:
            os.abort()
        if first_step and args.slow_start and world.rank == args.exit_rank:
            time.sleep(args.slow_start)
        first_step = False
        once = args.record / "killed" if args.record else None
        if step == args.hang_at and (args.hang_always or world.generation == 1):
            if world.rank == args.exit_rank:
                hang(world, args.hang)
            elif args.hang == "skip":
                dist.barrier()
        if args.hang_folder and (args.hang_folder / str(os.getpid())).exists():
            hang(world, (args.hang_folder / str(os.getpid())).read_text())
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
            if micro.weight and (args.parallel != "tp" or world.mesh.get_local_rank("tensor") == 0):
                used += micro.indices.tolist()
        optim.step()
        optim.zero_grad()
        schedule.step()
        if args.step_time and not (args.record and (args.record / "hurry").exists()):
            time.sleep(args.step_time)
        write(world, step=step, used=used, loss=total, digest=digest(model, optim))
        if args.eval:
            with torch.no_grad():
                model(samples[:4])
        if world.rank == 0:
            print(f"step {step} size {world.size} generation {world.generation}", flush=True)
    more = (
        {"parameters": [v for p in model.parameters() for v in whole(p).view(-1).tolist()]} if args.parameters else {}
    )
    write(world, final=True, digest=digest(model, optim), **more)
    return world.size


if __name__ == "__main__":
    sys.stderr.write(f"result {train()}\n")  # At once: others write there too.
    time.sleep(args.linger)
