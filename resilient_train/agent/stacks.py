"""What the agent can see of a process from outside, and have it write down: its state, the stacks of its threads."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from resilient_train.spec.messages import STACKS_SIGNAL

_BIT = 1 << (STACKS_SIGNAL - 1)


def state(pid: int) -> str:
    """The letter that the kernel gives a process's state (``R``, ``S``, ``D``, ``T``, ...); empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def ask(pid: int) -> None:
    """Have a process write the stacks of its threads to its stderr; a stopped one goes on for it.

    The signal is queued before that, so it is the first thing that a stopped process does.
    """
    with contextlib.suppress(ProcessLookupError):
        if _catches(pid):
            os.kill(pid, STACKS_SIGNAL)
        if state(pid) == "T":
            os.kill(pid, signal.SIGCONT)


def written(pid: int) -> bool:
    """Whether a process has written them: the signal neither waits to be handled nor is being handled."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        masks = [_masks(f"/proc/{pid}/task/{thread}/status") for thread in threads]
    except OSError:
        return True
    return not any((mask["SigPnd"] | mask["ShdPnd"] | mask["SigBlk"]) & _BIT for mask in masks)


def _catches(pid: int) -> bool:
    """Whether the signal has a handler there; without one it would end the process."""
    try:
        return bool(_masks(f"/proc/{pid}/status")["SigCgt"] & _BIT)
    except OSError:
        return False


def _masks(path: str) -> dict[str, int]:
    lines = (line.split(":") for line in Path(path).read_text().splitlines() if line.startswith(("Sig", "ShdPnd")))
    return {name: int(value, 16) for name, value in lines if name != "SigQ"}
