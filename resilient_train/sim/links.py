"""Simulated lines between agents: what `resilient_train.agent.links` does, over simulated connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from resilient_train.sim.engine import Action
from resilient_train.sim.network import Connection, End, Network

_PATIENCE = 3
"""Beats of silence after which a line is given up; as in the real one."""
_BEAT = "."


@dataclass
class _Line:
    called: str
    """The node that was called; empty if it called."""
    connection: Connection | None = None
    node: str = ""
    """Who is at the other end, once that is proved."""
    quiet: int = 0


class Links:
    """One agent's lines."""

    def __init__(
        self,
        me: str,
        network: Network,
        directory: Mapping[str, Links],
        guard: Callable[[Action], None],
        heard: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> None:
        """Args:
        me: this node.
        network: the way to the others.
        directory: the links of agents whose processes exist, by node.
        guard: runs what arrives, when this agent runs.
        heard: told of a sign of life of a node.
        refused: told that nobody listens at a node.
        """
        self._me = me
        self._network = network
        self._directory = directory
        self._guard = guard
        self._heard = heard
        self._refused = refused
        self._lines: list[_Line] = []
        self._wanted: frozenset[str] = frozenset()
        self._refusing: set[str] = set()

    def want(self, nodes: frozenset[str]) -> None:
        """Keep lines to these nodes."""
        self._wanted = nodes
        for line in [line for line in self._lines if line.called and line.called not in nodes]:
            self._drop(line)
        self._call_missing()

    def beat(self) -> None:
        """Say that this agent lives, and call again whoever has no line."""
        self._refusing.clear()
        for line in list(self._lines):
            line.quiet += 1
            if line.quiet > _PATIENCE:
                self._drop(line)
            elif line.node:
                self._say(line, _BEAT)
        self._call_missing()

    def reject(self, node: str) -> None:
        """The lines to a node break: a firewall refuses what is sent there."""
        for line in [line for line in self._lines if node in (line.node, line.called)]:
            self._drop(line)
        self._call_missing()

    def close(self) -> None:
        """Hang up; also what the kernel does for a process that ends."""
        self._wanted = frozenset()
        for line in list(self._lines):
            self._drop(line)

    def _call_missing(self) -> None:
        known = {line.node for line in self._lines} | {line.called for line in self._lines}
        for node in sorted(self._wanted - known - self._refusing):
            self._call(node)

    def _call(self, node: str) -> None:
        line = _Line(node)
        self._lines.append(line)
        self._network.packets += 1
        if (self._me, node) in self._network.rejected:
            self._network.engine.after(self._network.delay(), lambda: self._guard(lambda: self._failed(line)))
            return
        self._network.when_reached(self._me, node, lambda: self._knock(line, node))

    def _knock(self, line: _Line, node: str) -> None:
        """The kernel of the called host answers."""
        there = self._directory.get(node)
        if there is None:
            self._network.when_reached(node, self._me, lambda: self._guard(lambda: self._failed(line)))
            return
        theirs = _Line("")
        ends = (
            End(self._me, lambda word: self._guard(lambda: self._read(line, node, word))),
            End(node, lambda word: there._guard(lambda: there._read(theirs, self._me, word))),
        )
        connection = Connection(self._network, *ends)
        self._network.when_reached(node, self._me, lambda: self._guard(lambda: self._connected(line, connection)))
        there._guard(lambda: there._accept(theirs, connection))

    def _failed(self, line: _Line) -> None:
        if line in self._lines:
            self._lines.remove(line)
            self._refusing.add(line.called)
            if line.called in self._wanted:
                self._refused(line.called)

    def _connected(self, line: _Line, connection: Connection) -> None:
        line.connection = connection
        if line in self._lines:
            self._say(line, "proof")
        else:
            connection.close(0)

    def _accept(self, line: _Line, connection: Connection) -> None:
        line.connection = connection
        self._lines.append(line)
        self._say(line, "proof")

    def _say(self, line: _Line, word: str) -> None:
        if line.connection is not None:
            line.connection.send(0 if line.called else 1, word)

    def _read(self, line: _Line, node: str, word: str) -> None:
        if line not in self._lines:
            return
        if not word:
            self._drop(line)
            if node in self._wanted and not any(node in (other.node, other.called) for other in self._lines):
                self._call(node)
            return
        line.quiet = 0
        if not line.node:
            line.node = node
            self._drop_double(line)
        self._heard(node)

    def _drop_double(self, proved: _Line) -> None:
        ours = self._me < proved.node
        if bool(proved.called) == ours:
            for line in list(self._lines):
                if proved.node in (line.node, line.called) and bool(line.called) != ours:
                    self._drop(line)

    def _drop(self, line: _Line) -> None:
        if line in self._lines:
            self._lines.remove(line)
            if line.connection is not None:
                line.connection.close(0 if line.called else 1)
