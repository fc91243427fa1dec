"""What happened to the job, as frozen records on one clock, and where they are written.

The agent and the workers of a node stamp events with the node's monotonic clock, so that the stages of an incident
(fault, detected, agreed, aborted, formed, restored, first step) can be compared directly.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

STAGES = ("detected", "agreed", "aborted", "formed", "restored", "first_step")
"""The stages of an incident in order; ``fault`` itself is known only to whoever caused it."""
_MOST_WAITING = 10_000
"""Events that wait to be written; further ones are left out."""
_LAST_WRITES = 5.0
"""Seconds to write them at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened."""

    at: float
    """Seconds on the node's monotonic clock."""
    kind: str
    """A short identifier: a stage of ``STAGES`` or a transition such as ``lost``, ``grow``, ``finished``."""
    generation: int = 0
    """The generation it belongs to; 0 before the first."""
    member: str = ""
    """The worker it is about, if one."""
    text: str = ""
    """One sentence for people."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values."""


class Sink(Protocol):
    """Where events go."""

    def put(self, event: Event) -> None:
        """Record one event; must not block and must not raise."""
        ...


class JsonLinesSink:
    """Appends one JSON object a line to a file, from a thread: the file may be on a disk that is full, or hangs."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._waiting: queue.Queue[Event | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        with contextlib.suppress(queue.Full):  # The job must not end, or wait, for the sake of its diary.
            self._waiting.put_nowait(event)

    def close(self) -> None:
        """Write what waits, for a few seconds at the most."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_LAST_WRITES)
        self._thread.join(_LAST_WRITES)

    def _write(self) -> None:
        with contextlib.suppress(OSError), self._file:
            while (event := self._waiting.get()) is not None:
                with contextlib.suppress(OSError):
                    self._file.write(json.dumps(asdict(event)) + "\n")


class NoSink:
    """Forgets events."""

    def put(self, event: Event) -> None:
        del event


class ListSink:
    """Keeps events in memory."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        self.events.append(event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One change of the world with the time at which the *last* rank passed each stage."""

    generation: int
    """The generation that the incident led to."""
    reason: str
    """Why the world changed."""
    size: int
    """World size afterwards."""
    stages: Mapping[str, float]
    """Stage name to seconds on the node's clock; stages that were not reached are absent."""
    resumed: str
    """Where the state came from, for people (``step 41 from memory``)."""
    step: int | None
    """Number of finished steps in the restored state."""


def read_events(path: Path) -> list[Event]:
    """The events of a file written by `JsonLinesSink`; a torn last line is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(Event(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return events


def incidents(events: Iterable[Event]) -> list[Incident]:
    """Fold a job's events into its changes of the world, oldest first (the first formation included)."""
    stages: dict[int, dict[str, float]] = {}
    facts: dict[int, dict[str, Any]] = {}
    for event in events:
        generation = event.generation
        if event.kind in STAGES:
            seen = stages.setdefault(generation, {})
            seen[event.kind] = max(seen.get(event.kind, event.at), event.at)
        if event.kind == "agreed":
            facts.setdefault(generation, {}).update(reason=event.text, size=event.fields.get("size", 0))
        if event.kind == "resumed":
            facts.setdefault(generation, {}).update(resumed=event.text, step=event.fields.get("step"))
    return [
        Incident(
            generation=generation,
            reason=fact.get("reason", ""),
            size=fact.get("size", 0),
            stages=stages.get(generation, {}),
            resumed=fact.get("resumed", ""),
            step=fact.get("step"),
        )
        for generation, fact in sorted(facts.items())
    ]
