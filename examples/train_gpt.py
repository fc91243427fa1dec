"""Train a small byte-level GPT on the source text of Python's standard library, on however many ranks are left.

    rtrun --nproc-per-node=4 examples/train_gpt.py --parallel fsdp --steps 300

Kill any of its processes while it runs (``kill -9``): the others go on within a fraction of a second, in their own
processes, and a replacement joins a few seconds later.  The lines that make that happen are marked with (1) to (6);
everything else is ordinary PyTorch, and the script also runs under plain torchrun or with ``python``.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

import resilient_train as rt


def read_corpus(megabytes: float) -> torch.Tensor:
    """The standard library's own source text as bytes: uint8, shape [length]."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            text += path.read_bytes()
        if len(text) >= megabytes * 1e6:
            break
    return torch.frombuffer(text, dtype=torch.uint8)


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a LayerNorm; [batch, time, width] to the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Bytes in, logits over the next byte out: [batch, time] to [batch, time, 256]."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--global-batch", type=int, default=24, help="sequences per step, over all ranks")
    parser.add_argument("--micro-batch", type=int, default=6, help="sequences per forward and backward")
    parser.add_argument("--context", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=30, help="how much text to train on")
    parser.add_argument("--checkpoints", help="where to make the state durable: a folder or any fsspec URL")
    parser.add_argument("--metrics", type=Path, help="append one JSON line per step to this file")
    return parser.parse_args()


@rt.elastic  # (1) called again, in the same process, whenever the world changes
def train(world: rt.World, args: argparse.Namespace, corpus: torch.Tensor) -> None:
    # (2) build everything from `world`: its device, its mesh. Nothing from an earlier call is kept.
    torch.manual_seed(args.seed)
    model: nn.Module = GPT(args.width, args.layers, 4, args.context, dropout=0.1).to(world.device)
    if args.parallel == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
    else:
        model = DistributedDataParallel(model)
    optim = torch.optim.AdamW(model.parameters(), lr=args.lr)

    # (3) a global batch of constant size, cut over however many ranks there are
    samples = (len(corpus) - 1) // args.context
    data = rt.ElasticSampler(
        samples, global_batch=args.global_batch, micro_batch=args.micro_batch, world=world, seed=args.seed
    )

    # (4) what makes up the state, and where it is kept
    state = rt.State(model=model, optim=optim)
    ckpt = rt.Checkpointer(state, args.checkpoints, world=world)

    for step in ckpt.steps(args.steps):  # (5) restores the newest state left anywhere, then counts on from it
        began = time.perf_counter()
        total = torch.zeros((), device=world.device)
        for micro in data.micro_batches(step):  # (6) this rank's share of global batch number `step`
            with synchronised(model, micro.last):
                starts = micro.indices[:, None] * args.context
                tokens = corpus[starts + torch.arange(args.context + 1)].long().to(world.device)
                logits = model(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) * micro.weight
                loss.backward()
                total += loss.detach()
        optim.step()
        optim.zero_grad()
        report(world, args, step, total, time.perf_counter() - began)


def synchronised(model: nn.Module, last: bool):
    """Gradients travel once per step, with the last micro-batch."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return nullcontext()


def report(world: rt.World, args: argparse.Namespace, step: int, total: torch.Tensor, seconds: float) -> None:
    """Print and record the mean loss over the global batch."""
    dist.all_reduce(total)
    if world.rank != 0:
        return
    loss = total.item() / world.data_size
    speed = args.global_batch * args.context / seconds
    print(f"step {step:5d}  loss {loss:.4f}  ranks {world.size}  {speed:8.0f} tokens/s", flush=True)
    if args.metrics is not None:
        line = {
            "step": step,
            "loss": loss,
            "size": world.size,
            "generation": world.generation,
            "tokens_per_second": speed,
            "at": time.monotonic(),
        }
        with args.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    arguments = parse_args()
    train(arguments, read_corpus(arguments.megabytes))
