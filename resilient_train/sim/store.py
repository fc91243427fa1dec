"""The simulated control store: what a lasting, linearizable one does, and all that can go wrong on the way to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from resilient_train.sim.engine import Action, Engine
from resilient_train.sim.network import STORE, Network
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that the store says at one moment."""

    number: int
    """Grows with every change."""
    record: WorldRecord | None
    """The newest version of the record."""
    nodes: tuple[NodeInfo, ...]
    """The announcements that stand, by order."""


@dataclass
class _Lease:
    info: NodeInfo
    until: float
    expired: bool = False


class Store:
    """The store itself, without a way to it; times are passed in."""

    def __init__(self, ttl: float) -> None:
        """Args:
        ttl: seconds without a sign of life after which an announcement expires.
        """
        self.number = 0
        self.record: WorldRecord | None = None
        self._ttl = ttl
        self._joined = 0
        self._leases: dict[int, _Lease] = {}
        self._snapshot: Snapshot | None = None
        self._newest: object = None

    def join(self) -> int:
        """A number for a new node."""
        self._joined += 1
        return self._joined - 1

    def swap(self, record: WorldRecord) -> WorldRecord:
        """Put ``record`` in the place of the version before it; the version that stands."""
        if record.revision == self.revision() + 1:
            self.record = record
            self._changed(record)
        assert self.record is not None
        return self.record

    def announce(self, info: NodeInfo, now: float) -> None:
        """Publish an announcement."""
        self._leases[info.order] = _Lease(info, now + self._ttl)
        self._changed(info)

    def beat(self, order: int, now: float) -> None:
        """A sign of life; brings an expired announcement back."""
        lease = self._leases.get(order)
        if lease is not None:
            lease.until = now + self._ttl
            if lease.expired:
                lease.expired = False
                self._changed()

    def withdraw(self, order: int) -> None:
        """Take an announcement back."""
        if self._leases.pop(order, None) is not None:
            self._changed()

    def revision(self) -> int:
        """The revision of the newest version of the record; 0 if there is none."""
        return self.record.revision if self.record is not None else 0

    def look(self) -> Snapshot:
        """Everything as it is."""
        if self._snapshot is None:
            nodes = tuple(lease.info for _, lease in sorted(self._leases.items()) if not lease.expired)
            self._snapshot = Snapshot(number=self.number, record=self.record, nodes=nodes)
        return self._snapshot

    def expire(self, now: float) -> None:
        """Let go of announcements whose time is up."""
        for lease in self._leases.values():
            if not lease.expired and now >= lease.until:
                lease.expired = True
                self._changed()

    def expire_all(self) -> None:
        """Let go of all of them at once, as a store does that was frozen and resumed."""
        self.expire(float("inf"))

    def next_expiry(self) -> float:
        """When the next announcement expires."""
        return min((lease.until for lease in self._leases.values() if not lease.expired), default=float("inf"))

    def newest_size(self) -> int:
        """Bytes of what changed last."""
        return weight(self._newest)

    def _changed(self, what: object = None) -> None:
        self._newest = what
        self.number += 1
        self._snapshot = None


@dataclass
class Traffic:
    """What the store had to do."""

    writes: int = 0
    """Swaps, announcements, withdrawals."""
    swaps: int = 0
    """Versions of the record."""
    beats: int = 0
    """Signs of life."""
    reads: int = 0
    """Looks."""
    watched: int = 0
    """News delivered to watchers."""
    changes: int = 0
    """Changes that these news told of."""
    weigh: bool = False
    """Whether to count bytes, which takes time."""
    nbytes: int = 0
    """Bytes of records and announcements, in and out; news count what has changed."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of each change, where they are counted."""

    def carry(self, *values: object) -> None:
        """Count the bytes of what was sent or received."""
        if self.weigh:
            self.nbytes += sum(weight(value) for value in values)

    def tell(self, number: int, newest: int) -> None:
        """News after ``number`` are delivered."""
        self.watched += 1
        self.changes += newest - number
        if self.weigh:
            self.nbytes += sum(self.sizes[number:newest])


def weight(value: object) -> int:
    """Bytes of a record, an announcement or news on the wire."""
    if isinstance(value, Snapshot):
        return sum(map(weight, [value.record, *value.nodes]))
    if isinstance(value, WorldRecord | NodeInfo):
        return len(json.dumps(value.to_json()))
    return 0


@dataclass
class _Watcher:
    number: int
    answer: Callable[[Snapshot], None]


@dataclass
class Trouble:
    """What is wrong with the store at the moment."""

    down: int = 0
    """It refuses connections."""
    frozen: int = 0
    """It takes requests and does nothing."""
    slow: float = 0.0
    """Seconds by which each answer is late."""
    lost_answers: int = 0
    """Swaps to come that are carried out and whose answers get lost."""
    backlog: list[Action] = field(default_factory=list)
    """What came while it was frozen."""


class Server:
    """The store behind a network."""

    def __init__(self, engine: Engine, network: Network, ttl: float) -> None:
        """Args:
        engine: time.
        network: the way to it.
        ttl: seconds after which an announcement without signs of life expires.
        """
        self.store = Store(ttl)
        self.trouble = Trouble()
        self.traffic = Traffic()
        self.committed: list[Callable[[WorldRecord], None]] = []
        """Told of each version of the record."""
        self._engine = engine
        self._network = network
        self._watchers: dict[str, _Watcher] = {}
        self._told = 0
        self._expiry = float("inf")

    def answers(self, host: str) -> bool:
        """Whether a host gets answers."""
        return not self.trouble.down and not self.trouble.frozen and self._network.connected(host, STORE)

    def request(self, host: str, call: Callable[[Store], Any], answer: Callable[[Any], None], refused: Action) -> None:
        """Carry out a call; neither ``answer`` nor ``refused`` may ever come."""
        if not self._network.reaches(host, STORE):
            return
        if self.trouble.down:
            self._engine.after(2 * self._network.delay(), refused)
            return
        self._engine.after(self._network.delay(), lambda: self._arrive(host, call, answer))

    def _arrive(self, host: str, call: Callable[[Store], Any], answer: Callable[[Any], None]) -> None:
        if self.trouble.down:
            return
        if self.trouble.frozen:
            self.trouble.backlog.append(lambda: self._arrive(host, call, answer))
            return
        before = self.store.record
        number = self.store.number
        result = call(self.store)
        if self.traffic.weigh and self.store.number > number:
            self.traffic.sizes += [self.store.newest_size()] * (self.store.number - number)
        self._look_around()
        if self.store.record is not before and self.store.record is not None:
            self.traffic.swaps += 1
            for told in self.committed:
                told(self.store.record)
            if self.trouble.lost_answers:
                self.trouble.lost_answers -= 1
                return
        self.traffic.carry(result)
        if self._network.reaches(STORE, host):
            self._engine.after(self._network.delay() + self.trouble.slow, lambda: answer(result))

    def watch(self, host: str, number: int, answer: Callable[[Snapshot], None]) -> None:
        """Have the next news after ``number`` sent; they may get lost."""

        def begin(store: Store) -> None:
            if store.number > number:
                self._send(host, number, answer)
            else:
                self._watchers[host] = _Watcher(number, answer)

        self.request(host, begin, lambda _: None, lambda: None)

    def watches(self, host: str) -> bool:
        """Whether a host's watch stands."""
        return host in self._watchers

    def now(self) -> float:
        """The store's own time."""
        return self._engine.now

    def withdraw_watch(self, host: str) -> None:
        """The watcher is gone."""
        self._watchers.pop(host, None)

    def _look_around(self) -> None:
        """Let announcements expire, and tell who watches."""
        if self.trouble.down or self.trouble.frozen:
            return
        number = self.store.number
        self.store.expire(self._engine.now)
        self.traffic.sizes += [0] * (self.store.number - number if self.traffic.weigh else 0)
        upcoming = self.store.next_expiry()
        if upcoming < self._expiry or self._expiry <= self._engine.now:
            self._expiry = upcoming
            if upcoming < float("inf"):
                self._engine.at(upcoming, self._look_around)
        if self.store.number != self._told:
            self._told = self.store.number
            for host, watcher in list(self._watchers.items()):
                if watcher.number < self._told:
                    del self._watchers[host]
                    self._send(host, watcher.number, watcher.answer)

    def _send(self, host: str, number: int, answer: Callable[[Snapshot], None]) -> None:
        news = self.store.look()
        self.traffic.tell(number, news.number)
        if self._network.reaches(STORE, host):
            self._engine.after(self._network.delay() + self.trouble.slow, lambda: answer(news))

    # ---- what goes wrong --------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """SIGSTOP."""
        self.trouble.frozen += 1

    def thaw(self, losing_leases: bool) -> None:
        """SIGCONT; all leases may turn out to have ended meanwhile."""
        self.trouble.frozen -= 1
        if self.trouble.frozen:
            return
        if losing_leases:
            self.store.expire_all()
        backlog, self.trouble.backlog = self.trouble.backlog, []
        for action in backlog:
            action()
        self._look_around()

    def fall(self) -> None:
        """All of its servers are killed; what they agreed on is on their disks."""
        self.trouble.down += 1
        self._watchers.clear()

    def rise(self) -> None:
        """They are started again."""
        self.trouble.down -= 1
        if not self.trouble.down:
            self._look_around()
