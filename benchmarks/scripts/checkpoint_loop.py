"""What `bench_checkpoint.py` runs as each rank: a training loop under one way of saving it.

Stretches of steps with saving and without take turns, so that what else differs from process to process does not
matter.  In every stretch with saving one checkpoint is made durable, early enough to be complete within it.
Prints one JSON object: seconds of every step without saving and with it, seconds from the end of the last one until its
state is durable, and the peak of the process's own memory.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.fsdp import fully_shard

import resilient_train as rt

WARMUP = 6
SAVED_AFTER = 1
"""The step of a stretch whose state is made durable."""

parser = argparse.ArgumentParser()
parser.add_argument("mode", choices=("none", "ours", "ours-eager", "torch-save", "dcp-save", "dcp-async", "dcp-best"))
parser.add_argument("folder", type=Path)
parser.add_argument("--mib", type=int, required=True, help="size of the state")
parser.add_argument("--batch", type=int, required=True, help="rows through the model: the length of a step")
parser.add_argument("--steps", type=int, required=True, help="in a stretch")
parser.add_argument("--pairs", type=int, required=True, help="stretches without saving, and as many with it")
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


def one_step(model: nn.Module, optim: torch.optim.Optimizer, data: torch.Tensor) -> None:
    model(data).square().mean().backward()
    optim.step()
    optim.zero_grad()


class Saver:
    """Saves nothing."""

    def after(self, step: int) -> None:
        """Step number ``step`` of a stretch is done."""

    def settle(self) -> None:
        """Wait until everything is durable."""

    def last(self) -> None:
        """Make the present state durable."""

    def close(self) -> None:
        """End."""


class Peer(Saver):
    """Saves once in a stretch, as its documentation says."""

    def __init__(self, model: nn.Module, optim: torch.optim.Optimizer) -> None:
        self.model, self.optim = model, optim
        self.pending: Any = None
        self.stager = None
        self.count = 0
        # Its background thread's collectives must not mix with the training's.
        self.group = dist.new_group(backend="gloo")
        if args.mode == "dcp-best":
            options = StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
            )
            self.stager = DefaultStager(options)
            # The state must not change before it is staged.
            optim.register_step_pre_hook(lambda *_: self.staged())

    def after(self, step: int) -> None:
        if step == SAVED_AFTER:
            self.save()

    def save(self) -> None:
        self.count += 1
        state = {"model": self.model.state_dict(), "optim": self.optim.state_dict()}
        target = args.folder / f"checkpoint-{self.count}"
        if args.mode == "torch-save":
            torch.save(state, target)
        elif args.mode == "dcp-save":
            dcp.save(state, checkpoint_id=target)
        elif args.mode == "dcp-async":
            self.settle()
            self.pending = dcp.async_save(state, checkpoint_id=target, process_group=self.group)
        elif args.mode == "dcp-best":
            self.settle()
            self.pending = dcp.async_save(
                state,
                checkpoint_id=target,
                process_group=self.group,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )

    def staged(self) -> None:
        if self.pending is not None:
            self.pending.staging_completion.result()

    def settle(self) -> None:
        if self.pending is not None:
            done = self.pending.upload_completion if args.mode == "dcp-best" else self.pending
            done.result()

    def last(self) -> None:
        self.save()
        self.settle()

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class Ours(Saver):
    """A snapshot after every step; as many durable checkpoints as the peers make."""

    def __init__(self, model: nn.Module, optim: torch.optim.Optimizer) -> None:
        self.ckpt = rt.Checkpointer(
            rt.State(model=model, optim=optim),
            str(args.folder / "ours"),
            persist_every=args.steps,
            lazy=args.mode == "ours",
            keep_last=100,
        )
        self.ckpt.restore()
        self.count = 0

    def after(self, step: int) -> None:
        # So that the multiples of a stretch's length fall on the step that is made durable.
        self.count = self.count + 1 if step else (self.count // args.steps + 1) * args.steps - SAVED_AFTER
        assert self.ckpt.snapshot(self.count)

    def settle(self) -> None:
        self.ckpt.wait()

    def last(self) -> None:
        self.ckpt.snapshot(self.count + 1)
        self.ckpt.persist()
        self.ckpt.wait()

    def close(self) -> None:
        self.ckpt.close()


def main() -> None:
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    store = dist.FileStore(str(args.folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE)
    model, optim = build()
    data = torch.randn(args.batch, WIDTH)
    saver = Saver() if args.mode == "none" else Ours(model, optim) if "ours" in args.mode else Peer(model, optim)
    dist.barrier()
    for step in range(WARMUP):
        one_step(model, optim, data)
        saver.after(step)
    saver.settle()
    times: dict[bool, list[float]] = {False: [], True: []}
    for stretch in range(2 * args.pairs):
        for step in range(args.steps):
            began = time.perf_counter()
            one_step(model, optim, data)
            if stretch % 2:
                saver.after(step)
            times[stretch % 2 == 1].append(time.perf_counter() - began)
        # What a step's optimizer would have to wait for has ended by then.
        saver.settle()
    began = time.perf_counter()
    saver.last()
    durable = time.perf_counter() - began
    saver.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if RANK == 0:
        found = {"without": times[False], "with": times[True], "durable": durable, "peak_mib": peak // 1024}
        print("RESULT", json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
