"""Where a thread is, seen from another; with real process groups."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from resilient_train.spec.rank import Where
from resilient_train.worker.position import entered, position


def seen(work: Callable[[], object], until: Callable[[tuple[Where, str]], bool]) -> tuple[Where, str]:
    """What `position` says of a thread that runs ``work``, once it says what is expected, or at last."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert thread.ident is not None
    deadline = time.monotonic() + 30
    while not until(now := position(thread.ident)) and time.monotonic() < deadline:
        time.sleep(0.001)
    return now


OTHER = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=1, world_size=2)
sys.stdin.readline()
dist.all_reduce(torch.ones(3))
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The other rank of a gloo group; it communicates when it gets a line, and ends with the next."""
    path = str(tmp_path / "store")
    with subprocess.Popen([sys.executable, "-c", OTHER, path], stdin=subprocess.PIPE) as process:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=2)
        yield process
        process.communicate(b"\n")
        dist.destroy_process_group()


def test_waiting_for_a_rank(other: subprocess.Popen[bytes]) -> None:
    """A collective that the other rank has not entered: in communication, and counted; afterwards it is not."""
    before = dict(entered())
    value = torch.ones(3)
    where, frame = seen(lambda: dist.all_reduce(value), lambda now: now[0] is Where.COMMUNICATION)
    assert where is Where.COMMUNICATION
    assert frame.startswith("test_position.py:")
    assert frame.endswith(", all_reduce")
    deadline = time.monotonic() + 30
    while dict(entered()) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert dict(entered()) == {name: count + 1 for name, count in before.items()}
    assert other.stdin is not None
    other.stdin.write(b"\n")
    other.stdin.flush()
    while value.tolist() != [2.0] * 3 and time.monotonic() < deadline + 30:
        time.sleep(0.001)
    assert value.tolist() == [2.0] * 3


def test_own_code() -> None:
    """A sleeping thread waits for no rank, also within a module that torch calls."""

    class Sleeps(torch.nn.Module):
        def forward(self) -> None:
            event.wait()

    event = threading.Event()
    where, frame = seen(Sleeps(), lambda now: "in forward" in now[1])
    assert where is Where.ELSEWHERE
    assert frame.startswith("test_position.py:")
    event.set()


def test_backward_is_unclear() -> None:
    """Native code that may wait for other ranks, or compute."""
    a = torch.ones(1500, 1500, requires_grad=True)
    loss = a
    for _ in range(12):
        loss = loss @ a
    where, frame = seen(lambda: loss.sum().backward(), lambda now: now[0] is Where.UNCLEAR)
    assert where is Where.UNCLEAR
    assert frame.startswith("test_position.py:")


def test_compiling() -> None:
    """Torch's compiler stands on the stack while it works, however deep."""
    event = threading.Event()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        event.wait(60)
        return graph.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    where, _ = seen(lambda: compiled(torch.ones(2)), lambda now: now[0] is Where.COMPILING)
    assert where is Where.COMPILING
    event.set()


def test_a_thread_that_has_ended() -> None:
    """No error."""
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert thread.ident is not None
    assert position(thread.ident)[0] is Where.ELSEWHERE
