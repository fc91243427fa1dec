"""Plain torchrun on several nodes, over a real etcd: whichever node dies, the others go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from etcd_cluster import EtcdCluster, children_of, running

SCRIPT = Path(__file__).parent / "scripts" / "meet.py"
LONG = 100.0


class Job:
    """Several torchruns, each a node with one worker."""

    def __init__(self, cluster: EtcdCluster, folder: Path, nodes: str) -> None:
        self._folder = folder
        self._id = uuid.uuid4().hex
        self._nodes = nodes
        self._endpoint = "etcd://" + ",".join(cluster.clients)
        self.torchruns: list[subprocess.Popen[bytes]] = []

    def start(self) -> int:
        """Start a node; its number."""
        number = len(self.torchruns)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=resilient"),
            *(f"--rdzv-endpoint={self._endpoint}", f"--rdzv-id={self._id}", f"--nnodes={self._nodes}"),
            *("--rdzv-conf=ttl=2,last_call_timeout=3", "--nproc-per-node=1", "--max-restarts=5"),
            *(str(SCRIPT), str(self._folder / "finish")),
        ]
        with (self._folder / f"{number}.out").open("wb") as out, (self._folder / f"{number}.err").open("wb") as err:
            self.torchruns.append(subprocess.Popen(command, stdout=out, stderr=err))
        return number

    def said(self, number: int) -> list[str]:
        """The lines that a node's workers wrote."""
        return (self._folder / f"{number}.out").read_text().splitlines()

    def formed(self, size: int, *numbers: int) -> None:
        """Wait until the newest group of these nodes has so many ranks."""
        deadline = time.monotonic() + LONG
        while not all(any(line.startswith(f"formed {size} ") for line in self.said(n)[-1:]) for n in numbers):
            assert time.monotonic() < deadline, {n: (self.said(n), self._errors(n)) for n in numbers}
            time.sleep(0.05)

    def rank(self, number: int) -> int:
        """The rank that a node's worker has."""
        return int(self.said(number)[-1].split()[-1])

    def signal(self, number: int, which: signal.Signals) -> None:
        """To a node's torchrun and its workers."""
        torchrun = self.torchruns[number]
        children = children_of(torchrun.pid)
        torchrun.send_signal(which)
        for child in children:
            subprocess.run(["kill", f"-{int(which)}", str(child)], check=False, stderr=subprocess.DEVNULL)

    def finish(self, *numbers: int) -> None:
        """Let the training end; all of these nodes succeed."""
        (self._folder / "finish").touch()
        for number in numbers:
            assert self.torchruns[number].wait(LONG) == 0, self._errors(number)

    def _errors(self, number: int) -> str:
        return (self._folder / f"{number}.err").read_text()[-3000:]

    def close(self) -> None:
        for number, torchrun in enumerate(self.torchruns):
            if torchrun.poll() is None:
                self.signal(number, signal.SIGKILL)
                torchrun.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with running(3) as cluster:
        cluster.ready()
        yield cluster


@pytest.fixture
def job(cluster: EtcdCluster, tmp_path: Path) -> Iterator[Job]:
    job = Job(cluster, tmp_path, "1:3")
    yield job
    job.close()


def test_any_node_may_be_killed(job: Job) -> None:
    """The one with rank 0, agent and worker: the others meet again; a new one joins them; all finish."""
    for _ in range(3):
        job.start()
    job.formed(3, 0, 1, 2)
    (first,) = (number for number in range(3) if job.rank(number) == 0)
    left = [number for number in range(3) if number != first]
    job.signal(first, signal.SIGKILL)
    job.formed(2, *left)
    left.append(job.start())
    job.formed(3, *left)
    assert {job.rank(number) for number in left} == {0, 1, 2}
    job.finish(*left)
    again = job.start()
    job.finish(again)
    assert job.said(again)[0] == "formed 1 rank 0", "a job that ended makes room for the next of its id"


@pytest.mark.soak
def test_a_frozen_node_and_a_frozen_etcd(cluster: EtcdCluster, job: Job) -> None:
    """A node that is frozen is left out, and taken back when it resumes; an etcd that freezes changes nothing."""
    for _ in range(2):
        job.start()
    job.formed(2, 0, 1)
    cluster.signal(signal.SIGSTOP)
    # Longer than any lease.
    time.sleep(5.0)
    cluster.signal(signal.SIGCONT)
    cluster.ready()
    job.signal(0, signal.SIGSTOP)
    job.formed(1, 1)
    job.signal(0, signal.SIGCONT)
    job.formed(2, 0, 1)
    assert [line.split()[1] for line in job.said(1)] == ["2", "1", "2"], "nobody stopped for etcd"
    job.finish(0, 1)


def test_a_job_without_etcd_says_so(tmp_path: Path) -> None:
    """The address is named."""
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=resilient", "--nnodes=1:2"]
    run = subprocess.run(
        [*command, "--rdzv-endpoint=own:a,b", str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "must name one or three hosts" in run.stderr
