"""What reaches whom, and how fast: hosts that die or are cut off, connections that keep their order.

A packet that is dropped is sent again by TCP, so what is said over a connection across a cut arrives when the cut has
healed, unless an end has hung up by then.  Nothing overtakes within a connection; two connections know no order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from resilient_train.sim.engine import Action, Engine

STORE = "store"
"""The host of the control store."""
_RESENT = 1.0
"""Seconds, at most, from the end of a cut to the next attempt of TCP to send what was lost."""


class Network:
    """Packets between hosts."""

    def __init__(self, engine: Engine, random: Random, latency: float = 0.0005) -> None:
        """Args:
        engine: time.
        random: of delays.
        latency: of a packet on its way, in seconds; some take ten times as long.
        """
        self.engine = engine
        self.random = random
        self.dead: set[str] = set()
        """Hosts that lost their power: nothing answers there."""
        self.packets = 0
        """Messages that were sent between agents."""
        self.rejected: set[tuple[str, str]] = set()
        """(one, other): packets that a firewall of ``one`` refuses instead of sending."""
        self._latency = latency
        self._cuts: dict[tuple[str, str], int] = {}
        self._waiting: dict[tuple[str, str], list[Action]] = {}

    def reaches(self, one: str, other: str) -> bool:
        """Whether packets from one host arrive at another."""
        if one == other:
            return one not in self.dead
        return (one, other) not in self._cuts and one not in self.dead and other not in self.dead

    def connected(self, one: str, other: str) -> bool:
        """Whether packets arrive both ways."""
        return self.reaches(one, other) and self.reaches(other, one)

    def delay(self) -> float:
        """Seconds that a packet takes."""
        return self._latency * (10.0 if self.random.random() < 0.05 else 0.5 + self.random.random())

    def cut(self, one: str, other: str) -> None:
        """Drop packets from ``one`` to ``other``, until it is healed as often."""
        self._cuts[one, other] = self._cuts.get((one, other), 0) + 1

    def heal(self, one: str, other: str) -> None:
        """The opposite of `cut`."""
        left = self._cuts.pop((one, other), 1) - 1
        if left > 0:
            self._cuts[one, other] = left
            return
        for action in self._waiting.pop((one, other), []):
            self.engine.after(self.random.random() * _RESENT, action)

    def whole(self) -> bool:
        """Whether nothing is cut."""
        return not self._cuts

    def when_reached(self, one: str, other: str, action: Action) -> None:
        """Run ``action`` when TCP gets a packet from ``one`` to ``other``: never if either host is dead."""
        if self.reaches(one, other):
            self.engine.after(self.delay(), action)
        elif one not in self.dead and other not in self.dead:
            self._waiting.setdefault((one, other), []).append(action)


@dataclass
class End:
    """One end of a connection."""

    host: str
    received: Callable[[str], None]
    """Called with what arrives: a word, or an empty one if the other end hung up."""
    open: bool = True
    pending: list[str] = field(default_factory=list)
    """What was sent and has not arrived."""


class Connection:
    """A TCP connection: words arrive in order or not at all; who hangs up is heard to, if packets pass."""

    def __init__(self, network: Network, caller: End, called: End) -> None:
        self._network = network
        self._ends = (caller, called)

    def send(self, side: int, word: str) -> None:
        """Say a word from one side (0: the caller's)."""
        sender, other = self._ends[side], self._ends[1 - side]
        if not sender.open:
            return
        self._network.packets += 1
        sender.pending.append(word)
        self._network.when_reached(sender.host, other.host, lambda: self._arrive(side))

    def close(self, side: int) -> None:
        """Hang up one side."""
        if self._ends[side].open:
            self.send(side, "")
            self._ends[side].open = False

    def _arrive(self, side: int) -> None:
        sender, other = self._ends[side], self._ends[1 - side]
        # What comes first to the other's host carries the oldest word; so nothing overtakes.
        word = sender.pending.pop(0) if sender.pending else ""
        if other.open:
            other.received(word)
