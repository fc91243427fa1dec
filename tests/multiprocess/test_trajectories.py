"""A training that loses ranks and gets others, on any mesh, is the training that it would have been."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.timeout(240)
STEPS, LENGTH, BATCH = 24, 150, 12

# One segment after the other, each a world of its own, in processes that are forked from one; what each rank did goes
# to a file of its own, a line for each step.
SCRIPT = """
import json, os, signal, sys, torch, torch.multiprocessing as mp, resilient_train as rt
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STEPS, LENGTH, BATCH = map(int, sys.argv[3:])

def train(world, kind, folder, segment, stop, die):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 10))
    if kind == "tp":
        parallelize_module(model, world.mesh["tensor"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=world.mesh["data"] if kind == "tp" else world.mesh)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step / 10))
    samples = torch.randn(LENGTH, 10, generator=torch.Generator().manual_seed(1))
    data = rt.ElasticSampler(LENGTH, global_batch=BATCH, micro_batch=2, world=world, seed=3)
    state = rt.State(model=model, optim=optim, schedule=schedule)
    ckpt = rt.Checkpointer(state, str(folder / "saved"), world=world, persist_every=4)
    for step in ckpt.steps(STEPS):
        if step == stop:
            break
        total, used = 0.0, []
        for micro in data.micro_batches(step):
            batch = samples[micro.indices]
            loss = (model(batch) - batch.flip(1)).square().mean() * micro.weight
            loss.backward()
            if micro.weight and (kind != "tp" or world.mesh.get_local_rank("tensor") == 0):
                used += micro.indices.tolist()
                total += loss.item() / world.data_size
        if step == die and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optim.step()
        optim.zero_grad()
        schedule.step()
        with (folder / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps([segment, step, total, used]) + "\\n")

def work(rank, segment, size, mesh, stop, die, kind, folder):
    where = f"file://{folder}/meeting-{segment}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    rt.elastic(mesh=mesh)(train)(kind, folder, segment, stop, die)
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    for name, segments in json.loads(sys.argv[1]).items():
        folder = Path(name)
        folder.mkdir()
        # So that the keeper of one training is not found by another.
        os.environ["TORCHELASTIC_RUN_ID"] = f"{folder.parent.name} {name}"
        for segment, (size, mesh, stop, die) in enumerate(segments):
            arguments = (segment, size, mesh, stop, die, sys.argv[2], folder.resolve())
            context = mp.start_processes(work, arguments, nprocs=size, join=False, start_method="fork")
            try:
                while not context.join():
                    pass
            except (mp.ProcessExitedException, mp.ProcessRaisedException):
                if die is None:
                    raise
                for process in context.processes:
                    process.join()
"""


class Segment(NamedTuple):
    """A world for some steps."""

    size: int
    mesh: dict[str, int]
    stop: int
    """The step before which it ends, in good order; `STEPS`: with the training."""
    die: int | None
    """The step in whose middle its last rank is killed, and the others with it."""


SIZES = {"ddp": (1, 2, 3, 4), "fsdp": (1, 2, 3, 4), "hsdp": (2, 4), "tp": (2, 4)}
MESHES = {
    "ddp": {"data": -1},
    "fsdp": {"shard": -1},
    "hsdp": {"replicate": -1, "shard": 2},
    "tp": {"data": -1, "tensor": 2},
}


def schedule(kind: str, rng: random.Random) -> list[Segment]:
    """Three or four worlds of different sizes; some end by a loss."""
    changes = sorted(rng.sample(range(3, STEPS - 2), rng.choice((2, 3))))
    found: list[Segment] = []
    for at in (*changes, None):
        size = rng.choice([size for size in SIZES[kind] if not found or size != found[-1].size])
        dies = at is not None and rng.random() < 0.6
        found.append(Segment(size, MESHES[kind], STEPS if at is None or dies else at, at if dies else None))
    return found


Curve = dict[int, tuple[float, list[int]]]
"""Step -> (its loss, the samples that it used); of a step that was made several times, what counts in the end."""


def run(folder: Path, kind: str, trainings: dict[str, list[Segment]]) -> list[Curve]:
    """What each of some trainings did."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), json.dumps(trainings), kind, str(STEPS), str(LENGTH), str(BATCH)]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=env, cwd=folder)
    assert result.returncode == 0, result.stderr
    return [curve(folder / name) for name in trainings]


def curve(folder: Path) -> Curve:
    """What the ranks of one training wrote down."""
    made: dict[int, dict[int, list[tuple[float, list[int]]]]] = {}
    for file in folder.glob("*.jsonl"):
        for segment, step, loss, used in map(json.loads, file.read_text().splitlines()):
            made.setdefault(step, {}).setdefault(segment, []).append((loss, used))
    last = {step: by_segment[max(by_segment)] for step, by_segment in made.items()}
    return {
        step: (sum(loss for loss, _ in ranks), sorted(index for _, used in ranks for index in used))
        for step, ranks in sorted(last.items())
    }


def distance(one: Curve, other: Curve) -> float:
    """How far two loss curves are apart, at most."""
    return max(abs(one[step][0] - other[step][0]) for step in range(STEPS))


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=[] if (kind, seed) == ("fsdp", 2) else pytest.mark.soak)
        for kind in SIZES
        for seed in range(4)
    ],
)
def test_a_training_with_changes_is_the_one_without(tmp_path: Path, kind: str, seed: int) -> None:
    """Its loss curve is no further from one without changes than those of the worlds that it went through are from each
    other, by the order of sums (nothing, where that is the same), and every sample is used as often as it has to be."""
    segments = schedule(kind, random.Random(f"{kind} {seed}"))
    print(f"{kind}, seed {seed}: {segments}")
    without = {str(size): [Segment(size, MESHES[kind], STEPS, None)] for size in sorted({one.size for one in segments})}
    changed, *plain = run(tmp_path, kind, {"changed": segments, **without})
    for one in (changed, *plain):
        assert list(one) == list(range(STEPS))
        assert {step: used for step, (_, used) in one.items()} == {step: used for step, (_, used) in plain[0].items()}
        epoch = sorted(index for step in range(LENGTH // BATCH) for index in one[step][1])
        assert len(set(epoch)) == len(epoch) == LENGTH // BATCH * BATCH
    between = max(distance(one, other) for one, other in itertools.combinations(plain, 2))
    assert between < 1e-4, "the worlds themselves differ by rounding only"
    assert min(distance(changed, one) for one in plain) <= between
    assert changed[STEPS - 1][0] < 0.8 * changed[0][0], "it has learned something"
