"""Peers that recover without restarting the survivors, measured where they are installed.

Both shrink from four processes to three, in processes that go on.  Every kill has a job of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from metrics import Metrics, Row, last_first_step

from resilient_train.testing.job import Job

SCRIPTS = Path(__file__).parent / "scripts"
RANKS = 4
PATIENCE = 60.0
"""Seconds for a peer to start, and to recover."""

# On top of torchft's defaults; how many replicas make a quorum has none.
LIGHTHOUSE = {
    "default": ["--min_replicas=2"],
    "tuned": ["--min_replicas=2", "--heartbeat_timeout_ms=1000", "--join_timeout_ms=500", "--quorum_tick_ms=10"],
}


class NoProgress(Exception):
    """What was waited for did not happen in time; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of all kills of one peer in one mode."""

    name: str
    """The row's name."""
    times: list[float]
    """Kill to the last survivor's first finished step, of the kills that it recovered from."""
    failures: list[str]
    """What went wrong in the others."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(script: str, arguments: list[str], folder: Path, env: dict[str, str]) -> Job:
    return Job(SCRIPTS / script, arguments, log_dir=folder, env=env, launcher=[sys.executable])


def nvrx(mode: str, folder: Path) -> Iterator[Job]:
    """Four ranks; c10d's warnings are off, for each poll of the wrapper's store prints one, and they slow it down."""
    env = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    env |= {"MASTER_PORT": str(free_port()), "NVRX_PORT": str(free_port())}
    for rank in range(RANKS):
        yield python("nvrx.py", [str(folder), "1000000", mode], folder, {**env, "RANK": str(rank)})


def torchft(mode: str, folder: Path) -> Iterator[Job]:
    """The lighthouse, then four replicas."""
    address = f"127.0.0.1:{free_port()}"
    env = {"TORCHFT_LIGHTHOUSE": f"http://{address}", "RUST_LOG": "warn"}
    yield python("lighthouse.py", [f"--bind={address}", *LIGHTHOUSE[mode]], folder, env)
    for replica in range(RANKS):
        yield python("torchft_ddp.py", [str(folder), "1000000", str(replica), mode], folder, env)


PEERS: list[tuple[str, str, str, Callable[[str, Path], Iterator[Job]]]] = [
    ("nvidia_resiliency_ext", "nvidia-resiliency-ext", "NVRx {}, abort for gloo added, no state", nvrx),
    ("torchft", "torchft-nightly", "torchft {}, replicated DDP, not FSDP", torchft),
]


def wait(condition: Callable[[], bool], what: str, jobs: list[Job]) -> None:
    """Look a few times a second, until it is so, one of ``jobs`` has ended, or the time is up.

    Raises:
        NoProgress: in the last two cases.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for job in jobs:
            if not job.running():
                print(job.output, file=sys.stderr)
                raise NoProgress(f"{what}: a process ended with {job.finish(1.0)}")
        if time.monotonic() > deadline:
            raise NoProgress(f"{what} within {PATIENCE:g} s")
        time.sleep(0.25)


def one_kill(processes: Iterator[Job], metrics: Metrics, victim: int, chance: random.Random) -> float:
    """Start the processes, kill one rank; seconds until the last of the others had finished a step without it.

    Raises:
        NoProgress: if the job did not start or did not recover.
    """
    with ExitStack() as stack:
        jobs = [stack.enter_context(job) for job in processes]
        wait(lambda: sum(r.size == RANKS for r in metrics.rows()) >= 40 * RANKS, "did not start", jobs)
        time.sleep(chance.uniform(0, 0.2))
        dying = jobs.pop(victim - RANKS)
        killed = time.monotonic()
        os.kill(dying.pid, signal.SIGKILL)

        def after() -> list[Row]:
            return [r for r in metrics.rows() if r.size < RANKS and r.at > killed]

        wait(lambda: len({r.pid for r in after()}) == RANKS - 1, "did not recover", jobs)
        return last_first_step(after(), killed)


def measure(kills: int, folder: Path) -> list[Outcome]:
    """Every installed peer, with its defaults and tuned; the others are named in a line of output."""
    chance = random.Random(0)
    outcomes = []
    for module, package, name, start in PEERS:
        if importlib.util.find_spec(module) is None:
            print(f"{package}: not installed (pip install {package})")
            continue
        print(f"{package} {importlib.metadata.version(package)}")
        for mode in ("default", "tuned"):
            outcome = Outcome(name=name.format(mode), times=[], failures=[])
            for kill in range(kills):
                metrics = Metrics(folder / f"{module}-{mode}-{kill}")
                try:
                    # Never rank 0: it hosts the wrapper's store, and its death hangs the others.
                    victim = 1 + kill % (RANKS - 1)
                    outcome.times.append(one_kill(start(mode, metrics.folder), metrics, victim, chance))
                except NoProgress as error:
                    outcome.failures.append(str(error))
            outcomes.append(outcome)
    return outcomes
