"""Real processes, seen from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from resilient_train.agent import stacks

REGISTERED = "from resilient_train.worker.position import write_stacks_when_asked as w; w(); "
SPIN = "import re, sys; print('here', flush=True); re.match('(a+)+$', 'a' * 60 + 'b')"
SLEEP = "import time; print('here', flush=True); time.sleep(600); print('slept')"


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("code", [SPIN, SLEEP], ids=["holds Python's lock", "sleeps"])
@pytest.mark.parametrize("stop", [False, True], ids=["runs", "stopped"])
def test_stacks_are_written(code: str, stop: bool) -> None:
    """By a process that never lets go of Python, and by one that is stopped; and it is known when they are."""
    with process(REGISTERED + code) as child:
        if stop:
            os.kill(child.pid, signal.SIGSTOP)
            wait_for(lambda: stacks.state(child.pid) == "T")
        stacks.ask(child.pid)
        wait_for(lambda: stacks.written(child.pid))
        assert child.poll() is None
        child.kill()
        text = child.communicate()[1].decode()
        assert "most recent call first" in text
        assert '<string>", line 1' in text


def test_a_process_that_does_not_catch_the_signal_is_not_hurt() -> None:
    """Where the script has taken the handler away there are no stacks, and nothing to wait for."""
    with process(SLEEP) as child:
        stacks.ask(child.pid)
        assert stacks.written(child.pid)
        assert child.poll() is None


def test_a_process_that_is_gone() -> None:
    """No error, and nothing to wait for."""
    with process(SLEEP) as child:
        pass
    stacks.ask(child.pid)
    assert stacks.written(child.pid)
    assert stacks.state(child.pid) == ""
