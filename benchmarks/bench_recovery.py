"""Kill of one of four ranks to the first finished step on the survivors, FSDP2, gloo, one machine.

    python benchmarks/bench_recovery.py [--kills 7] [--peer-kills 3]

In the same run: the same script under torchrun (which restarts all processes), the cost of the torch calls alone, and
NVIDIA's in-process wrapper if it is installed.  Times are medians; the machine's noise is in the spread beside them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from resilient_train.events import STAGES, Incident, incidents
from resilient_train.testing.job import Job

HERE = Path(__file__).parent
RANKS = 4


def finished_steps(folder: Path) -> list[tuple[int, int, int, int, float]]:
    """(step, size, generation, pid, time) of every finished step of every rank so far."""
    rows = []
    for path in folder.iterdir():
        for line in path.read_text().split("\n")[:-1]:
            step, size, generation, pid, at = line.split()
            rows.append((int(step), int(size), int(generation), int(pid), float(at)))
    return rows


def ours(kills: int, folder: Path) -> tuple[list[float], list[Incident], list[float]]:
    """(kill to the last survivor's first step, their incidents, times of the kills)."""
    chance = random.Random(0)
    metrics = folder / "ours"
    metrics.mkdir()
    times, at = [], []
    arguments = [str(metrics), "1000000"]
    with Job(HERE / "scripts" / "train.py", arguments, flags=[f"--nproc-per-node={RANKS}"], log_dir=folder) as job:
        generation = 1
        for _ in range(kills):
            full = generation

            def at_full_strength(full: int = full) -> bool:
                return sum(r[2] == full and r[1] == RANKS for r in finished_steps(metrics)) >= 40 * RANKS

            job.wait_for(at_full_strength, 120, "full strength")
            before = job.workers()
            # Any instant of a step is as good as any other.
            time.sleep(chance.uniform(0, 0.2))
            killed = job.kill(chance.randrange(RANKS))
            at.append(killed)

            def survivors_step(new: int = generation + 1) -> bool:
                return len({r[3] for r in finished_steps(metrics) if r[2] == new}) == RANKS - 1

            job.wait_for(survivors_step, 60, "a step of the survivors")
            rows = [r for r in finished_steps(metrics) if r[2] == generation + 1]
            assert {r[3] for r in rows} < set(before.values()), "survivors' process ids changed"
            times.append(max(min(r[4] for r in rows if r[3] == pid) for pid in {r[3] for r in rows}) - killed)
            generation += 2
        return times, incidents(job.events()), at


def torchrun(kills: int, folder: Path) -> list[float]:
    """The same script under torchrun: kill to the last rank's first step after the restart."""
    metrics = folder / "torchrun"
    metrics.mkdir()
    flags = [f"--nproc-per-node={RANKS}", f"--max-restarts={kills}", "--monitor-interval=0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    times = []
    with Job(
        HERE / "scripts" / "train.py",
        [str(metrics), "1000000"],
        flags=flags,
        log_dir=folder,
        env=env,
        launcher=launcher,
    ) as job:
        known: set[int] = set()
        for _ in range(kills):

            def stepping(old: frozenset[int] = frozenset(known)) -> bool:
                pids = [r[3] for r in finished_steps(metrics) if r[3] not in old]
                return len(set(pids)) == RANKS and len(pids) >= 40 * RANKS

            job.wait_for(stepping, 120, "four ranks at work")
            pids = {r[3] for r in finished_steps(metrics)} - known
            known |= pids
            killed = time.monotonic()
            os.kill(max(pids), 9)

            def restarted(old: frozenset[int] = frozenset(known)) -> bool:
                return len({r[3] for r in finished_steps(metrics)} - old) == RANKS

            job.wait_for(restarted, 120, "the restart")
            rows = [r for r in finished_steps(metrics) if r[3] not in known]
            times.append(max(min(r[4] for r in rows if r[3] == pid) for pid in {r[3] for r in rows}) - killed)
    return times


def floor(runs: int) -> list[tuple[float, float, float]]:
    """(seen, formed, stepped) in plain torch."""
    found = []
    for _ in range(runs):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "scripts" / "floor.py")]
        output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env).stdout
        seen, formed, stepped = map(float, output.split()[-3:])
        found.append((seen, formed, stepped))
    return found


def row(name: str, times: Sequence[float], base: float) -> str:
    """A line of the table: median, spread, ratio to ours."""
    middle = statistics.median(times)
    return f"{name:<46}{middle:8.3f}   {min(times):7.3f} .. {max(times):6.3f}   n={len(times):<3}{middle / base:6.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=9, help="of ours")
    parser.add_argument("--peer-kills", type=int, default=3, help="of torchrun's, and runs of the floor")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo")
    print(f"command: {' '.join(['python', 'benchmarks/bench_recovery.py', *sys.argv[1:]])}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mine, found, kills = ours(args.kills, folder)
        base = statistics.median(mine)
        bottom = floor(args.peer_kills)
        theirs = torchrun(args.peer_kills, folder)
    print(f"{'kill to first finished step of all, seconds':<46}{'median':>8}   {'min .. max':>17}")
    print(row("resilient_train, 3 survivors, state resharded", mine, base))
    print(row("torchrun, all 4 processes restarted", theirs, base))
    print(row("plain torch calls alone, nothing restored", [stepped for _, _, stepped in bottom], base))
    print(f"\nours above the floor: {base - statistics.median(s for _, _, s in bottom):.3f} s")
    print(f"torchrun / ours: {statistics.median(theirs) / base:.1f}x")
    print("\nwhere ours goes, ms after the kill (medians of the last rank):")
    losses = [incident for incident in found if incident.reason.startswith("lost")]
    for stage in STAGES:
        values = [1000 * (i.stages[stage] - at) for i, at in zip(losses, kills, strict=False) if stage in i.stages]
        if values:
            print(f"  {stage.replace('_', ' '):<12}{statistics.median(values):7.0f}")
    parts = [statistics.median(column) * 1000 for column in zip(*bottom, strict=True)]
    print("where the floor goes: seen {:.0f}, formed {:.0f}, stepped {:.0f}".format(*parts))
    for name in ("nvidia_resiliency_ext", "torchft"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed, not measured")


if __name__ == "__main__":
    main()
