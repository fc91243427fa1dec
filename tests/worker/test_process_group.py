"""Groups are formed, aborted and forgotten without touching what is not theirs."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from resilient_train.worker.process_group import ProcessGroups, _address, _shut_down, is_communication_error


@pytest.fixture
def port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    _KEPT.append(store)
    return int(store.port)


_KEPT: list[dist.TCPStore] = []


def test_an_abort_frees_a_formation_that_waits_for_a_missing_rank(port: int) -> None:
    """The main thread waits for a rank that died; another thread frees it, and the next generation can be formed."""
    groups = ProcessGroups(60.0)
    timer = threading.Timer(0.5, groups.abort)
    timer.start()
    with pytest.raises((RuntimeError, dist.DistError)) as caught:
        groups.form(generation=1, rank=0, size=2, host="127.0.0.1", port=port, backend="gloo")
    timer.join()
    assert is_communication_error(caught.value)
    groups.dissolve()
    groups.form(generation=2, rank=0, size=1, host="127.0.0.1", port=port, backend="gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 1
    groups.dissolve()
    assert not dist.is_initialized()


def test_a_late_abort_does_not_touch_the_next_generation(port: int) -> None:
    """Who decided to abort a generation may come to it when the main thread is forming the next one already."""
    groups = ProcessGroups(60.0)
    groups.form(generation=2, rank=0, size=1, host="127.0.0.1", port=port, backend="gloo")
    assert groups.abort(1) == 0
    assert groups.abort(2) > 0
    groups.dissolve()


LATER = """
import sys, torch, torch.distributed as dist
from resilient_train.worker.process_group import ProcessGroups
ProcessGroups(20.0).form(generation=2, rank=1, size=2, host="127.0.0.1", port=int(sys.argv[1]), backend="gloo")
dist.all_reduce(torch.ones(1))
"""


def test_who_was_aborted_while_forming_meets_who_was_not(port: int) -> None:
    """A formation is aborted on one rank; the next one has to succeed with a process that knows nothing of it."""
    groups = ProcessGroups(20.0)
    timer = threading.Timer(0.2, groups.abort)
    timer.start()
    with pytest.raises((RuntimeError, dist.DistError)):
        groups.form(generation=1, rank=0, size=2, host="127.0.0.1", port=port, backend="gloo")
    timer.join()
    groups.dissolve()
    other = subprocess.Popen([sys.executable, "-c", LATER, str(port)])
    try:
        groups.form(generation=2, rank=0, size=2, host="127.0.0.1", port=port, backend="gloo")
        dist.all_reduce(torch.ones(1))
    finally:
        other.kill()
        other.wait()
    groups.dissolve()


SHY = """
import sys, torch.distributed as dist
from datetime import timedelta
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False, timedelta(seconds=30), wait_for_workers=False)
store = dist.PrefixStore("generation/1", store)
dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=60))
"""


def test_an_abort_frees_a_formation_that_waits_for_a_dead_rank_to_connect(port: int) -> None:
    """The other rank said where it is and was killed before it connected: there is no connection to shut down."""
    groups = ProcessGroups(60.0)
    shy = subprocess.Popen([sys.executable, "-c", SHY, str(port)])
    try:
        store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), wait_for_workers=False)
        store.wait(["generation/1/0//cpu//0/1"])
    finally:
        shy.kill()
        shy.wait()
    timer = threading.Timer(0.5, repeat, [groups.abort, 1, 40])
    timer.start()
    with contextlib.suppress(RuntimeError, dist.DistError):
        groups.form(generation=1, rank=0, size=2, host="127.0.0.1", port=port, backend="gloo")
        dist.all_reduce(torch.ones(1))
    assert timer.is_alive(), "it was not the abort that freed it"
    timer.join()
    groups.dissolve()
    groups.form(generation=2, rank=0, size=1, host="127.0.0.1", port=port, backend="gloo")
    groups.dissolve()


HALF = """
import sys, torch, torch.distributed as dist
from resilient_train.worker.process_group import ProcessGroups
port, source, path, size = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
ProcessGroups(60.0).form(generation=1, rank=1, size=2, host="127.0.0.1", port=port, backend="gloo")
tensor = torch.ones(size) if source == 1 else torch.from_file(path, shared=True, size=size)
dist.broadcast(tensor, source)
"""
SIZE = 64 << 20
"""Elements: far more than the kernel holds for a connection."""


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("lazy", ["0", "1"])
def test_an_abort_frees_a_rank_in_the_middle_of_a_transfer(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: int, number: signal.Signals, lazy: str
) -> None:
    """To or from a rank that dies, or stops, when a part has arrived: gloo itself never tells whoever waits.

    Nothing is left behind that keeps gloo's thread busy, and the group can be forgotten; also where ranks connect to
    each other when they first need to."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", lazy)
    path = tmp_path / "received"
    path.write_bytes(b"")
    os.truncate(path, 4 * SIZE)
    there = torch.from_file(str(path), shared=True, size=SIZE)
    other = subprocess.Popen([sys.executable, "-c", HALF, str(port), str(source), str(path), str(SIZE)])
    groups = ProcessGroups(20.0)
    free, aborted_at = threading.Event(), [math.inf]

    def break_off() -> None:
        while not there[0] and not free.is_set():
            pass
        other.send_signal(number)
        aborted_at[0] = time.monotonic()
        while not free.wait(0.005):
            groups.abort(1)

    with ThreadPoolExecutor(1) as pool:
        try:
            groups.form(generation=1, rank=0, size=2, host="127.0.0.1", port=port, backend="gloo")
            broken = pool.submit(break_off)
            with pytest.raises(RuntimeError) as caught:
                dist.broadcast(torch.ones(SIZE) if source == 0 else there, source)
            took = time.monotonic() - aborted_at[0]
        finally:
            free.set()
            other.kill()
            other.wait()
        broken.result()
    busy = gloos_time()
    time.sleep(0.5)
    assert gloos_time() - busy < 0.2
    groups.dissolve()
    assert is_communication_error(caught.value)
    # Without an abort it takes the group's 20 seconds.
    assert 0 <= took < 10
    assert not there[-1]
    groups.form(generation=2, rank=0, size=1, host="127.0.0.1", port=port, backend="gloo")
    dist.all_reduce(torch.ones(1))
    groups.dissolve()


def gloos_time() -> float:
    """Seconds of processor time of gloo's threads that read and write."""
    used = 0.0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if (task / "comm").read_text().strip() == "gloo_tcp_loop":
                used += int((task / "schedstat").read_text().split()[0]) / 1e9
    return used


def repeat(action: Callable[[int], int], generation: int, times: int) -> None:
    """As a worker's monitor does."""
    for _ in range(times):
        action(generation)
        time.sleep(0.05)


def test_connections_to_other_hosts_are_not_shut_down() -> None:
    """A logger's or a data set's connection, opened while a group was being formed, is the script's own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        # Another address of this machine stands for another host.
        with socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0)) as mine:
            theirs, _ = listener.accept()
            inode = os.fstat(mine.fileno()).st_ino
            assert not _shut_down(mine.fileno(), inode, {"10.0.0.1"})
            mine.sendall(b"alive")
            assert theirs.recv(5) == b"alive"
            assert _shut_down(mine.fileno(), inode, {"127.0.0.1"})
            theirs.close()


def test_mapped_addresses_are_what_they_stand_for() -> None:
    """torch's store speaks IPv6 even where its peer does not."""
    assert _address(("::ffff:127.0.0.1", 1, 0, 0)) == "127.0.0.1"
    assert _address(("::1", 1, 0, 0)) == "::1"
