"""The conductor's ears and voice: reports come in on connections of the peer server, orders go out when they change."""

from __future__ import annotations

import threading
from collections.abc import Callable

from resilient_train.errors import FormatError, LinkLost
from resilient_train.plan import replication
from resilient_train.spec.messages import Peers
from resilient_train.spec.peers import Orders, Report, key_or_none
from resilient_train.storage.wire import Wire

_WORTH_A_WORD = 6
"""States given up in a row; ranks that hear of one too late, or miss a snapshot, are no news."""


class Conductor:
    """Runs `plan.replication` while this keeper is the first of the job; from any thread."""

    def __init__(self, now: Callable[[], float], say: Callable[[str], None]) -> None:
        """Args:
        now: a monotonic clock.
        say: told why a state was given up.
        """
        self._now = now
        self._say = say
        self._lock = threading.Lock()
        self._state: replication.State | None = None
        self._reports: dict[str, Report] = {}
        """The last of each node; those of a world to come may be here before it."""
        self._wires: dict[str, Wire] = {}
        self._told: dict[str, Orders] = {}
        self._said = False

    def lead(self, peers: Peers) -> None:
        """The keepers or the world have changed; go on from here if they are led from here."""
        nodes = tuple(node for node, _ in peers.keepers)
        with self._lock:
            if not nodes or nodes[0] != peers.node:
                self._state = None
            elif self._state is None or (self._state.generation, self._state.nodes) != (peers.generation, nodes):
                self._state = replication.State(generation=peers.generation, nodes=nodes)
                for report in self._reports.values():
                    self._take_in(report)

    def heard(self, wire: Wire, report: Report) -> None:
        """A node has reported.

        Raises:
            FormatError: if it talks nonsense.
        """
        _progress(report)
        with self._lock:
            if self._wires.get(report.node) is not wire:
                self._wires[report.node] = wire
                self._told.pop(report.node, None)
            self._reports[report.node] = report
            self._take_in(report)

    def _take_in(self, report: Report) -> None:
        state = self._state
        if state is not None and report.generation == state.generation:
            self._state = replication.heard(state, report.node, _progress(report), self._now())
            self._tell()

    def hang_up(self, wire: Wire) -> None:
        """A connection has ended."""
        with self._lock:
            for node in [node for node, other in self._wires.items() if other is wire]:
                del self._wires[node]
                self._reports.pop(node, None)
                self._told.pop(node, None)
                if self._state is not None:
                    self._state = replication.lost(self._state, node)

    def persist(self) -> None:
        """Have all nodes make the next state durable."""
        with self._lock:
            if self._state is not None:
                self._state = replication.persist(self._state)
                self._tell()

    def _tell(self) -> None:
        state = self._state
        assert state is not None
        if state.failures >= _WORTH_A_WORD and not self._said:
            self._say(f"{state.failures} states in a row were not copied to other nodes; the last: {state.reason}")
        self._said = state.failures >= _WORTH_A_WORD
        orders = Orders(
            generation=state.generation,
            pending=list(state.pending) if state.pending else None,
            kept=list(state.kept) if state.kept else None,
            persist_at=state.persist_at,
        )
        for node, wire in list(self._wires.items()):
            if self._told.get(node) != orders:
                try:
                    wire.offer(orders)
                    self._told[node] = orders
                except LinkLost:
                    # Its own thread hears of it and takes it out.
                    wire.hang_up()


def _progress(report: Report) -> replication.Progress:
    return replication.Progress(
        lineage=_number(report.lineage),
        slowest=_number(report.slowest),
        furthest=_number(report.furthest),
        published=_number(report.published),
        every=max(1, _number(report.every)),
        done=key_or_none(report.done),
        missed=key_or_none(report.missed),
        moved=_number(report.moved),
        kept=key_or_none(report.kept),
        saving=bool(report.saving),
    )


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise FormatError(f"{value!r:.50} is no number of anything")
    return value
