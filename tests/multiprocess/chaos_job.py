"""The job that `chaos.py` hurts: what it has done, and whether it has noticed."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import records
from etcd_cluster import EtcdCluster

from resilient_train.spec.messages import STACKS_SIGNAL
from resilient_train.testing.job import Job
from resilient_train.testing.network import Network
from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
NODES, RANKS = 3, 2
WITHIN = 2.0
"""Seconds within which the job notices a silent node or a rank that hangs."""
PATIENCE = 120.0
"""Seconds for anything that has to happen."""
STEPS = 1_000_000
"""More than it will get to: the job is told when it has made enough."""


class Steps:
    """What the ranks write down, read as it grows: the observer must not cost the observed a core."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self._lines: list[dict] = []

    def since(self, at: float) -> list[dict]:
        """The steps that were finished after a time, in that order; ``pid`` says by which process."""
        self._read()
        return self._lines[bisect_right(self._lines, at, key=lambda line: line["at"]) :]

    def newest(self) -> list[dict]:
        """Those of the newest world."""
        self._read()
        last = self._lines[-1]["generation"] if self._lines else 0
        return list(takewhile(lambda line: line["generation"] == last, reversed(self._lines)))

    def _read(self) -> None:
        before = len(self._lines)
        for path in self._folder.glob("*.jsonl"):
            with path.open() as file:
                file.seek(self._offsets.get(path, 0))
                whole, _, _ = file.read().rpartition("\n")
            self._offsets[path] = self._offsets.get(path, 0) + len(whole) + bool(whole)
            for line in map(json.loads, whole.splitlines()):
                if "step" in line:
                    kept = {name: line[name] for name in ("at", "generation", "size", "step")}
                    self._lines.append({**kept, "pid": int(path.stem)})
        if len(self._lines) > before:
            self._lines.sort(key=lambda line: line["at"])


class ChaosJob:
    """Some nodes, an etcd, and means to see what becomes of them.

    Args:
        folder: for logs and records.
        etcd: where the nodes meet.
        chance: chooses whom it hits.
        flags: for every ``rtrun``, besides the usual.
        network: gives each node a network of its own.
    """

    def __init__(
        self,
        folder: Path,
        etcd: EtcdCluster,
        chance: random.Random,
        flags: Sequence[str],
        network: Network | None = None,
    ) -> None:
        folder.mkdir()
        self.etcd = etcd
        self.chance = chance
        self.network = network
        self._folder = folder
        self._record = folder / "record"
        self._hangs = folder / "hangs"
        self._hangs.mkdir()
        self._steps = Steps(self._record)
        endpoint = "etcd://" + ",".join(etcd.clients)
        script = ["--record", str(self._record), "--steps", str(STEPS), "--stop-file", str(folder / "stop")]
        script += ["--step-time", "0.1", "--parameters", "--hang-folder", str(self._hangs)]
        common = [f"--nproc-per-node={RANKS}", f"--detect-within={WITHIN:g}", "--rdzv-conf=last_call_timeout=60"]
        self.nodes = Nodes(
            SCRIPT,
            script,
            count=NODES,
            flags=[*common, *flags],
            folder=folder / "logs",
            meet=["--rdzv-backend=etcd", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={folder.name}"],
            network=network,
        )

    # ---- whom to hit ------------------------------------------------------------------------------------------------

    def node(self) -> tuple[int, Job]:
        """A node with ranks in the world."""
        return self.chance.choice(self.busy_nodes())

    def busy_nodes(self) -> list[tuple[int, Job]]:
        """The nodes with ranks in the world, in the order in which they joined."""
        pids = self._pids()
        left = [(i, job) for i, job in enumerate(self.nodes.jobs) if i not in self.nodes.killed]
        return [(i, job) for i, job in left if pids & set(job.workers().values())]

    def rank(self, job: Job) -> tuple[str, int]:
        """Member and process id of one of a node's ranks."""
        pids = self._pids()
        return self.chance.choice(sorted((member, pid) for member, pid in job.workers().items() if pid in pids))

    def _pids(self) -> set[int]:
        return {line["pid"] for line in self._steps.newest()}

    def hang(self, pid: int, how: str) -> None:
        """A training thread is stuck from its next step on."""
        (self._hangs / f"{pid}.new").write_text(how)
        (self._hangs / f"{pid}.new").rename(self._hangs / str(pid))

    # ---- what it does about it --------------------------------------------------------------------------------------

    def generation(self) -> int:
        """The world that made the last step."""
        return max((line["generation"] for line in self._steps.newest()), default=0)

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """What happens within must lead to another world, which makes steps."""
        before = self.generation()
        yield
        self.until(lambda: self.generation() > before, "another world")
        self.make_steps(5)

    @contextlib.contextmanager
    def no_change(self) -> Iterator[None]:
        """What happens within must not change the world, and training must go on in it."""
        before = self.generation()
        yield
        self.make_steps(10)
        assert self.generation() == before, f"the world has changed\n{self.nodes.output}"

    def make_steps(self, count: int, size: int = 1) -> None:
        """Until a world of at least ``size`` ranks has made ``count`` steps from now on."""
        at = time.monotonic()

        def made() -> bool:
            return len({line["step"] for line in self._steps.since(at) if line["size"] >= size}) >= count

        self.until(made, f"{count} steps of {size} ranks")

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something, while nobody ends who should not."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            gone = [job for job in self.nodes.left() if not job.running()]
            if gone or time.monotonic() > deadline:
                self._show_stacks()
                raise AssertionError(f"{what} did not come\n{self.nodes.output}")
            time.sleep(0.1)

    def said(self, text: str) -> int:
        """How often nodes have said something, those that are gone too: it only grows."""
        return sum(job.output.count(text) for job in self.nodes.jobs)

    def sizes(self, since: float) -> set[int]:
        """Sizes of the worlds that have made steps since then."""
        return {line["size"] for line in self._steps.since(since)}

    def steps_of(self, pids: set[int], since: float) -> int:
        """How many steps these processes have finished since then."""
        return sum(line["pid"] in pids for line in self._steps.since(since))

    def lost(self, member: str) -> bool:
        """Whether the job has counted this worker as lost."""
        return any(e.kind == "lost" and e.member == member for job in self.nodes.left() for e in job.events())

    def all_ready(self, workers: int) -> bool:
        """Whether every node has so many workers that have said that they are ready."""
        for job in self.nodes.left():
            running = job.workers().keys()
            ready = {event.member for event in job.events() if event.kind == "ready"}
            if len(running) < workers or running - ready:
                return False
        return True

    def longest_pause(self, since: float) -> float:
        """Seconds between two steps of anybody."""
        times = [line["at"] for line in self._steps.since(since)]
        return max((after - before for before, after in zip([since, *times], times, strict=False)), default=0.0)

    def _show_stacks(self) -> None:
        """What every worker is doing, in the output."""
        for job in self.nodes.left():
            for pid in job.workers().values():
                job.signal_process(pid, STACKS_SIGNAL)
        time.sleep(2.0)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> tuple[int, float]:
        """Let the job end, and look at what it did: (steps, furthest difference of a parameter)."""
        steps = max(line["step"] for line in self._steps.since(0.0)) + 40
        # Every rank must see it before the first comes to that step, and none a half of it.
        (self._folder / "stopping").write_text(str(steps))
        (self._folder / "stopping").rename(self._folder / "stop")
        codes = self.nodes.finish(PATIENCE)
        assert codes == [0] * len(self.nodes.left()), (codes, self.nodes.output)
        records.check_every_batch_once(self._record, self.nodes.events(), steps)
        for job in self.nodes.jobs:
            assert job.leftovers(90.0) == []
        return steps, self._furthest(steps)

    def _furthest(self, steps: int) -> float:
        """From the parameters of a run of one process without faults; they differ by the order in which floats were
        added."""
        stop, calm = self._folder / "calm stop", self._folder / "calm"
        stop.write_text(str(steps))
        args = ["--record", str(calm), "--steps", str(STEPS), "--stop-file", str(stop), "--step-time", "0"]
        flags, logs = ["--nproc-per-node=1"], self._folder / "calm logs"
        with Job(SCRIPT, [*args, "--parameters", "--snapshot-every", "1000"], flags=flags, log_dir=logs) as job:
            assert job.finish(PATIENCE * 10) == 0, job.output
        finals = [
            line["parameters"] for folder in (self._record, calm) for line in records.read(folder) if "final" in line
        ]
        assert len(finals) >= 2
        return max(abs(a - b) for final in finals for a, b in zip(final, finals[-1], strict=True))

    def close(self) -> None:
        """Leave nothing behind."""
        self.nodes.__exit__(None, None, None)

    def silence(self, job: Job, number: signal.Signals) -> None:
        """Stop or continue an agent and its workers."""
        for pid in [job.pid, *job.workers().values()]:
            job.signal_process(pid, number)
