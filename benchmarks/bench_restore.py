"""How long until a state on disk is in the model again, on as many ranks or others: ours beside dcp.load, CPU.

    python benchmarks/bench_restore.py [--mib 1024] [--worlds 1:1 2:2 4:3 2:4] [--rounds 3]

A sharded (FSDP2) model with AdamW's moments is saved by the first number of ranks and restored by the second, in fresh
processes, in turns.  The files are in the page cache, for both.  The machine's limits are measured on the same files:
reading them into warm memory, and copying as many bytes, by as many threads as ranks (at most one per core).  The
optimizer's state, two thirds of all, is in memory that a new process has never touched; so as many new processes, on
all cores, read the files, a third to memory that is warm and two thirds to tensors that are not: the least that a
restore of the same state can take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

LEAST = """
import os, sys, time, torch
from concurrent.futures import ThreadPoolExecutor
rank, size, files = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
piece, warm = 4 << 20, torch.ones(4 << 20, dtype=torch.uint8)
pieces = [(file, at) for file in files for at in range(0, os.path.getsize(file), piece)][rank::size]
handles = {file: os.open(file, os.O_RDONLY) for file, _ in pieces}
targets = [torch.empty(piece, dtype=torch.uint8) if index % 3 else warm for index in range(len(pieces))]
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // size)) as pool:
    read = lambda piece, target: os.preadv(handles[piece[0]], [memoryview(target.numpy())], piece[1])
    list(pool.map(read, pieces, targets))
print(time.perf_counter() - began, flush=True)
"""
SCRIPT = Path(__file__).parent / "scripts" / "restore_once.py"


def ranks(action: str, size: int, folder: Path, mib: int) -> dict:
    """Run the script as ``size`` ranks; what rank 0 said."""
    with tempfile.TemporaryDirectory() as scratch:
        started = []
        for rank in range(size):
            place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            env = {**os.environ, **{name: str(value) for name, value in place.items()}}
            # So that no keeper of an earlier run, which still holds the state in memory, is found.
            env |= {"TORCHELASTIC_RUN_ID": uuid.uuid5(uuid.NAMESPACE_URL, scratch).hex, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(SCRIPT), action, str(folder), f"--mib={mib}", f"--store={scratch}/store"]
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate(timeout=900)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{action} on {size} ranks failed:\n" + "\n".join(outputs))
    (line,) = (line for line in outputs[0].splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def limits(folder: Path, size: int) -> tuple[int, float, float, float]:
    """(bytes of our files, seconds to read them, to copy as many bytes, to copy them to fresh memory) with ``size``
    threads; memory is warm but for the last, since the state of a new process never is."""
    threads = min(size, len(os.sched_getaffinity(0)))
    files = sorted((folder / "ours").rglob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    piece = 8 << 20
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, piece)]
    target, source = np.ones(len(pieces) * piece, dtype=np.uint8), np.ones(len(pieces) * piece, dtype=np.uint8)

    def read(index: int) -> None:
        file, at = pieces[index]
        handle = os.open(file, os.O_RDONLY)
        os.preadv(handle, [target.data[index * piece : (index + 1) * piece]], at)
        os.close(handle)

    def copy(index: int) -> None:
        target[index * piece : (index + 1) * piece] = source[index * piece : (index + 1) * piece]

    with ThreadPoolExecutor(threads) as pool:
        found: list[float] = []
        for action in (read, copy, copy):
            times = []
            for _ in range(4):
                if len(found) == 2:
                    target = torch.empty(len(source), dtype=torch.uint8).numpy()  # As tensors have it.
                began = time.perf_counter()
                list(pool.map(action, range(len(pieces))))
                times.append(time.perf_counter() - began)
            found.append(statistics.median(times[1:]))
    return total, found[0], found[1], found[2]


def least(folder: Path, size: int) -> float:
    """Seconds of ``size`` new processes to read the files, two thirds to memory that they have never touched."""
    files = [str(file) for file in sorted((folder / "ours").rglob("*.safetensors"))]
    commands = [[sys.executable, "-c", LEAST, str(rank), str(size), *files] for rank in range(size)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands
    ]
    for process in started:
        process.stdout.readline()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in started)


def compare(before: int, after: int, mib: int, rounds: int) -> None:
    """One line of the table."""
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as scratch:
        folder = Path(scratch)
        saved = ranks("save", before, folder, mib)["sample"]
        for file in folder.rglob("*"):
            if file.is_file():
                file.read_bytes()
        total, read, copy, fresh = limits(folder, after)
        times: dict[str, list[float]] = {"ours": [], "dcp": []}
        floors = []
        for _ in range(rounds):
            floors.append(least(folder, after))
            for action, found in times.items():
                result = ranks(action, after, folder, mib)
                if not np.allclose(result["sample"], saved, rtol=1e-9):
                    raise RuntimeError(f"{action} restored another state: {result['sample']}, saved was {saved}")
                found.append(result["seconds"])
    ours, dcp = (statistics.median(times[action]) for action in ("ours", "dcp"))
    spread = " ".join(f"{name} {min(found):.2f} .. {max(found):.2f}" for name, found in times.items())
    floor = statistics.median(floors)
    print(
        f"{before} -> {after}: ours {ours:6.3f} s, dcp {dcp:6.3f} s ({dcp / ours:5.1f}x); limits: read {read:.3f} s, "
        f"memcpy {copy:.3f} s, to fresh memory {fresh:.3f} s; ours reaches {max(read, copy) / ours:.2f} "
        f"of the slower of the first two; new processes that only read {floor:.3f} s, of which ours reaches "
        f"{floor / ours:.2f}  ({spread}; {total >> 20} MiB)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the whole state")
    parser.add_argument("--worlds", nargs="+", default=["1:1", "2:2", "4:3", "2:4"], help="ranks that save:restore")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    print(f"command: {' '.join(['python', 'benchmarks/bench_restore.py', *sys.argv[1:]])}")
    for world in args.worlds:
        before, _, after = world.partition(":")
        compare(int(before), int(after), args.mib, args.rounds)


if __name__ == "__main__":
    main()
