"""A world whose nodes all lose the store: it stops before a node that has the store goes on, and loses nothing."""

from __future__ import annotations

import re
import socket
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from records import check_every_batch_once

from resilient_train.testing.job import Job

sys.path.insert(0, str(Path(__file__).parents[1] / "control"))
from etcd_cluster import running

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
STEPS = 1200


class Wire:
    """A way to a server that may be cut: what is sent then stays where it is, and nobody hangs up."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._whole = threading.Event()
        self._whole.set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.mend()
        for end in [self._server, *self._ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._server.accept()
                there = socket.create_connection(self._target)
                self._ends += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                self._whole.wait()
                other.sendall(data)
            self._whole.wait()
            other.shutdown(socket.SHUT_WR)


def steps(job: Job) -> list[tuple[float, int]]:
    """(time, step) of what a node's first rank printed."""
    found = [(at, re.match(r"step (\d+) size", line)) for at, line in job.lines]
    return [(at, int(match[1])) for at, match in found if match]


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_world_without_the_store_stops_before_another_goes_on(tmp_path: Path) -> None:
    """MAX=1, one node stands by: it takes over when the word of the store has run out for the first, and not before;
    the first keeps its processes and stands by when it has the store again."""
    args = ["--record", str(tmp_path / "record"), "--steps", str(STEPS), "--step-time", "0.05"]
    args += ["--url", str(tmp_path / "url"), "--persist-every", "20"]
    with ExitStack() as stack:
        etcd = stack.enter_context(running(1))
        etcd.ready()
        wires = [stack.enter_context(Wire(etcd.clients[0])) for _ in range(2)]
        jobs: list[Job] = []
        for index, wire in enumerate(wires):
            meet = ["--rdzv-backend=etcd", f"--rdzv-endpoint={wire.address}", "--rdzv-id=wires"]
            flags = ["--nnodes=1:1", "--nproc-per-node=1", "--detect-within=2", *meet]
            jobs.append(stack.enter_context(Job(SCRIPT, args, flags=flags, log_dir=tmp_path / f"node{index}")))
            if index == 0:
                jobs[0].wait_for_line("step 5 ", 120)
        first, second = jobs
        second.wait_for(lambda: any(event.kind == "ready" for event in second.events()), 90, "the node that stands by")
        wires[0].cut()
        first.wait_for_line("training goes on, changes of the world wait", 60)
        begun = len(steps(first))
        second.wait_for_line("others take over once it has stopped", 60)
        first.wait_for(lambda: len(steps(first)) > begun, 30, "a step without the store")
        second.wait_for_line("workers are ready again", 90)
        second.wait_for_line("size 1", 60, count=20)
        assert steps(first)[-1][0] < steps(second)[0][0], "two worlds have trained at a time"
        assert first.running()
        wires[0].mend()
        assert second.finish(200) == 0, second.output
        assert first.finish(30) == 0, first.output
        events = sorted([*first.events(), *second.events()], key=lambda event: event.at)
        check_every_batch_once(tmp_path / "record", events, STEPS)
