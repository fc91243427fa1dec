"""Faults of every kind, one after the other, on a real job of three nodes over a real etcd of three members.

    python tests/multiprocess/chaos.py FAULTS [SEED]

After every fault the job must make steps again, at full strength once what was lost is back.  At the end: the faults by
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
from collections.abc import Callable
from pathlib import Path

import records
from etcd_cluster import EtcdCluster, running

from resilient_train.spec.messages import STACKS_SIGNAL
from resilient_train.testing.job import Job
from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
NODES, RANKS = 3, 2
WITHIN = 2.0
"""Seconds within which the job notices a silent node or a rank that hangs."""
PATIENCE = 120.0
"""Seconds for the job to be whole again."""
STEPS = 1_000_000
"""More than it will get to: the job is told when it has made enough."""


class Chaos:
    """A job, an etcd, and what is done to them."""

    def __init__(self, seed: int, folder: Path, etcd: EtcdCluster, say: Callable[[str], None]) -> None:
        self._chance = random.Random(seed)
        self._folder = folder
        self._etcd = etcd
        self._say = say
        self.record = folder / "record"
        self.pauses: dict[str, list[float]] = {}
        endpoint = "etcd://" + ",".join(etcd.clients)
        meet = ["--rdzv-backend=etcd", f"--rdzv-endpoint={endpoint}", "--rdzv-id=chaos"]
        flags = [f"--nnodes=1:{NODES}", f"--nproc-per-node={RANKS}", f"--detect-within={WITHIN}"]
        script = ["--record", str(self.record), "--steps", str(STEPS), "--stop-file", str(folder / "stop")]
        script += ["--step-time", "0.02", "--parameters"]
        self.nodes = Nodes(
            SCRIPT,
            script,
            count=NODES,
            flags=[*flags, "--rdzv-conf=last_call_timeout=60"],
            folder=folder / "logs",
            meet=meet,
        )

    # ---- faults -----------------------------------------------------------------------------------------------------

    def _kill_worker(self) -> Callable[[], None] | None:
        _, job = self._node()
        job.kill(self._chance.choice(job.slots()))
        return None

    def _kill_node(self) -> Callable[[], None]:
        index, _ = self._node()
        self.nodes.kill(index)
        return self._start_node

    def _kill_agent(self) -> Callable[[], None]:
        index, _ = self._node()
        self.nodes.kill(index, keeper=False)
        return self._start_node

    def _kill_first_node(self) -> Callable[[], None]:
        self.nodes.kill(next(index for index in range(len(self.nodes.jobs)) if index not in self.nodes.killed))
        return self._start_node

    def _kill_keeper(self) -> None:
        _, job = self._node()
        job.signal_process(job.keepers()[0], signal.SIGKILL)

    def _stop_worker(self) -> None:
        # It is found out, ended and replaced; nobody has to continue it.
        _, job = self._node()
        job.kill(self._chance.choice(job.slots()), number=signal.SIGSTOP)

    def _stop_agent(self) -> Callable[[], None]:
        _, job = self._node()
        job.signal(signal.SIGSTOP)
        return lambda: job.signal(signal.SIGCONT)

    def _drain_node(self) -> Callable[[], None]:
        index, job = self._node()
        job.signal(signal.SIGTERM)
        assert job.finish(PATIENCE) == 0, job.output
        self.nodes.killed.add(index)
        return self._start_node

    def _kill_leader(self) -> Callable[[], None]:
        self._etcd.signal(signal.SIGKILL, self._etcd.leader())
        return self._etcd.mend

    def _freeze_etcd(self) -> Callable[[], None]:
        self._etcd.signal(signal.SIGSTOP)
        return self._etcd.mend

    def _node(self) -> tuple[int, Job]:
        left = [index for index in range(len(self.nodes.jobs)) if index not in self.nodes.killed]
        index = self._chance.choice(left)
        return index, self.nodes.jobs[index]

    def _start_node(self) -> None:
        self.nodes.start()

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, faults: int) -> None:
        """Do so many things to it."""
        kinds: list[Callable[[], Callable[[], None] | None]] = [
            self._kill_worker,
            self._kill_node,
            self._kill_agent,
            self._kill_first_node,
            self._kill_keeper,
            self._stop_worker,
            self._stop_agent,
            self._drain_node,
            self._kill_leader,
            self._freeze_etcd,
        ]
        self._wait_for_steps(NODES * RANKS, 10, "the start")
        order: list[Callable[[], Callable[[], None] | None]] = []
        for number in range(faults):
            if not order:
                order = self._chance.sample(kinds, len(kinds))
            time.sleep(self._chance.uniform(0.0, 0.5))
            self._one(number, order.pop())

    def _one(self, number: int, fault: Callable[[], Callable[[], None] | None]) -> None:
        name = fault.__name__.strip("_").replace("_", " ")
        at = time.monotonic()
        mend = fault()
        if mend is not None:
            # Long enough for whatever is silent to be noticed, if it is to be.
            time.sleep(WITHIN * self._chance.uniform(0.2, 2.0))
            self._wait_for_steps(1, 5, f"steps after fault {number} ({name})", since=at)
            mend()
        self._wait_for_steps(NODES * RANKS, 10, f"full strength after fault {number} ({name})", since=at)
        pause = self._longest_pause(at)
        self.pauses.setdefault(name, []).append(pause)
        self._say(f"{number:4} {name:<18} stood still {pause:5.2f} s, whole after {time.monotonic() - at:5.1f} s")

    def _steps(self, since: float) -> list[dict]:
        return [line for line in self._lines() if "step" in line and line["at"] > since]

    def _lines(self) -> list[dict]:
        return records.read(self.record) if self.record.exists() else []

    def _wait_for_steps(self, size: int, count: int, what: str, since: float = 0.0) -> None:
        """Until a world of at least ``size`` ranks has made ``count`` steps after ``since``."""
        deadline = time.monotonic() + PATIENCE
        while True:
            made = {line["step"] for line in self._steps(since) if line["size"] >= size}
            if len(made) >= count:
                return
            gone = [job for job in self.nodes.left() if not job.running()]
            if gone or time.monotonic() > deadline:
                self._show_stacks()
                raise AssertionError(f"{what} did not come\n{self.nodes.output}")
            time.sleep(0.2)

    def _show_stacks(self) -> None:
        """What every worker is doing, in the output."""
        for job in self.nodes.left():
            for pid in job.workers().values():
                job.signal_process(pid, STACKS_SIGNAL)
        time.sleep(2.0)

    def _longest_pause(self, since: float) -> float:
        times = sorted({line["at"] for line in self._steps(since)})
        return max((after - before for before, after in zip([since, *times], times, strict=False)), default=0.0)

    def finish(self) -> None:
        """Let the job end, and look at what it did."""
        steps = max(line["step"] for line in self._steps(0.0)) + 40
        # Every rank must see it before the first comes to that step, and none a half of it.
        (self._folder / "stopping").write_text(str(steps))
        (self._folder / "stopping").rename(self._folder / "stop")
        codes = self.nodes.finish(PATIENCE)
        assert codes == [0] * NODES, (codes, self.nodes.output)
        events = self.nodes.events()
        records.check_every_batch_once(self.record, events, steps)
        self._compare_parameters(steps)
        for job in self.nodes.jobs:
            assert job.leftovers(90.0) == []

    def _compare_parameters(self, steps: int) -> None:
        """Those of a run of one process without faults, but for the order in which floats were added."""
        stop = self._folder / "calm stop"
        stop.write_text(str(steps))
        calm = self._folder / "calm"
        args = [
            "--record",
            str(calm),
            "--steps",
            str(STEPS),
            "--stop-file",
            str(stop),
            "--step-time",
            "0",
            "--parameters",
        ]
        with Job(SCRIPT, args, flags=["--nproc-per-node=1"], log_dir=self._folder / "calm logs") as job:
            assert job.finish(PATIENCE * 5) == 0, job.output
        finals = [
            line["parameters"] for folder in (self.record, calm) for line in records.read(folder) if "final" in line
        ]
        assert len(finals) >= 2
        furthest = max(abs(a - b) for final in finals for a, b in zip(final, finals[-1], strict=True))
        self._say(f"parameters after {steps} steps differ by at most {furthest:.2e} from those of a run without faults")
        assert furthest < 1e-3, furthest

    def report(self) -> list[str]:
        """Faults by kind, and how long the job stood still after each."""
        lines = [f"{'fault':<18} {'count':>5} {'median s':>9} {'worst s':>8}"]
        for name, pauses in sorted(self.pauses.items()):
            lines.append(f"{name:<18} {len(pauses):>5} {statistics.median(pauses):>9.2f} {max(pauses):>8.2f}")
        every = [pause for pauses in self.pauses.values() for pause in pauses]
        return [*lines, f"{'all':<18} {len(every):>5} {statistics.median(every):>9.2f} {max(every):>8.2f}"]

    def close(self) -> None:
        """Leave nothing behind."""
        self.nodes.__exit__(None, None, None)


def run(faults: int, seed: int, folder: Path, say: Callable[[str], None]) -> None:
    """The whole program."""
    say(f"seed {seed}")
    with running(3) as etcd:
        etcd.ready()
        chaos = Chaos(seed, folder, etcd, say)
        try:
            chaos.run(faults)
            chaos.finish()
        finally:
            chaos.close()
        for line in chaos.report():
            say(line)


if __name__ == "__main__":
    count, chosen = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        run(count, chosen, Path(scratch), lambda text: print(text, flush=True))
    print(json.dumps({"faults": count, "seed": chosen, "seconds": round(time.monotonic() - began)}))
