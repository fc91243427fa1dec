"""What saving costs a training loop, and how long until it is safe: ours beside torch.save and DCP, on CPU.

    python benchmarks/bench_checkpoint.py [--mib 1024] [--ranks 1] [--steps 10] [--pairs 3] [--rounds 3]

Every way of saving runs the same loop in processes of its own, ``--rounds`` times: a stack of linear layers with fused
AdamW, float32, sharded (FSDP2) if there are several ranks, whose forward and backward take about ``--ratio`` times as
long as one copy of a rank's part of the state.  In each process stretches of ``--steps`` steps with saving and without
take turns, and the loss is the mean step with it minus the mean step without.  All make the same durable checkpoints,
one in a stretch; ours takes a snapshot at every step besides.  The machine's limits are measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from resilient_train import _native

SCRIPT = Path(__file__).parent / "scripts" / "checkpoint_loop.py"
MODES = ("ours", "ours-eager", "dcp-best", "dcp-async", "dcp-save", "torch-save")
NAMES = {
    "ours": "resilient_train, snapshot at every step",
    "ours-eager": "resilient_train, lazy=False",
    "dcp-best": "dcp.async_save, best configuration",
    "dcp-async": "dcp.async_save",
    "dcp-save": "dcp.save",
    "torch-save": "torch.save",
}


def limits(size: int, folder: Path) -> tuple[float, float, float]:
    """Seconds to copy ``size`` bytes into warm memory: plainly, with checksums past the caches; to write and fsync."""
    source, target = np.ones(size, dtype=np.uint8), np.ones(size + (1 << 20), dtype=np.uint8)
    copier = _native.Copier([(0, source.ctypes.data, size, False)], 0, size)

    def plain() -> None:
        target[:size] = source

    def summed() -> None:
        copier.start(target.ctypes.data)
        copier.wait()

    def written() -> None:
        with (folder / "limit").open("wb", buffering=0) as file:
            view = source.data
            for at in range(0, size, 8 << 20):
                file.write(view[at : at + (8 << 20)])
            os.fsync(file.fileno())
        (folder / "limit").unlink()

    once, with_sums, durable = (
        statistics.median(timed(action) for _ in range(5)) for action in (plain, summed, written)
    )
    return once, with_sums, durable


def timed(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def run(mode: str, ranks: int, folder: Path, options: list[str]) -> dict:
    """One loop in processes of its own; what rank 0 measured."""
    command = [sys.executable, str(SCRIPT), mode, str(folder), *options]
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        env = {**os.environ, **{name: str(value) for name, value in place.items()}}
        # No keeper of an earlier loop is to be found.
        env["TORCHELASTIC_RUN_ID"] = f"{os.getpid()}-{folder.name}"
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=1800)[0] for process in started]
    shutil.rmtree(folder, ignore_errors=True)
    found = [line for line in outputs[0].splitlines() if line.startswith("RESULT ")]
    if any(process.returncode for process in started) or not found:
        raise RuntimeError(f"{mode} failed:\n" + "\n".join(outputs))
    return json.loads(found[0].removeprefix("RESULT "))


def fitting_batch(ranks: int, options: list[str], folder: Path, wanted: float) -> tuple[int, float]:
    """(rows, step time) for steps of about ``wanted`` seconds, by two trials: a step's time is linear in the rows."""
    times = {}
    for batch in (64, 512):
        found = run("none", ranks, folder, [*options, f"--batch={batch}", "--steps=4", "--pairs=1"])
        times[batch] = statistics.median(found["without"])
    slope = (times[512] - times[64]) / 448
    batch = max(16, round(64 + (wanted - times[64]) / slope))
    return batch, times[64] + slope * (batch - 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share it")
    parser.add_argument("--steps", type=int, default=10, help="steps of a stretch")
    parser.add_argument("--pairs", type=int, default=3, help="stretches without saving, and as many with it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=4.0, help="length of a step, in copies of the state")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute; the copy has one of its own")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    args = parser.parse_args()
    # Users of torch.save have no sharded state.
    modes = [mode for mode in args.modes if args.ranks == 1 or mode != "torch-save"]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"command: {' '.join(['python', 'benchmarks/bench_checkpoint.py', *sys.argv[1:]])}")
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as scratch:
        folder = Path(scratch)
        size = (args.mib << 20) // args.ranks
        copy, summed, write = limits(size, folder)
        print(
            f"limits for the {size >> 20} MiB of a rank: memcpy {copy:.3f} s, our copy with checksums {summed:.3f} s, ",
            end="",
        )
        print(f"write and fsync {write:.3f} s ({size / write / 1e9:.2f} GB/s)")
        options = [f"--mib={args.mib}", f"--threads={args.threads}"]
        batch, step = fitting_batch(args.ranks, options, folder / "trial", args.ratio * summed)
        print(f"{batch} rows: a step should take {step:.3f} s\n")
        options += [f"--batch={batch}", f"--steps={args.steps}", f"--pairs={args.pairs}"]
        rounds = []
        for number in range(args.rounds):
            rounds.append({mode: run(mode, args.ranks, folder / f"{mode}-{number}", options) for mode in modes})
    report(rounds, modes, args.steps * args.pairs)


def report(rounds: list[dict[str, dict]], modes: list[str], steps: int) -> None:
    """The table: medians over rounds, with their spread."""
    plain = statistics.median(statistics.mean(each[mode]["without"]) for each in rounds for mode in modes)
    print(f"mean step without saving: {plain:.3f} s; {steps} steps with saving, {len(rounds)} rounds")
    print(f"{'':<42}{'lost per step, ms (min .. max)':>34}{'step':>8}{'worst step':>12}{'durable':>10}{'peak':>10}")
    for mode in modes:
        means = [(statistics.mean(each[mode]["with"]), statistics.mean(each[mode]["without"])) for each in rounds]
        lost = [1000 * (mean - base) for mean, base in means]
        ratio = statistics.median(mean / base for mean, base in means)
        worst = statistics.median(max(each[mode]["with"]) for each in rounds)
        durable = statistics.median(each[mode]["durable"] for each in rounds)
        peak = statistics.median(each[mode]["peak_mib"] for each in rounds)
        spread = f"{statistics.median(lost):8.1f} ({min(lost):7.1f} .. {max(lost):7.1f})"
        print(f"{NAMES[mode]:<42}{spread:>34}{ratio:7.2f}x{worst:10.3f} s{durable:8.2f} s{peak:6.0f} MiB")


if __name__ == "__main__":
    main()
