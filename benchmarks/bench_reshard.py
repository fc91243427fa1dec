"""From N ranks to N - 1: what is planned, how many bytes move between nodes, how long it takes; CPU, loopback.

    python benchmarks/bench_reshard.py [--mib 1024] [--rounds 3] [--only planner bytes memory]

``planner``: seconds of processor that one rank takes to plan and to prove its part, whatever the number of ranks.
``bytes``: what is read from other nodes' images, over the least that has to be, as planned.  ``memory``: four nodes,
each with a keeper and an image of a sharded state in its memory; three of them, one thread each, fill their new shards
from their own image and from the others' keepers, verified.  Beside it, in the same run: as many bytes through a plain
socket, and ``dcp.save`` followed by ``dcp.load`` from 4 to 3 ranks with files in the page cache.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import torch
from bench_replication import RECEIVE, Node, timed
from bench_restore import ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from resilient_train.image.fetch import Range, plan_runs
from resilient_train.image.snapshot import ImageWriter
from resilient_train.plan.recovery import Copy, Holders, Want, copies_by_layout, prove
from resilient_train.spec.messages import Peers
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.sharding import Cut, Cuts, held_box
from resilient_train.spec.world import Key
from resilient_train.worker.fill import fill
from resilient_train.worker.sources import Candidate, MemorySource
from resilient_train.worker.state import State

Shapes = dict[str, tuple[int, ...]]


def transformer(tensors: int, width: int) -> Shapes:
    """Shapes as a transformer has them: large matrices, and many small vectors."""
    kinds = {"qkv": (3 * width, width), "proj": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    kinds |= {"norm": (width,), "bias": (4 * width,)}
    return {f"{i // 6:05d}.{name}": shape for i in range(0, tensors, 6) for name, shape in kinds.items()}


def entries(shapes: Shapes, cuts: Cuts, rank: int) -> list[Entry]:
    """What a rank holds; a tensor that lacks a dimension is cut along its first."""
    found = []
    for name, shape in shapes.items():
        mine = tuple(Cut(cut.dim if cut.dim < len(shape) else 0, cut.parts, cut.stride) for cut in cuts)
        box = held_box(shape, mine, rank)
        found.append(Entry(name=name, dtype="F32", shape=box.shape, global_shape=shape, offset=box.offset, cuts=mine))
    return found


def wants(shapes: Shapes, cuts: Cuts, rank: int) -> list[Want]:
    """What a rank is to hold."""
    held = entries(shapes, cuts, rank)
    return [Want(name=e.name, dtype="F32", global_shape=e.global_shape, box=e.box) for e in held]


def planned(shapes: Shapes, before: Cuts, after: Cuts, world: int, rank: int) -> tuple[list[Copy], float]:
    """(a rank's copies, seconds of processor to plan and prove them)."""
    there, wanted = entries(shapes, before, 0), wants(shapes, after, rank)
    held = Holders(world=world, ranks=range(world), near=(rank,))
    began = time.process_time()
    copies = copies_by_layout(wanted, there, held, rank)
    prove(wanted, copies)
    return copies, time.process_time() - began


def planner() -> None:
    """The table of seconds."""
    print("planner: one rank's seconds of processor to plan and prove, median of five ranks (number of its copies)")
    for tensors in (1000, 10_000):
        shapes = transformer(tensors, 4096)
        for world in (8, 64, 512, 1024, 4096, 16384):
            layouts = {
                "FSDP to one rank less": ((Cut(0, world, 1),), (Cut(0, world - 1, 1),)),
                "FSDP x TP 8 to one group less": (
                    (Cut(1, 8, 1), Cut(0, world // 8, 8)),
                    (Cut(1, 8, 1), Cut(0, world // 8 - 1, 8)),
                ),
            }
            told = []
            for name, (before, after) in layouts.items():
                size = prod(cut.parts for cut in after)
                if not size:
                    continue
                runs = [planned(shapes, before, after, world, size * i // 5) for i in range(5)]
                copies = int(statistics.median(len(found) for found, _ in runs))
                told.append(f"{name} {statistics.median(took for _, took in runs):.3f} ({copies})")
            print(f"  {world:6d} ranks, {len(shapes):6d} tensors: {'; '.join(told)}", flush=True)


def moved() -> None:
    """The table of bytes."""
    print("bytes read from other nodes, over the least possible; every rank is a node of its own")
    for world in (4, 8):
        for dim in (0, 1):
            for tensors, width in ((60, 256), (60, 512), (60, 1024), (60, 2048), (60, 4096)):
                shapes = transformer(tensors, width)
                read = least = 0
                before, after = (Cut(dim, world, 1),), (Cut(dim, world - 1, 1),)
                layouts = [plan_image(entries(shapes, before, rank), 4096) for rank in range(world)]
                for rank in range(world - 1):
                    ranges: dict[int, list[Range]] = {}
                    places = [dict(zip(layout.entries, layout.starts, strict=True)) for layout in layouts]
                    for copy in planned(shapes, before, after, world, rank)[0]:
                        if copy.rank != rank:
                            first, count = copy.box.span_in(copy.entry.box)
                            start = places[copy.rank][copy.entry] + 4 * first
                            ranges.setdefault(copy.rank, []).append(Range(start, 4 * count, 1))
                            least += 4 * copy.box.size
                    for source, wanted in ranges.items():
                        runs = plan_runs(wanted, layouts[source])
                        read += sum(size for run in runs for _, size in run.segments)
                state = sum(map(prod, shapes.values())) >> 18
                print(f"  {world} -> {world - 1} on dim {dim}, width {width:4d} ({state:5d} MiB): {read / least:.3f}")


def mesh(size: int, rank: int) -> DeviceMesh:
    """The mesh of a rank, without process groups: nothing is communicated through it."""
    return DeviceMesh("cpu", torch.arange(size), mesh_dim_names=("data",), _init_backend=False, _rank=rank)


def sharded(mib: int, size: int, rank: int) -> tuple[State, nn.Module]:
    """A rank's shards of some large matrices, each row telling its number."""
    width = 1024
    model = nn.Module()
    rows = max(size, mib * 256 // 16)
    for i in range(16):
        box = held_box((rows, width), (Cut(0, size, 1),), rank)
        numbers = torch.arange(box.offset[0], box.end[0], dtype=torch.float32) + i
        local = numbers[:, None].expand(box.shape).contiguous()
        part = DTensor.from_local(
            local, mesh(size, rank), [Shard(0)], run_check=False, shape=torch.Size((rows, width)), stride=(width, 1)
        )
        model.register_parameter(f"w{i}", nn.Parameter(part))
    return State(model=model), model


def publish(node: Node, key: Key, state: State, rank: int, world: int) -> int:
    """Put a rank's image into its node's memory; its bytes."""
    frame = state.capture(rank)
    layout = plan_image([part.entry for part in frame.parts], len(frame.document), alike=True)
    by_entry = {part.entry: part for part in frame.parts}
    parts = [by_entry[entry] for entry in layout.entries]
    writer = ImageWriter(layout, parts, rank, world)
    (slot,) = list(node.slots.writable(layout.total, None, {1: None}))[:1]
    if not writer.begin(slot.memory, key, parts, frame.document) or writer.conclude():
        raise RuntimeError("the state was not published")
    slot.key = key
    node.link.board.report_published(0, key)
    return layout.total


def plain_seconds(size: int, rounds: int) -> float:
    """Seconds for ``size`` bytes through one socket into another process's warm memory."""
    data = memoryview(np.ones(size, dtype=np.uint8))
    server = socket.create_server(("127.0.0.1", 0))
    plain = subprocess.Popen([sys.executable, "-c", RECEIVE, str(size), str(server.getsockname()[1])])
    sock, _ = server.accept()

    def send() -> None:
        for at in range(0, size, 8 << 20):
            sock.sendall(data[at : at + (8 << 20)])
        sock.recv(1)

    times = [timed(send) for _ in range(rounds + 1)]
    sock.close()
    server.close()
    plain.wait()
    return statistics.median(times[1:])


def memory(mib: int, rounds: int) -> None:
    """Four nodes' images into three nodes' shards."""
    secret = secrets.token_hex(32)
    nodes = [Node(name, secret) for name in "abcd"]
    key = Key(1, 1)
    for rank, node in enumerate(nodes):
        publish(node, key, sharded(mib, 4, rank)[0], rank, 4)
    for node in nodes:
        node.link.board.report_copies(0, 0)
        others = [[other.name, other.endpoint] for other in nodes if other is not node]
        own = [[node.name, node.endpoint]]
        node.keeper.follow(Peers(node=node.name, generation=1, slots=[0], keepers=own, others=others))
    sources = [MemorySource(node.link) for node in nodes[:3]]
    models = [sharded(mib, 3, rank) for rank in range(3)]
    expected = [[parameter.to_local().clone() for parameter in model.parameters()] for _, model in models]
    times, far = [], 0

    def restore(rank: int) -> int:
        with sources[rank].open(Candidate(key=key), rank) as images:
            return fill(models[rank][0], images, rank, 3, threads=2).far

    with ThreadPoolExecutor(3) as pool:
        for turn in range(rounds + 1):
            for _, model in models:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.to_local().zero_()
            began = time.perf_counter()
            far = sum(pool.map(restore, range(3)))
            if turn:  # The first finds cold connections.
                times.append(time.perf_counter() - began)
            for (_, model), right in zip(models, expected, strict=True):
                for parameter, value in zip(model.parameters(), right, strict=True):
                    if not torch.equal(parameter.to_local(), value):
                        raise RuntimeError("another state was restored")
    for node in nodes:
        node.close()
    ours = statistics.median(times)
    socket_seconds = plain_seconds(far, rounds)
    print(
        f"memory, 4 -> 3 nodes, {mib} MiB: {ours:.3f} s ({min(times):.3f} .. {max(times):.3f}), {far >> 20} MiB from"
        f" other nodes: {far / ours / 1e9:.2f} GB/s; a plain socket moves as many bytes in {socket_seconds:.3f} s"
        f" ({far / socket_seconds / 1e9:.2f} GB/s): {socket_seconds / ours:.2f} of its bandwidth",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        saved = [ranks("save", 4, Path(scratch), mib)["dcp_save"] for _ in range(1)]
        loads = [ranks("dcp", 3, Path(scratch), mib)["seconds"] for _ in range(rounds)]
    dcp = statistics.median(saved) + statistics.median(loads)
    print(
        f"dcp.save {statistics.median(saved):.3f} s + dcp.load {statistics.median(loads):.3f} s, 4 -> 3 ranks:"
        f" {dcp / ours:.1f}x ours"
    )


def main(argv: Sequence[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the whole state in memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("planner", "bytes", "memory"))
    args = parser.parse_args(argv)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    print(f"command: {' '.join(['python', 'benchmarks/bench_reshard.py', *argv])}")
    chosen = args.only or ("planner", "bytes", "memory")
    if "planner" in chosen:
        planner()
    if "bytes" in chosen:
        moved()
    if "memory" in chosen:
        memory(args.mib, args.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
