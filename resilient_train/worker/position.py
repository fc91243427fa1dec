"""Where this process's training thread is, as another thread sees it."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from resilient_train.spec.messages import STACKS_SIGNAL
from resilient_train.spec.rank import Where

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_DISTRIBUTED = (_TORCH + os.path.join("distributed", ""), _TORCH + os.path.join("nn", "parallel", ""))
_CALLS = ("distributed_c10d.py", "_functional_collectives.py", "rendezvous.py")
"""Modules of torch that do nothing but communicate."""
_COMPUTING = tuple(_TORCH + name + os.sep for name in ("nn", "optim", "utils"))
"""Parts of torch in which a thread works for itself, even if communication code has called them."""
_WAITS = {
    ("link.py", "wait_at_boundary"),
    ("link.py", "wait_until_over"),
    ("link.py", "wait_for_verdict"),
    ("link.py", "next_world"),
    ("process_group.py", "form"),
    ("restoring.py", "_exchange"),
}
"""Functions of this package that wait for other ranks."""
_COMPILES = ("convert_frame.py", "compile_fx.py", "async_compile.py", "triton_heuristics.py")
"""Modules of torch's compiler that stand on the stack while it compiles, and not while compiled code runs."""
_COMPILED = ("torchinductor", "<eval_with_key>")
_MOST_FRAMES = 200


def write_stacks_when_asked() -> None:
    """Have the stacks of all threads written to stderr at `STACKS_SIGNAL`, even if none of them lets go of Python."""
    # The descriptor itself: whatever the script makes of sys.stderr, this is the log.
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)


def position(thread: int) -> tuple[Where, str]:
    """Where a thread is, and in which line of the user's code: ``train.py:42 in train, all_reduce``."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return Where.ELSEWHERE, "its end"
    stack = list(_outwards(frame))
    foreign = list(itertools.takewhile(_is_foreign, stack))
    text = _describe(stack[len(foreign)] if len(foreign) < len(stack) else frame, frame)
    if any(f.f_code.co_filename.startswith(_TORCH) and _file(f) in _COMPILES for f in stack):
        return Where.COMPILING, text
    return next((where for where in map(_classify, foreign) if where is not None), Where.ELSEWHERE), text


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def _file(frame: FrameType) -> str:
    return os.path.basename(frame.f_code.co_filename)


def _is_foreign(frame: FrameType) -> bool:
    """Whether a frame is not the user's code, but between it and what it waits for."""
    path = frame.f_code.co_filename
    standard = path.startswith("<frozen") or _file(frame) in ("threading.py", "queue.py", "contextlib.py")
    return standard or path.startswith((_TORCH, _OURS)) or any(mark in path for mark in _COMPILED)


def _classify(frame: FrameType) -> Where | None:
    """What one frame, seen from the innermost outwards, tells; None for nothing."""
    path, name = frame.f_code.co_filename, frame.f_code.co_name
    if path.startswith(_OURS):
        return Where.COMMUNICATION if (_file(frame), name) in _WAITS else None
    if path.startswith(_DISTRIBUTED):
        return Where.COMMUNICATION if _file(frame) in _CALLS else Where.UNCLEAR
    if name == "_engine_run_backward" or any(mark in path for mark in _COMPILED):
        return Where.UNCLEAR
    return Where.ELSEWHERE if path.startswith(_COMPUTING) else None


def _describe(users: FrameType, innermost: FrameType) -> str:
    text = f"{_file(users)}:{users.f_lineno} in {users.f_code.co_name}"
    return text if innermost is users else f"{text}, {innermost.f_code.co_name}"


def entered() -> list[tuple[str, int]]:
    """For every process group the number of operations that this rank has entered."""
    counts = []
    groups: dict[Any, str] = dict(c10d._world.pg_names)
    for group, name in groups.items():
        with contextlib.suppress(RuntimeError):  # Its backend does not count, or it is being taken apart.
            counts.append((name, int(group._get_sequence_number_for_group())))
    return sorted(counts)
