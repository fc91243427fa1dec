"""Loss of a node, of its network, of a rank that hangs: how long the others stand still.  FSDP2, gloo, one machine.

    python benchmarks/bench_nodes.py [--kills 10] [--peer-kills 3] [--only NAME ...]

Three nodes of two ranks, each node an ``rtrun``; a SIGKILL of a node is one of its agent, workers and keeper.  State is
in memory only, copied to the next node in the background.  Times are from the fault to the first finished step of all
ranks of the world that follows, medians with their spread.  ``torchrun`` runs the same script on the same loss.
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
from pathlib import Path

import torch
from metrics import Metrics, Row, last_first_step

from resilient_train.spec.world import slot_of
from resilient_train.testing.job import Job
from resilient_train.testing.network import Network, may_make_networks
from resilient_train.testing.nodes import Nodes, free_port

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "control"))
from etcd_cluster import running as etcd_running  # noqa: E402

SCRIPT = HERE / "scripts" / "train.py"
NODES, RANKS, STEPS = 3, 2, "100000000"
COMMON = (f"--nnodes=1:{NODES}", f"--nproc-per-node={RANKS}", "--rdzv-conf=last_call_timeout=60")


def until(condition: Callable[[], object], nodes: Nodes | None, what: str) -> None:
    """Look a few times a second."""
    deadline = time.monotonic() + 180
    while not condition():
        if time.monotonic() > deadline or (nodes is not None and not all(job.running() for job in nodes.left())):
            raise RuntimeError(f"{what} did not happen\n{nodes.output if nodes is not None else ''}")
        time.sleep(0.2)


def newest(metrics: Metrics) -> list[Row]:
    """The rows of the newest generation."""
    rows = metrics.rows()
    last = max((row.generation for row in rows), default=0)
    return [row for row in rows if row.generation == last]


def settled(metrics: Metrics, size: int, steps: int = 30) -> bool:
    """Whether a world of ``size`` ranks has made some steps."""
    rows = newest(metrics)
    return len(rows) >= size * steps and rows[0].size == size


def after(metrics: Metrics, nodes: Nodes, size: int, generation: int, at: float) -> float:
    """Seconds from ``at`` to the first step of all ranks of the next world of ``size`` ranks."""

    def there() -> list[Row]:
        rows = [row for row in metrics.rows() if row.generation > generation and row.size == size]
        first = min((row.generation for row in rows), default=0)
        return [row for row in rows if row.generation == first]

    until(lambda: len({row.pid for row in there()}) == size, nodes, "recovery")
    return last_first_step(there(), at)


def kills(count: int, folder: Path, choose: Callable[[Nodes, object], int], own: bool) -> list[float]:
    """Kill a node that ``choose`` names, wait for the others, start another, again."""
    metrics, times = Metrics(folder / "metrics"), []
    arguments = [str(folder / "metrics"), STEPS]
    with ExitStack() as stack:
        etcd = None
        if own:
            ports = [20000 + free_port() % 5000 * 2 for _ in range(NODES)]
            endpoint = "own:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        else:
            etcd = stack.enter_context(etcd_running(3))
            etcd.ready()
            endpoint = "etcd://" + ",".join(etcd.clients)
        meet = ["--rdzv-backend=etcd", f"--rdzv-endpoint={endpoint}", "--rdzv-id=bench"]
        nodes = stack.enter_context(
            Nodes(SCRIPT, arguments, count=NODES, flags=COMMON, folder=folder, meet=meet, wait=not own)
        )
        for _ in range(count):
            until(lambda: settled(metrics, NODES * RANKS), nodes, "full strength")
            generation = newest(metrics)[0].generation
            at = nodes.kill(choose(nodes, endpoint))
            times.append(after(metrics, nodes, (NODES - 1) * RANKS, generation, at))
            nodes.start()
    return times


def first(nodes: Nodes, _: object) -> int:
    """The node that joined first of those that are left: it proposes, and serves the group's store."""
    return min(index for index in range(len(nodes.jobs)) if index not in nodes.killed)


def last(nodes: Nodes, _: object) -> int:
    """The node that joined last."""
    return max(index for index in range(len(nodes.jobs)) if index not in nodes.killed)


def leaders(nodes: Nodes, endpoint: object) -> int:
    """The node whose member of the job's own etcd leads."""
    from resilient_train.control.endpoint import EtcdAccess
    from resilient_train.control.etcd_client import EtcdClient
    from resilient_train.errors import StoreLost

    for index in range(len(nodes.jobs)):
        if index in nodes.killed:
            continue
        for address in str(endpoint).removeprefix("own:").split(","):
            client = EtcdClient(EtcdAccess(endpoints=(address,)), patience=2.0)
            try:
                status = client.call("Status", 2.0)
            except StoreLost:
                continue
            finally:
                client.close()
            port = address.rpartition(":")[2]
            if status.leader == status.header.member_id and nodes.jobs[index].has_child_with(f":{port}"):
                return index
    raise RuntimeError("no member of the job's own etcd leads")


def silent(count: int, folder: Path, within: float) -> list[float]:
    """All packets from and to a node are dropped."""
    times = []
    for number in range(count):
        place = folder / f"silent{number}"
        place.mkdir()
        metrics = Metrics(place / "metrics")
        flags = [*COMMON, f"--detect-within={within:g}"]
        with (
            Network(NODES) as network,
            Nodes(
                SCRIPT, [str(place / "metrics"), STEPS], count=NODES, flags=flags, folder=place, network=network
            ) as nodes,
        ):
            until(lambda m=metrics: settled(m, NODES * RANKS), nodes, "full strength")
            generation, at = newest(metrics)[0].generation, time.monotonic()
            network.cut(NODES - 1)
            times.append(after(metrics, nodes, (NODES - 1) * RANKS, generation, at))
    return times


def standby(count: int, folder: Path) -> list[float]:
    """A worker killed where another stands by: until the world is as large as before."""
    metrics, times = Metrics(folder / "metrics"), []
    flags = [f"--nproc-per-node={RANKS * 2}", "--standby=1"]
    with Job(SCRIPT, [str(folder / "metrics"), STEPS], flags=flags, log_dir=folder) as job:
        for number in range(count):
            ready = lambda n=number: sum(event.kind == "ready" for event in job.events()) >= RANKS * 2 + 1 + n  # noqa: E731
            job.wait_for(ready, 120, "a standby")
            job.wait_for(lambda: settled(metrics, RANKS * 2), 120, "full strength")
            generation = newest(metrics)[0].generation
            # Not the one that stands by, which may be in any slot after the first loss.
            ranks = {row.pid for row in newest(metrics)}
            at = job.kill(min(slot_of(member) for member, pid in job.workers().items() if pid in ranks))

            def there(g: int = generation) -> list[Row]:
                return [row for row in metrics.rows() if row.generation > g and row.size == RANKS * 2]

            job.wait_for(lambda: len({row.pid for row in there()}) == RANKS * 2, 60, "recovery")
            times.append(last_first_step(there(), at))
    return times


def joins(count: int, folder: Path) -> list[float]:
    """How long training pauses when a node joins: from the last step before to the first of all after."""
    metrics, times = Metrics(folder / "metrics"), []
    with Nodes(SCRIPT, [str(folder / "metrics"), STEPS], count=NODES, flags=COMMON, folder=folder) as nodes:
        for _ in range(count):
            until(lambda: settled(metrics, NODES * RANKS), nodes, "full strength")
            nodes.kill(last(nodes, None))
            until(lambda: settled(metrics, (NODES - 1) * RANKS), nodes, "recovery")
            generation = newest(metrics)[0].generation
            nodes.start()
            until(
                lambda g=generation: settled(metrics, NODES * RANKS) and newest(metrics)[0].generation > g,
                nodes,
                "join",
            )
            rows = metrics.rows()
            before = max(row.at for row in rows if row.generation == generation)
            times.append(last_first_step(newest(metrics), before))
    return times


def hangs(count: int, folder: Path, number: signal.Signals, within: float) -> list[float]:
    """A worker that is stopped: until the others have made a step without it."""
    metrics, times = Metrics(folder / "metrics"), []
    flags = [f"--nproc-per-node={RANKS * 2}", f"--detect-within={within:g}"]
    with Job(SCRIPT, [str(folder / "metrics"), STEPS], flags=flags, log_dir=folder) as job:
        for _ in range(count):
            job.wait_for(lambda: settled(metrics, RANKS * 2, 60), 120, "full strength")
            generation = newest(metrics)[0].generation
            at = job.kill(max(job.slots()), number=number)

            def there(g: int = generation) -> list[Row]:
                return [row for row in metrics.rows() if row.generation == g + 1]

            job.wait_for(lambda: len({row.pid for row in there()}) == RANKS * 2 - 1, 60, "recovery")
            times.append(last_first_step(there(), at))
    return times


def torchrun(count: int, folder: Path) -> list[float]:
    """The last node killed under torchrun: until all ranks of the restarted group have made a step."""
    times = []
    for number in range(count):
        place = folder / f"torchrun{number}"
        place.mkdir()
        metrics = Metrics(place / "metrics")
        endpoint = f"127.0.0.1:{free_port()}"
        flags = [*COMMON[:2], "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--max-restarts=9"]
        flags += ["--rdzv-id=bench", "--monitor-interval=0.1", "--rdzv-conf=last_call_timeout=3"]
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        with ExitStack() as stack:
            jobs = []
            for index in range(NODES):
                job = Job(
                    SCRIPT,
                    [str(place / "metrics"), STEPS],
                    flags=flags,
                    log_dir=place / str(index),
                    env=env,
                    launcher=launcher,
                )
                jobs.append(stack.enter_context(job))
                time.sleep(0.5)
            until(
                lambda m=metrics: len({row.pid for row in m.rows() if row.size == NODES * RANKS}) == NODES * RANKS,
                None,
                "start",
            )
            old = {row.pid for row in metrics.rows()}
            at = time.monotonic()
            jobs[-1].kill_all()
            fresh = lambda m=metrics, o=old: [row for row in m.rows() if row.pid not in o]  # noqa: E731
            until(lambda f=fresh: len({row.pid for row in f()}) >= (NODES - 1) * RANKS, None, "torchrun's restart")
            times.append(last_first_step(fresh(), at))
    return times


def row(name: str, times: Sequence[float], bar: str) -> str:
    """A line of the table."""
    spread = f"{min(times):6.2f} .. {max(times):5.2f}"
    return f"{name:<58}{statistics.median(times):7.2f}   {spread}   n={len(times):<3} {bar}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="faults of each kind")
    parser.add_argument("--peer-kills", type=int, default=3, help="nodes killed under torchrun; 0 for none")
    parser.add_argument("--only", nargs="*", help="names of measurements")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, gloo")
    print(f"command: {' '.join(['python', 'benchmarks/bench_nodes.py', *sys.argv[1:]])}\n")
    n = args.kills
    measurements: dict[str, tuple[str, str, Callable[[Path], list[float]]]] = {
        "node": ("node killed (etcd apart)", "bar 1.0", lambda f: kills(n, f, last, own=False)),
        "first": (
            "first node killed, which served the group's store",
            "bar 1.0",
            lambda f: kills(n, f, first, own=False),
        ),
        "leader": (
            "node killed with the leader of the job's own etcd",
            "bar 1.5",
            lambda f: kills(n, f, leaders, own=True),
        ),
        "standby": ("rank killed, one stands by: full strength again", "bar 1.5", lambda f: standby(n, f)),
        "join": ("pause for a node that joins", "bar 0.5", lambda f: joins(max(1, n // 3), f)),
        "stopped": (
            "rank stopped, --detect-within 2",
            "bar 4.0",
            lambda f: hangs(max(1, n // 2), f, signal.SIGSTOP, 2.0),
        ),
    }
    if may_make_networks():
        measurements["silent"] = (
            "node cut off, --detect-within 2",
            "bar 3.0",
            lambda f: silent(max(1, n // 3), f, 2.0),
        )
    if args.peer_kills:
        measurements["torchrun"] = (
            "torchrun: node killed, processes restarted",
            "",
            lambda f: torchrun(args.peer_kills, f),
        )
    print(f"{'from the fault to the first step of all that are left, s':<58}{'median':>7}   {'min .. max':>15}")
    for name, (title, bar, measure) in measurements.items():
        if not args.only or name in args.only:
            with tempfile.TemporaryDirectory() as scratch:
                print(row(title, measure(Path(scratch)), bar), flush=True)


if __name__ == "__main__":
    main()
