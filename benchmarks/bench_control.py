"""The control plane: how long three agents take to agree on a change, and what it costs while nothing happens.

    python benchmarks/bench_control.py [--losses 10] [--seconds 30] [--only agreement idle]

Agreement: workers of a job of three nodes are killed; from the event ``lost``, when an agent has noticed, to the first
event ``agreed``, when the store has taken the new record, and to the last, when all agents have heard of it.  All
agents are on this machine, so their clocks are one.  For 10,000 nodes it is reckoned (`resilient_train.sim.cost`).

Idle: processor time of agent, keeper and etcd while such a job trains, from ``/proc``, in percent of one core.  The
keepers of several nodes copy each other's images meanwhile: that is theirs, and no part of the control plane.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from metrics import Metrics

from resilient_train.events import Event
from resilient_train.sim.cost import Assumed, agreement
from resilient_train.testing.nodes import Nodes, free_port

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "control"))
from etcd_cluster import children_of  # noqa: E402
from etcd_cluster import running as etcd_running  # noqa: E402

SCRIPT = HERE / "scripts" / "train.py"
NODES = 3
STEPS = "100000000"
STEP_TIME = 0.25
"""Seconds that a step takes besides."""
STORES = ("etcd", "own", "embedded")
TICKS = os.sysconf("SC_CLK_TCK")


def job(store: str, folder: Path, stack: ExitStack) -> tuple[Nodes, Metrics]:
    """Three nodes of one rank each, which have made some steps."""
    metrics, meet = Metrics(folder / "metrics"), None
    if store == "etcd":
        etcd = stack.enter_context(etcd_running(3))
        etcd.ready()
        meet = ["--rdzv-backend=etcd", f"--rdzv-endpoint=etcd://{','.join(etcd.clients)}", "--rdzv-id=bench"]
    elif store == "own":
        ports = [20000 + free_port() % 5000 * 2 for _ in range(NODES)]
        endpoint = "own:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        meet = ["--rdzv-backend=etcd", f"--rdzv-endpoint={endpoint}", "--rdzv-id=bench"]
    flags = [f"--nnodes=1:{NODES}", "--nproc-per-node=1", "--rdzv-conf=last_call_timeout=60"]
    arguments = [str(folder / "metrics"), STEPS, str(STEP_TIME)]
    nodes = stack.enter_context(
        Nodes(SCRIPT, arguments, count=NODES, flags=flags, folder=folder, meet=meet, wait=store == "embedded")
    )
    until(lambda: full(metrics, 5), nodes, "full strength")
    return nodes, metrics


def until(condition: Callable[[], object], nodes: Nodes, what: str) -> None:
    """Look a few times a second."""
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline or not all(node.running() for node in nodes.jobs):
            raise RuntimeError(f"{what} did not come\n{nodes.output}")
        time.sleep(0.2)


def full(metrics: Metrics, steps: int, above: int = 0) -> bool:
    """Whether the newest world, of a generation above that, has all ranks and has made some steps."""
    rows = metrics.rows()
    newest = max((row.generation for row in rows), default=0)
    mine = [row for row in rows if row.generation == newest]
    return newest > above and len(mine) >= NODES * steps and mine[0].size == NODES


def agreements(store: str, losses: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds from what one agent has noticed to the record, and until all agents have heard of it."""
    agreed, heard = [], []
    with ExitStack() as stack:
        nodes, metrics = job(store, folder, stack)
        for number in range(losses):
            node = nodes.jobs[number % NODES]
            at = time.monotonic()
            node.kill(0)

            def after(kind: str, since: float) -> list[Event]:
                return [event for event in nodes.events() if event.kind == kind and event.at > since]

            def told(since: float = at) -> bool:
                found = after("agreed", since)
                return len(found) >= NODES and bool(after("lost", since))

            until(told, nodes, "agreement")
            lost, found = after("lost", at)[0], after("agreed", at)
            generation = found[0].generation
            first = [event.at - lost.at for event in found if event.generation == generation]
            agreed.append(min(first))
            heard.append(max(first))
            until(lambda g=generation: full(metrics, 5, g), nodes, "full strength")
    return agreed, heard


def idle(store: str, seconds: float, folder: Path) -> dict[str, float]:
    """Percent of one core per node, by kind of process."""
    with ExitStack() as stack:
        nodes, metrics = job(store, folder, stack)
        time.sleep(5.0)  # The first steps bring audits and new slots.
        processes: dict[str, list[int]] = {"agent": [node.pid for node in nodes.jobs]}
        processes["keeper"] = [pid for node in nodes.jobs for pid in node.keepers()]
        if store == "own":
            processes["etcd"] = [pid for node in nodes.jobs for pid in children_of(node.pid) if name(pid) == "etcd"]
        assert all(len(pids) == NODES for pids in processes.values()), processes
        before = {kind: [used(pid) for pid in pids] for kind, pids in processes.items()}
        steps, began = len(metrics.rows()), time.monotonic()
        time.sleep(seconds)
        lasted = time.monotonic() - began
        made = (len(metrics.rows()) - steps) / NODES
        found = {
            kind: 100 * statistics.mean(used(pid) - was for pid, was in zip(pids, before[kind], strict=True)) / lasted
            for kind, pids in processes.items()
        }
    return {**found, "steps": made}


def name(pid: int) -> str:
    """A process's program."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def used(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def spread(times: Sequence[float]) -> str:
    """Milliseconds: median (min .. max)."""
    return f"{1000 * statistics.median(times):6.1f} ({1000 * min(times):5.1f} .. {1000 * max(times):5.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=10, help="workers killed with each store")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training that is watched")
    parser.add_argument("--only", nargs="*", choices=("agreement", "idle"), default=["agreement", "idle"])
    parser.add_argument("--stores", nargs="*", choices=STORES, default=list(STORES))
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo")
    print(f"command: {' '.join(['python', 'benchmarks/bench_control.py', *sys.argv[1:]])}")
    print(f"load when it began: {os.getloadavg()[0]:.1f}")
    if "agreement" in args.only:
        print(f"\n{'agreement, ms: median (min .. max)':<36}{'record agreed':<26}{'all agents have heard'}")
        for store in args.stores:
            with tempfile.TemporaryDirectory() as scratch:
                agreed, heard = agreements(store, args.losses, Path(scratch))
            print(f"{f'3 nodes, {store}':<36}{spread(agreed):<26}{spread(heard)}", flush=True)
        agreed_at, heard_at = agreement(10_000, 8)
        print(f"{'10,000 nodes of 8 ranks, reckoned':<36}{1000 * agreed_at:6.1f}{'':<20}{1000 * heard_at:6.1f}")
        print("reckoned from:", ", ".join(f"{key} {value:g}" for key, value in asdict(Assumed()).items()))
    if "idle" in args.only:
        print("\nprocessor time per node while a job of three nodes trains, percent of one core")
        for store in args.stores:
            with tempfile.TemporaryDirectory() as scratch:
                found = idle(store, args.seconds, Path(scratch))
            steps = found.pop("steps")
            parts = ", ".join(f"{kind} {value:.2f}" for kind, value in found.items())
            print(f"{store:<10} {parts}; {steps / args.seconds:.1f} steps a second", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
