"""Faults of every kind, one after the other, on real jobs of three nodes over a real etcd of three members.

    python tests/multiprocess/chaos.py FAULTS [SEED]

The faults are spread over four jobs: a plain one; one with standbys; one that needs two nodes; and, where this
process may make them, one whose nodes have networks of their own, that can be cut.  After each fault its effect must be
seen: another world, or, where that is the promise, none; and then steps at full strength.  At the end: the faults by
kind, how long the job stood still after each, and the proof that nothing was lost: every batch used exactly once, and
parameters that equal those of a run without faults but for the order of sums.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from chaos_job import NODES, RANKS, WITHIN, ChaosJob
from etcd_cluster import running

from resilient_train.testing.network import Network, may_make_networks

AWAY = "training goes on, changes of the world wait"
PARKED = "too few are left, waiting for replacements"
CLOSE = 1e-3
"""Parameters that differ by more are not those of the same training."""


# ---- workers --------------------------------------------------------------------------------------------------------


def kill_worker(job: ChaosJob) -> None:
    _, node = job.node()
    _, pid = job.rank(node)
    with job.change():
        node.signal_process(pid, signal.SIGKILL)


def kill_two_workers(job: ChaosJob) -> None:
    """Of two nodes, at once."""
    nodes = job.chance.sample(job.busy_nodes(), 2)
    victims = [(node, job.rank(node)[1]) for _, node in nodes]
    with job.change():
        for node, pid in victims:
            node.signal_process(pid, signal.SIGKILL)


def stop_worker(job: ChaosJob) -> None:
    """It is found out, ended and replaced; nobody has to continue it."""
    _, node = job.node()
    member, pid = job.rank(node)
    with job.change():
        node.signal_process(pid, signal.SIGSTOP)
    assert job.lost(member), f"somebody else than {member} was lost\n{job.nodes.output}"
    job.until(lambda: pid not in node.workers().values(), "the end of the stopped worker")


def stuck_worker(job: ChaosJob) -> None:
    """The process lives, its monitor thread answers (or not, as it may hold Python's lock); the training stands."""
    _, node = job.node()
    member, pid = job.rank(node)
    with job.change():
        job.hang(pid, job.chance.choice(("sleep", "spin", "gil")))
    assert job.lost(member), f"somebody else than {member} was lost\n{job.nodes.output}"
    job.until(lambda: pid not in node.workers().values(), "the end of the stuck worker")


def kill_worker_with_standby(job: ChaosJob) -> None:
    """The next world is as large as the last."""
    job.until(lambda: job.all_ready(RANKS + 1), "standbys")
    at = time.monotonic()
    kill_worker(job)
    assert job.sizes(at) == {NODES * RANKS}, f"worlds of {job.sizes(at)} ranks\n{job.nodes.output}"


# ---- nodes ----------------------------------------------------------------------------------------------------------


def kill_node(job: ChaosJob) -> None:
    with job.change():
        job.nodes.kill(job.node()[0])
    job.nodes.start()


def kill_first_node(job: ChaosJob) -> None:
    """It proposes, and serves the group's store."""
    with job.change():
        job.nodes.kill(job.busy_nodes()[0][0])
    job.nodes.start()


def kill_agent(job: ChaosJob) -> None:
    """Its workers die with it; its keeper goes on serving."""
    with job.change():
        job.nodes.kill(job.node()[0], keeper=False)
    job.nodes.start()


def stop_agent(job: ChaosJob) -> None:
    """Until the others have gone on without it."""
    _, node = job.node()
    with job.change():
        node.signal(signal.SIGSTOP)
    node.signal(signal.SIGCONT)


def pause_agent(job: ChaosJob) -> None:
    """For less than it takes to be suspected."""
    _, node = job.node()
    with job.no_change():
        node.signal(signal.SIGSTOP)
        time.sleep(job.chance.uniform(0.1, 0.4) * WITHIN)
        node.signal(signal.SIGCONT)


def silence_node(job: ChaosJob) -> None:
    """Agent and workers stand still until the others have gone on; then the same processes are taken in again."""
    _, node = job.node()
    pids = set(node.workers().values())
    with job.change():
        job.silence(node, signal.SIGSTOP)
    job.silence(node, signal.SIGCONT)
    at = time.monotonic()
    job.until(lambda: job.steps_of(pids, at), "steps of the node that was silent")


def drain_node(job: ChaosJob) -> None:
    index, node = job.node()
    with job.change():
        node.signal(signal.SIGTERM)
        assert node.finish(120.0) == 0, node.output
        job.nodes.killed.add(index)
    job.nodes.start()


def kill_keeper(job: ChaosJob) -> None:
    _, node = job.node()
    (before,) = node.keepers()
    with job.no_change():
        node.signal_process(before, signal.SIGKILL)
        job.until(lambda: node.keepers() and before not in node.keepers(), "another keeper")


def park(job: ChaosJob) -> None:
    """Two of three nodes are killed, one after the other; the last waits, and nobody trains."""
    first, second = job.chance.sample([index for index, _ in job.busy_nodes()], 2)
    with job.change():
        job.nodes.kill(first)
    # Each image is with the other node again.
    job.make_steps(20)
    before = job.generation()
    kept = job.said(PARKED)
    job.nodes.kill(second)
    job.until(lambda: job.said(PARKED) > kept, "the wait for replacements")
    at = time.monotonic()
    job.nodes.start()
    if job.chance.random() < 0.5:
        job.nodes.start()
        both = True
    else:
        both = False
    job.until(lambda: job.generation() > before, "another world")
    assert job.sizes(at) <= {2 * RANKS, 3 * RANKS}, job.sizes(at)
    if not both:
        job.nodes.start()


def cut_node(job: ChaosJob) -> None:
    """All its packets are dropped until the others have gone on; it makes no step meanwhile, and comes back."""
    assert job.network is not None
    index, node = job.node()
    pids = set(node.workers().values())
    with job.change():
        job.network.cut(index)
    at = time.monotonic()
    job.make_steps(10)
    assert not job.steps_of(pids, at), f"a node that was cut off has made steps\n{job.nodes.output}"
    job.network.mend(index)
    job.until(lambda: job.steps_of(pids, at), "steps of the node that was cut off")


# ---- the store ------------------------------------------------------------------------------------------------------


def kill_leader(job: ChaosJob) -> None:
    before = job.etcd.leader()
    with job.no_change():
        job.etcd.signal(signal.SIGKILL, before)
        assert job.etcd.leader() != before
        job.make_steps(5)
        job.etcd.mend()


def freeze_etcd(job: ChaosJob) -> None:
    _away(job, signal.SIGSTOP)


def kill_etcd(job: ChaosJob) -> None:
    """All of it; it comes back with its data."""
    _away(job, signal.SIGKILL)


def _away(job: ChaosJob, number: signal.Signals) -> None:
    """Until the job has noticed, and some seconds more."""
    noticed = job.said(AWAY)
    with job.no_change():
        job.etcd.signal(number)
        job.until(lambda: job.said(AWAY) > noticed, "word of the store's silence")
        time.sleep(job.chance.uniform(0.0, 6.0))
        job.make_steps(5)
        answers = job.said("the control store answers again")
        job.etcd.mend()
        job.until(lambda: job.said("the control store answers again") > answers, "word of the store's return")


def kill_node_and_leader(job: ChaosJob) -> None:
    with job.change():
        job.etcd.signal(signal.SIGKILL, job.etcd.leader())
        job.nodes.kill(job.node()[0])
    job.etcd.mend()
    job.nodes.start()


# ---- the run --------------------------------------------------------------------------------------------------------

Fault = Callable[[ChaosJob], None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the jobs."""

    name: str
    flags: tuple[str, ...]
    faults: tuple[Fault, ...]
    share: int
    """Of the faults, in proportion to the others'."""
    network: bool = False


PLAIN = (
    *(kill_worker, kill_two_workers, stop_worker, stuck_worker),
    *(kill_node, kill_first_node, kill_agent, stop_agent, pause_agent, silence_node, drain_node, kill_keeper),
    *(kill_leader, freeze_etcd, kill_etcd, kill_node_and_leader),
)
KINDS = (
    Kind(name="plain", flags=(f"--nnodes=1:{NODES}",), faults=PLAIN, share=16),
    Kind(
        name="standby",
        flags=(f"--nnodes=1:{NODES}", "--standby=1"),
        faults=(kill_worker_with_standby, kill_node, stop_worker),
        share=3,
    ),
    Kind(name="min", flags=(f"--nnodes=2:{NODES}",), faults=(park, kill_node, drain_node), share=3),
    Kind(
        name="network", flags=(f"--nnodes=1:{NODES}",), faults=(cut_node, kill_worker, kill_node), share=3, network=True
    ),
)


class Chaos:
    """The faults, and what they did."""

    def __init__(self, seed: int, say: Callable[[str], None]) -> None:
        self._seed = seed
        self._say = say
        self._number = 0
        self.furthest = 0.0
        self.pauses: dict[str, list[float]] = {}

    def run(self, kind: Kind, faults: int, folder: Path) -> None:
        """Hurt one job so many times."""
        chance = random.Random(f"{self._seed} {kind.name}")
        with ExitStack() as stack:
            network = stack.enter_context(Network(NODES + 2 * faults)) if kind.network else None
            etcd = stack.enter_context(running(3, host=network.host if network is not None else "127.0.0.1"))
            etcd.ready()
            job = ChaosJob(folder / f"{kind.name}-{self._seed}", etcd, chance, kind.flags, network)
            stack.callback(job.close)
            job.make_steps(10, NODES * RANKS)
            order: list[Fault] = []
            for _ in range(faults):
                order = order or chance.sample(kind.faults, len(kind.faults))
                time.sleep(chance.uniform(0.0, 0.5))
                self._one(kind, job, order.pop())
            steps, furthest = job.finish()
        self._say(
            f"{kind.name}: {faults} faults, {steps} steps, every batch used once, parameters within {furthest:.1e}"
        )
        self.furthest = max(self.furthest, furthest)
        assert furthest < CLOSE, furthest

    def _one(self, kind: Kind, job: ChaosJob, fault: Fault) -> None:
        name, at = fault.__name__.replace("_", " "), time.monotonic()
        try:
            fault(job)
            job.make_steps(10, NODES * RANKS)
        except AssertionError as error:
            raise AssertionError(f"fault {self._number}, {kind.name}: {name}: {error}") from error
        pause = job.longest_pause(at)
        self.pauses.setdefault(name, []).append(pause)
        whole = time.monotonic() - at
        self._say(f"{self._number:4} {kind.name:<8} {name:<25} stood still {pause:5.2f} s, whole after {whole:5.1f} s")
        self._number += 1

    def report(self) -> list[str]:
        """Faults by kind, and how long the job stood still after each."""
        lines = [f"{'fault':<25} {'count':>5} {'median s':>9} {'worst s':>8}"]
        every = [pause for pauses in self.pauses.values() for pause in pauses]
        for name, pauses in [*sorted(self.pauses.items()), ("all", every)]:
            lines.append(f"{name:<25} {len(pauses):>5} {statistics.median(pauses):>9.2f} {max(pauses):>8.2f}")
        return lines


def run(faults: int, seed: int, folder: Path, say: Callable[[str], None], names: Sequence[str] = ()) -> None:
    """The whole program."""
    say(f"seed {seed}")
    kinds = [kind for kind in KINDS if (not names or kind.name in names) and (not kind.network or may_make_networks())]
    chaos, shares, begun = Chaos(seed, say), sum(kind.share for kind in kinds), 0
    for number, kind in enumerate(kinds):
        until = round(faults * sum(kind.share for kind in kinds[: number + 1]) / shares)
        if until > begun:
            chaos.run(kind, until - begun, folder)
        begun = until
    for line in chaos.report():
        say(line)
    say(f"parameters differ by at most {chaos.furthest:.1e} from those of runs without faults")


if __name__ == "__main__":
    count, chosen = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        run(count, chosen, Path(scratch), lambda text: print(text, flush=True), sys.argv[3:])
    print(json.dumps({"faults": count, "seed": chosen, "seconds": round(time.monotonic() - began)}))
