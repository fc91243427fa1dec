"""What `bench_checkpoint.py` runs as each rank: a training loop under one way of saving it.

Saves are made in the middle of what is measured, so that all that they cost falls into it, and once more at the end.
Prints one JSON object: seconds of every measured step, seconds from the end of the last one until its state is durable,
and the peak of the process's own memory.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.fsdp import fully_shard

import resilient_train as rt

WARMUP = 6

parser = argparse.ArgumentParser()
parser.add_argument("mode", choices=("none", "ours", "ours-eager", "torch-save", "dcp-save", "dcp-async", "dcp-best"))
parser.add_argument("folder", type=Path)
parser.add_argument("--mib", type=int, required=True, help="size of the state")
parser.add_argument("--batch", type=int, required=True, help="rows through the model: the length of a step")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--every", type=int, required=True, help="steps between durable checkpoints")
parser.add_argument("--threads", type=int, required=True)
args = parser.parse_args()

WIDTH = 1024
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Parameters and AdamW's two moments: three times the parameters' bytes."""
    torch.manual_seed(0)
    layers = max(1, round(args.mib * (1 << 20) / 3 / (4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    if SIZE > 1:
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def saves_after(step: int) -> bool:
    """Whether the state after so many steps is made durable: once to warm up, then in the middle of every ``every``."""
    return step == 1 or (step > WARMUP and (step - WARMUP) % args.every == args.every // 2)


def one_step(model: nn.Module, optim: torch.optim.Optimizer, data: torch.Tensor) -> None:
    model(data).square().mean().backward()
    optim.step()
    optim.zero_grad()


class Peer:
    """Saves every so many steps, as its documentation says."""

    def __init__(self, model: nn.Module, optim: torch.optim.Optimizer) -> None:
        self.model, self.optim = model, optim
        self.pending = None
        self.stager = None
        # Its background thread's collectives must not mix with the training's.
        self.group = dist.new_group(backend="gloo")
        if args.mode == "dcp-best":
            options = StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
            )
            self.stager = DefaultStager(options)

    def save(self, step: int) -> None:
        state = {"model": self.model.state_dict(), "optim": self.optim.state_dict()}
        target = args.folder / f"step-{step}"
        if args.mode == "torch-save":
            torch.save(state, target)
        elif args.mode == "dcp-save":
            dcp.save(state, checkpoint_id=target)
        elif args.mode == "dcp-async":
            self.wait()
            self.pending = dcp.async_save(state, checkpoint_id=target, process_group=self.group)
        elif args.mode == "dcp-best":
            self.wait()
            self.pending = dcp.async_save(
                state,
                checkpoint_id=target,
                process_group=self.group,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )

    def before_optimizer(self) -> None:
        """The state must not change before it is staged."""
        if self.pending is not None and args.mode == "dcp-best":
            self.pending.staging_completion.result()

    def wait(self) -> None:
        if self.pending is not None:
            done = self.pending.upload_completion if args.mode == "dcp-best" else self.pending
            done.result()

    def close(self) -> None:
        self.wait()
        if self.stager is not None:
            self.stager.close()


def with_peer(model: nn.Module, optim: torch.optim.Optimizer, data: torch.Tensor) -> tuple[list[float], float]:
    peer = Peer(model, optim)
    optim.register_step_pre_hook(lambda *_: peer.before_optimizer())
    times = []
    for step in range(1, WARMUP + args.steps + 1):
        began = time.perf_counter()
        one_step(model, optim, data)
        if saves_after(step):
            peer.save(step)
        if step == WARMUP:
            peer.wait()
        times.append(time.perf_counter() - began)
    peer.wait()
    began = time.perf_counter()
    peer.save(step)
    peer.before_optimizer()
    peer.wait()
    durable = time.perf_counter() - began
    peer.close()
    return times, durable


def with_ours(model: nn.Module, optim: torch.optim.Optimizer, data: torch.Tensor) -> tuple[list[float], float]:
    """A snapshot at every step; as many durable checkpoints as the peers make."""
    state = rt.State(model=model, optim=optim)
    ckpt = rt.Checkpointer(
        state, str(args.folder / "ours"), persist_every=10**9, lazy=args.mode == "ours", keep_last=100
    )
    times, began = [], time.perf_counter()
    for step in ckpt.steps(WARMUP + args.steps):
        if step:
            now = time.perf_counter()
            times.append(now - began)
            began = now
        if saves_after(step):
            ckpt.persist()
        if step == WARMUP - 1:
            ckpt.wait()
        one_step(model, optim, data)
        if step == WARMUP + args.steps - 1:
            times.append(time.perf_counter() - began)
            ckpt.wait()
            began = time.perf_counter()
    ckpt.persist()
    ckpt.wait()
    durable = time.perf_counter() - began
    ckpt.close()
    return times, durable


def main() -> None:
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    store = dist.FileStore(str(args.folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE)
    model, optim = build()
    data = torch.randn(args.batch, WIDTH)
    dist.barrier()
    run = with_ours if args.mode.startswith("ours") else with_peer
    times, durable = run(model, optim, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if RANK == 0:
        print("RESULT", json.dumps({"steps": times[WARMUP:], "durable": durable, "peak_mib": peak // 1024}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
