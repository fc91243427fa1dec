"""A job of several nodes on this machine: one ``rtrun`` each, which know of each other only by the network."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from resilient_train.events import Event
from resilient_train.testing.job import Job
from resilient_train.testing.network import Network


def free_port() -> int:
    """A port of the loopback interface that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Nodes:
    """A context manager that leaves no process behind.

    Args:
        script: the training script.
        args: its arguments.
        count: number of nodes to start with.
        flags: flags for every ``rtrun``, besides those that say where the nodes meet.
        folder: gets a folder of logs for each node.
        meet: flags that say where the nodes meet; by default the first of them serves the record.
        env: further environment variables.
        network: gives each node a network of its own.
        wait: wait for the first node before the others start, as is needed where it is the one that serves.
    """

    def __init__(
        self,
        script: Path | str,
        args: Sequence[str] = (),
        *,
        count: int,
        flags: Sequence[str] = (),
        folder: Path,
        meet: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        network: Network | None = None,
        wait: bool = True,
    ) -> None:
        self._script = script
        self._args = args
        endpoint = f"{network.address(0)}:29400" if network is not None else f"127.0.0.1:{free_port()}"
        self._meet = meet or ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        self._network = network
        self._wait = wait
        self._flags = flags
        self._folder = folder
        self._env = env if network is None else {"GLOO_SOCKET_IFNAME": "eth0", **(env or {})}
        self._stack = ExitStack()
        self.jobs: list[Job] = []
        self.killed: set[int] = set()
        for _ in range(count):
            self.start()

    def start(self, *flags: str) -> Job:
        """Start one more node; further flags are for this one only."""
        if len(self.jobs) == 1 and self._wait:
            # The first is the one that serves.
            self.jobs[0].wait_for(lambda: self.jobs[0].keepers(), 60, "the first node's start")
        job = Job(
            self._script,
            self._args,
            flags=[*self._flags, *self._meet, *flags],
            log_dir=self._folder / f"node{len(self.jobs)}",
            env=self._env,
            prefix=self._network.prefix(len(self.jobs)) if self._network is not None else (),
        )
        self.jobs.append(self._stack.enter_context(job))
        return job

    def kill(self, *indices: int, keeper: bool = True) -> float:
        """SIGKILL the agents of some nodes and, with them, their workers and keepers; when that was."""
        jobs = [self.jobs[index] for index in indices]
        doomed = [pid for job in jobs for pid in (*job.workers().values(), *(job.keepers() if keeper else ()))]
        at = time.monotonic()
        for job in jobs:
            job.signal(signal.SIGKILL)
        for pid in doomed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.killed.update(indices)
        return at

    def left(self) -> list[Job]:
        """The nodes that were not killed."""
        return [job for index, job in enumerate(self.jobs) if index not in self.killed]

    def finish(self, timeout: float) -> list[int]:
        """Wait for the end of the nodes that are left; their exit codes."""
        deadline = time.monotonic() + timeout
        return [job.finish(max(0.0, deadline - time.monotonic())) for job in self.left()]

    def events(self) -> list[Event]:
        """What all nodes' agents recorded, in the order in which it happened."""
        return sorted((event for job in self.jobs for event in job.events()), key=lambda event: event.at)

    @property
    def output(self) -> str:
        """Everything that all nodes printed."""
        return "\n".join(f"--- node {index}\n{job.output}" for index, job in enumerate(self.jobs))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
