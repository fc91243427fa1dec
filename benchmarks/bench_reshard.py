"""From four ranks to three: seconds and bytes, from the memory of nodes; and what planning takes, for any number.

    python benchmarks/bench_reshard.py [--mib 1024] [--rounds 3] [--only memory transport planner]

**memory**: a job of four nodes of one rank, each an ``rtrun``, trains a sharded (FSDP2) model with AdamW's moments; one
node is killed with all it held, and the other three put the state together from their own memory, each other's, and the
copies of the lost node's, in the processes that they are; from 2400 MiB on they try both ways to move bytes.  Bytes are
those of the loopback interface, everything included.  Beside it, in turns: ``dcp.save`` on four ranks and ``dcp.load``
on three, on disk (in the page cache), and as many bytes as were moved through one plain socket.

**transport**: the same bytes from one process to another, in turns, in the pieces of a restore: by the connections that
keepers serve images on, and by the process group (gloo, point to point).

**planner**: how long one rank takes to plan and to prove its part of a change, from memory and of what was divided in
storage, whatever the number of ranks is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_replication import RECEIVE
from bench_restore import ranks

from resilient_train.plan.division import LEAST, copies_by_division
from resilient_train.plan.placement import place
from resilient_train.plan.recovery import Copy, Holders, Want, copies_by_layout, prove
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cut, Cuts, held_box
from resilient_train.spec.topology import Topology
from resilient_train.spec.world import node_of
from resilient_train.storage.wire import accept, connect
from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "reshard.py"
WIDTH = 1152
TABLES = ("memory", "transport", "planner")
Shapes = dict[str, tuple[int, ...]]


def transformer(tensors: int, width: int) -> Shapes:
    """Shapes as a transformer has them: large matrices, and many small vectors."""
    kinds: Shapes = {
        "qkv": (3 * width, width),
        "proj": (width, width),
        "up": (4 * width, width),
        "down": (width, 4 * width),
    }
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


def planned(
    shapes: Shapes, before: Cuts, after: Cuts, world: int, rank: int, *, divided: bool
) -> tuple[list[Copy], float]:
    """(a rank's copies, seconds of processor to plan and prove them), from memory, or of storage that was divided."""
    there, wanted = entries(shapes, before, 0), wants(shapes, after, rank)
    held = Holders(world=world, ranks=range(world), near=(rank,))
    began = time.process_time()
    copies = (
        copies_by_division(wanted, there, world, LEAST, {}) if divided else copies_by_layout(wanted, there, held, rank)
    )
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
                "HSDP of 8 shards to one replica less": ((Cut(0, 8, 1),), (Cut(0, 8, 1),)),
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
                for source, divided in (("", False), ("from storage: ", True)):
                    runs = [planned(shapes, before, after, world, size * i // 5, divided=divided) for i in range(5)]
                    copies = int(statistics.median(len(found) for found, _ in runs))
                    told.append(f"{source}{name} {statistics.median(took for _, took in runs):.3f} ({copies})")
            print(f"  {world:6d} ranks, {len(shapes):6d} tensors: {'; '.join(told)}", flush=True)


def until(condition, nodes: Nodes, what: str) -> None:
    """Look a few times a second."""
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline or not all(job.running() for job in nodes.left()):
            raise RuntimeError(f"{what} did not happen\n{nodes.output}")
        time.sleep(0.2)


def rows(folder: Path) -> dict[int, list[dict]]:
    """What each process wrote when it had restored."""
    return {int(file.name): [*map(json.loads, file.read_text().splitlines())] for file in folder.glob("[0-9]*")}


def steps(folder: Path) -> int:
    """Steps that rank 0 has finished in all."""
    file = folder / "steps"
    return len(file.read_text().splitlines()) if file.exists() else 0


def from_memory(folder: Path, mib: int, dim: int) -> tuple[float, int, int, list[float]]:
    """(seconds of the slowest rank, bytes moved, the least that could be, GiB/s that both ways were tried at)."""
    (folder / "rows").mkdir(parents=True)
    arguments = [str(folder / "rows"), str(mib), str(dim)]
    flags = ("--nnodes=3:4", "--nproc-per-node=1", "--rdzv-conf=last_call_timeout=90")
    with Nodes(SCRIPT, arguments, count=4, flags=flags, folder=folder) as nodes:
        until(lambda: steps(folder / "rows") >= 15, nodes, "training")
        members = {pid: member for job in nodes.jobs for member, pid in job.workers().items()}
        first = {pid: node_of(members[pid]) for pid in rows(folder / "rows")}
        before = {pid: found[-1]["rank"] for pid, found in rows(folder / "rows").items()}
        nodes.kill(3)
        until(lambda: sum(len(found) > 1 for found in rows(folder / "rows").values()) == 3, nodes, "recovery")
        after = {pid: found[-1] for pid, found in rows(folder / "rows").items() if len(found) > 1}
    told = " ".join(found["told"] for found in after.values())
    tried = re.search(r"measured: ([0-9.]+) and ([0-9.]+) GiB/s", told)
    copies = place(Topology(dict.fromkeys(first.values(), ())), 1)
    holders = {before[pid]: {node, *copies[node]} for pid, node in first.items()}
    here = {pid: {rank for rank, nodes in holders.items() if first[pid] in nodes} for pid in after}
    assert all(found["step"] for found in after.values())
    moved = int(statistics.median(found["moved"] for found in after.values()))
    fewest = least({pid: found["rank"] for pid, found in after.items()}, here, mib)
    rates = [float(rate) for rate in tried.groups()] if tried else []
    return max(found["seconds"] for found in after.values()), moved, fewest, rates


def least(after: Mapping[int, int], here: Mapping[int, set[int]], mib: int) -> int:
    """Bytes of the new ranks' parts that are not in their node's memory.

    Args:
        after: each process's rank of three.
        here: the ranks of four whose images its node has.
        mib: MiB of the state.
    """
    layers = max(1, round(mib * (1 << 20) / 3 / (4 * WIDTH * WIDTH)))
    lacking = 0
    for pid, rank in after.items():
        wanted = held_box((WIDTH,), (Cut(0, 3, 1),), rank)
        indices = set(range(wanted.offset[0], wanted.offset[0] + wanted.shape[0]))
        for old in here[pid]:
            held = held_box((WIDTH,), (Cut(0, 4, 1),), old)
            indices -= set(range(held.offset[0], held.offset[0] + held.shape[0]))
        lacking += len(indices)
    return lacking * WIDTH * 4 * 3 * layers


def through_a_socket(size: int) -> float:
    """Seconds to send so many bytes to another process, out of and into warm memory."""
    server = socket.create_server(("127.0.0.1", 0))
    other = subprocess.Popen([sys.executable, "-c", RECEIVE, str(size), str(server.getsockname()[1])])
    sock, _ = server.accept()
    data = np.ones(size, dtype=np.uint8).data
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for at in range(0, size, 8 << 20):
            sock.sendall(data[at : at + (8 << 20)])
        sock.recv(1)
        times.append(time.perf_counter() - began)
    sock.close()
    server.close()
    other.wait()
    return min(times)


def exchange(rank: int, meeting: str, mib: int, rounds: int) -> None:
    """One of two processes: sends, or receives and says how long each way took."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    piece, count = torch.ones(8 << 20, dtype=torch.uint8), mib // 8
    view, secret = piece.numpy().data, b"the job's"
    if rank == 0:
        server = socket.create_server(("127.0.0.1", 0))
        dist.send(torch.tensor(server.getsockname()[1]), 1)
        sock, _ = server.accept()
        wire = accept(sock, secret, 5.0)
    else:
        port = torch.zeros((), dtype=torch.int64)
        dist.recv(port, 0)
        wire = connect(f"127.0.0.1:{port}", secret, 5.0)
    ways: dict[str, Callable[[], object]] = {
        "connections of keepers": lambda: wire.send_bytes([view]) if rank == 0 else wire.fill([view]),
        "process group (gloo)": lambda: dist.send(piece, 1) if rank == 0 else dist.recv(piece, 0),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, move in ways.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(count):
                move()
            times[name].append(time.perf_counter() - began)
    for name, took in times.items() if rank == 1 else ():
        rates = sorted(mib / 1024 / seconds for seconds in took[1:])
        print(f"  {name:44} {statistics.median(rates):7.2f} ({rates[0]:.2f} .. {rates[-1]:.2f})", flush=True)
    wire.close()
    dist.destroy_process_group()


def transport(mib: int, rounds: int) -> None:
    """The table of bandwidths."""
    print(f"transport: GiB/s of {mib} MiB from process to process, medians of {rounds} (min .. max)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        mp.start_processes(exchange, (f"{scratch}/meeting", mib, rounds), nprocs=2, start_method="spawn")


def memory(mib: int, rounds: int) -> None:
    """The table of seconds and bytes."""
    print(f"memory: {mib} MiB of FSDP2 state, 4 ranks to 3, medians of {rounds} (min .. max)")
    told: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as scratch:
        for turn in range(rounds):
            for dim in (0, 1):
                took, moved, fewest, rates = from_memory(Path(scratch) / f"{turn}.{dim}", mib, dim)
                told.setdefault(f"from memory, shards on dim {dim}", []).append(took)
                for name, rate in zip(("keepers' connections", "process group"), rates, strict=False):
                    told.setdefault(f"  tried by all ranks, GiB/s: {name}", []).append(rate)
                told.setdefault(f"moved over the least possible, dim {dim}", []).append(moved / fewest)
                told.setdefault("a plain socket, as many bytes", []).append(through_a_socket(moved))
            folder = Path(scratch) / f"{turn}.dcp"
            folder.mkdir()
            save, load = (ranks(action, size, folder, mib)["seconds"] for action, size in (("save", 4), ("dcp", 3)))
            told.setdefault("dcp.save + dcp.load", []).append(save + load)
            told.setdefault("  of which dcp.load", []).append(load)
            subprocess.run(["rm", "-r", str(folder)], check=True)
    for name, values in told.items():
        print(f"  {name:44} {statistics.median(values):7.3f} ({min(values):.3f} .. {max(values):.3f})")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    args = parser.parse_args(argv)
    print(f"{os.cpu_count()} cores; python benchmarks/bench_reshard.py {' '.join(sys.argv[1:])}", flush=True)
    if "memory" in args.only:
        memory(args.mib, args.rounds)
    if "transport" in args.only:
        transport(args.mib, args.rounds)
    if "planner" in args.only:
        planner()


if __name__ == "__main__":
    main()
