"""The diary: complete after a normal end, and nothing waits for a disk that hangs."""

from __future__ import annotations

import os
from pathlib import Path

from resilient_train.events import Event, JsonLinesSink, read_events


def test_everything_is_there_after_close(tmp_path: Path) -> None:
    """In the order in which it was put."""
    sink = JsonLinesSink(tmp_path / "new" / "events.jsonl")
    events = [Event(at=float(number), kind="lost", text="ü" * number) for number in range(500)]
    for event in events:
        sink.put(event)
    sink.close()
    assert read_events(tmp_path / "new" / "events.jsonl") == events


def test_a_file_that_takes_nothing_holds_up_nobody(tmp_path: Path) -> None:
    """More than a full pipe takes, with nobody reading it: ``put`` returns, and later events are left out."""
    path = tmp_path / "events.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLinesSink(path)
    for _ in range(20_000):
        sink.put(Event(at=0.0, kind="lost", text="x" * 100))
    os.close(reader)  # The writer meets an error, and goes on.
    sink.close()
