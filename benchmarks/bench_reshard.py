"""How long one rank takes to plan and to prove its part of a change from N ranks to fewer, whatever N is.

python benchmarks/bench_reshard.py
"""

from __future__ import annotations

import os
import statistics
import time
from math import prod

from resilient_train.plan.recovery import Copy, Holders, Want, copies_by_layout, prove
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cut, Cuts, held_box

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


def main() -> None:
    """Print the table."""
    print(f"{os.cpu_count()} cores")
    planner()


if __name__ == "__main__":
    main()
