"""Incidents on one clock: when the last rank passed each stage, for the log and for one line a transition."""

from __future__ import annotations

from collections import deque

from resilient_train.events import STAGES, Event, Sink
from resilient_train.spec.messages import Message, Resumed, Stage
from resilient_train.spec.world import WorldRecord, node_of

FRESH = "a fresh start"
_KEPT = 20
"""Incidents that ``rtctl status`` can show."""


class Timeline:
    """Follows one generation at a time."""

    def __init__(self, sink: Sink, node: str) -> None:
        """Args:
        sink: where events go.
        node: this node; its ranks are those that are heard here.
        """
        self._sink = sink
        self._node = node
        self._local = 0
        self.incidents: deque[tuple[float, str]] = deque(maxlen=_KEPT)
        """(when, what) of the last changes of the world, oldest first"""
        self._detected: float | None = None
        self._generation = 0
        self._size = 0
        self._stages: dict[str, float] = {}
        self._reached: dict[str, set[str]] = {}
        self._resumed = ""
        self._said = True

    def detected(self, at: float, text: str, member: str) -> None:
        """Something happened that will change the world."""
        if self._detected is None:
            self._detected = at
        self._sink.put(Event(at=at, kind="lost", generation=self._generation, member=member, text=text))

    def agreed(self, record: WorldRecord, at: float) -> None:
        """A new generation is in the record."""
        self._generation, self._size = record.generation, record.size
        self._local = sum(node_of(member) == self._node for member in record.members)
        began = self._detected if self._detected is not None else at
        self._stages, self._reached = {"detected": began, "agreed": at}, {}
        self._detected, self._resumed, self._said = None, "", False
        self.incidents.append((at, f"generation {record.generation}: {record.reason}; {count_ranks(record.size)}"))
        self._put("detected", began, record.reason)
        event = Event(
            at=at, kind="agreed", generation=record.generation, text=record.reason, fields={"size": record.size}
        )
        self._sink.put(event)

    def _put(self, kind: str, at: float, text: str = "", member: str = "") -> None:
        self._sink.put(Event(at=at, kind=kind, generation=self._generation, member=member, text=text))

    def heard(self, member: str, message: Message, at: float) -> str | None:
        """A worker's report; a line for people once every rank has finished its first step."""
        if isinstance(message, Resumed):
            self._resumed = message.text
            fields = {"step": message.source[1] if message.source else 0, "lineage": message.lineage}
            event = Event(
                at=at, kind="resumed", generation=message.generation, member=member, text=message.text, fields=fields
            )
            self._sink.put(event)
            return None
        if not isinstance(message, Stage):
            return None
        # "aborted" is said about the generation that ended, and belongs to the incident that ended it.
        generation = message.generation + 1 if message.stage == "aborted" else message.generation
        self._sink.put(Event(at=message.at, kind=message.stage, generation=generation, member=member))
        if generation == self._generation:
            self._stages[message.stage] = max(message.at, self._stages.get(message.stage, message.at))
            self._reached.setdefault(message.stage, set()).add(member)
        return self._line()

    def _line(self) -> str | None:
        if self._said or not 0 < self._local <= len(self._reached.get("first_step", ())):
            return None
        self._said = True
        began = self._stages["detected"]
        parts = [
            f"{stage.replace('_', ' ')} {1000 * (self._stages[stage] - began):.0f} ms"
            for stage in STAGES[1:]
            if stage in self._stages
        ]
        how = f"generation {self._generation} runs on {count_ranks(self._size)}{self._how()}"
        return f"{how} ({', '.join(parts)})"

    def _how(self) -> str:
        if not self._resumed:
            return ""
        return f", {self._resumed}" if self._resumed.startswith(FRESH) else f", resumed {self._resumed}"

    def unsaid(self) -> str | None:
        """At the end: a line if the job had nothing left to do."""
        if self._said or not self._resumed or self._reached.get("first_step"):
            return None
        return f"nothing was left to do{self._how()}"


def count_ranks(number: int) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} rank" if number == 1 else f"{number} ranks"
