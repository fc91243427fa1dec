"""What `bench_restore.py` runs as each rank: save a sharded state once, or restore it into a model that was just built.

Prints one JSON object: seconds from when all ranks are ready until the slowest has the state, and the bits of a few
elements, by which the ways can be compared.
"""

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import resilient_train as rt

parser = argparse.ArgumentParser()
parser.add_argument("action", choices=("save", "ours", "dcp"))
parser.add_argument("folder", type=Path)
parser.add_argument("--mib", type=int, required=True)
parser.add_argument("--store", required=True)
args = parser.parse_args()

WIDTH = 1024


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Parameters and AdamW's two moments, sharded over all ranks."""
    torch.manual_seed(0)
    layers = max(1, round(args.mib * (1 << 20) / 3 / (4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def save(model: nn.Module, optim: torch.optim.Optimizer) -> float:
    """Seconds that dcp.save took."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optim.step()
    optim.zero_grad()
    ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), str(args.folder / "ours"))
    for _ in ckpt.steps(1):
        pass
    ckpt.close()
    dist.barrier()
    began = time.perf_counter()
    names = get_state_dict(model, optim)
    dcp.save({"model": names[0], "optim": names[1]}, checkpoint_id=args.folder / "dcp")
    return time.perf_counter() - began


def restore(model: nn.Module, optim: torch.optim.Optimizer) -> float:
    """Seconds of this rank."""
    if args.action == "ours":
        ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), str(args.folder / "ours"))
        dist.barrier()
        began = time.perf_counter()
        assert ckpt.restore() == 1
        seconds = time.perf_counter() - began
        ckpt.close()
        return seconds
    dist.barrier()
    began = time.perf_counter()
    state: dict[str, Any] = dict(zip(("model", "optim"), get_state_dict(model, optim), strict=True))
    dcp.load(state, checkpoint_id=args.folder / "dcp")
    set_state_dict(model, optim, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return time.perf_counter() - began


def sample(model: nn.Module, optim: torch.optim.Optimizer) -> list[float]:
    """Sums over the whole state: the same, however it is sharded, but for the order of addition."""
    parameters = list(model.parameters())
    held = parameters + [optim.state[parameter][key] for parameter in parameters for key in ("exp_avg", "exp_avg_sq")]
    return [sum(tensor.detach().full_tensor().double().sum().item() for tensor in held)]


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(args.store, size), rank=rank, world_size=size)
    model, optim = build()
    result: dict[str, object] = {}
    slowest = torch.tensor((save if args.action == "save" else restore)(model, optim))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    result["seconds"] = slowest.item()
    result["sample"] = sample(model, optim)
    if rank == 0:
        print("RESULT", json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
