"""Kill of one of four ranks to the first finished step on the survivors, FSDP2, gloo, one machine.

    python benchmarks/bench_recovery.py [--kills 9] [--peer-kills 7]

In the same run: the same script under torchrun, which restarts all processes, and the cost of the torch calls alone.
Times are medians; the machine's noise is in the spread beside them.

Also in the same run, where they are installed: NVIDIA's in-process restart and torchft (see `peers.py`).

    pip install nvidia-resiliency-ext torchft-nightly

Neither does the same work as ours: NVRx restores no state, and on gloo it recovers only with an abort that
`scripts/nvrx.py` adds to its own; torchft holds whole replicas and reshards nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import peers
import torch
from metrics import Metrics, last_first_step

from resilient_train.events import STAGES, Incident, incidents
from resilient_train.testing.job import Job

HERE = Path(__file__).parent
RANKS = 4


def wait(job: Job, condition: Callable[[], bool], what: str) -> None:
    """Look a few times a second."""
    deadline = time.monotonic() + 120
    while not condition():
        if not job.running() or time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not happen\n{job.output}")
        time.sleep(0.25)


def ours(kills: int, folder: Path) -> tuple[list[float], list[Incident], list[float], float]:
    """(kill to the last survivor's first step, their incidents, times of the kills, usual step time)."""
    chance = random.Random(0)
    metrics = Metrics(folder / "ours")
    times, at = [], []
    arguments = [str(folder / "ours"), "1000000"]
    with Job(HERE / "scripts" / "train.py", arguments, flags=[f"--nproc-per-node={RANKS}"], log_dir=folder) as job:
        for kill in range(kills):
            full, new = 2 * kill + 1, 2 * kill + 2
            wait(job, lambda g=full: sum(r[2] == g for r in metrics.rows()) >= 40 * RANKS, "full strength")
            before = job.workers()
            # Any instant of a step is as good as any other.
            time.sleep(chance.uniform(0, 0.2))
            killed = job.kill(chance.randrange(RANKS))
            at.append(killed)
            wait(job, lambda g=new: len({r[3] for r in metrics.rows() if r[2] == g}) == RANKS - 1, "recovery")
            rows = [r for r in metrics.rows() if r[2] == new]
            assert {r[3] for r in rows} < set(before.values()), "survivors' process ids changed"
            times.append(last_first_step(rows, killed))
        found = incidents(job.events())
    one = sorted(r[4] for r in metrics.rows() if r[2] == 1 and r[3] == metrics.rows()[0][3])
    return times, found, at, statistics.median(b - a for a, b in itertools.pairwise(one[5:]))


def torchrun(kills: int, folder: Path) -> list[float]:
    """The same script under torchrun: kill to the last rank's first step after the restart."""
    metrics = Metrics(folder / "torchrun")
    flags = [f"--nproc-per-node={RANKS}", f"--max-restarts={kills}", "--monitor-interval=0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    arguments = [str(folder / "torchrun"), "1000000"]
    script = HERE / "scripts" / "train.py"
    times = []
    with Job(script, arguments, flags=flags, log_dir=folder, env=env, launcher=launcher) as job:
        known: set[int] = set()
        for _ in range(kills):
            old = frozenset(known)
            wait(job, lambda old=old: sum(r[3] not in old for r in metrics.rows()) >= 40 * RANKS, "work")
            known |= {r[3] for r in metrics.rows()}
            killed = time.monotonic()
            os.kill(max(known - old), 9)
            both = frozenset(known)
            wait(job, lambda old=both: len({r[3] for r in metrics.rows()} - old) == RANKS, "the restart")
            times.append(last_first_step([r for r in metrics.rows() if r[3] not in both], killed))
    return times


def floor(runs: int) -> list[tuple[float, float, float]]:
    """(seen, formed, stepped) in plain torch."""
    found = []
    for _ in range(runs):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "scripts" / "floor.py")]
        output = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=env).stdout
        seen, formed, stepped = map(float, output.split()[-3:])
        found.append((seen, formed, stepped))
    return found


def row(name: str, times: Sequence[float], base: float) -> str:
    """A line of the table: median, spread, ratio to ours."""
    if not times:
        return f"{name:<46}not measured"
    middle = statistics.median(times)
    return f"{name:<46}{middle:8.3f}   {min(times):7.3f} .. {max(times):6.3f}   n={len(times):<3}{middle / base:6.1f}x"


def peer_row(outcome: peers.Outcome, base: float) -> str:
    """A peer's line of the table, and what it did not recover from."""
    if not outcome.times:
        return f"{outcome.name:<46}{outcome.failures[0]} (all of {len(outcome.failures)})"
    failed = f"   and {len(outcome.failures)}x {outcome.failures[0]}" if outcome.failures else ""
    return row(outcome.name, outcome.times, base) + failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=9, help="of ours")
    parser.add_argument(
        "--peer-kills",
        type=int,
        default=7,
        help="of torchrun's and of each peer's, and runs of the floor; 0: ours alone",
    )
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo")
    print(f"command: {' '.join(['python', 'benchmarks/bench_recovery.py', *sys.argv[1:]])}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mine, found, kills, usual = ours(args.kills, folder)
        base = statistics.median(mine)
        bottom = floor(args.peer_kills)
        theirs = torchrun(args.peer_kills, folder) if args.peer_kills else []
        others = peers.measure(args.peer_kills, folder) if args.peer_kills else []
    print(f"{'kill to first finished step of all, seconds':<46}{'median':>8}   {'min .. max':>17}")
    print(row("resilient_train, 3 survivors, state resharded", mine, base))
    print(row("torchrun, all 4 processes restarted", theirs, base))
    for outcome in others:
        print(peer_row(outcome, base))
    print(row("plain torch calls alone, nothing restored", [stepped for _, _, stepped in bottom], base))
    print(f"\na usual step on 4 ranks takes {usual:.3f} s")
    if args.peer_kills:
        print(f"ours above the floor: {base - statistics.median(s for _, _, s in bottom):.3f} s")
        print(f"torchrun / ours: {statistics.median(theirs) / base:.1f}x")
    print("\nwhere ours goes, ms after the kill (medians of the last rank):")
    losses = [incident for incident in found if incident.reason.startswith("lost")]
    for stage in STAGES:
        values = [1000 * (i.stages[stage] - at) for i, at in zip(losses, kills, strict=False) if stage in i.stages]
        if values:
            print(f"  {stage.replace('_', ' '):<12}{statistics.median(values):7.0f}")
    if bottom:
        parts = [statistics.median(column) * 1000 for column in zip(*bottom, strict=True)]
        print("where the floor goes: seen {:.0f}, formed {:.0f}, stepped {:.0f}".format(*parts))


if __name__ == "__main__":
    main()
