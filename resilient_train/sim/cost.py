"""What the control plane costs: messages and store operations for each event, counted in the simulation.

Counted for as many nodes as can be simulated, and reckoned on from there by the order that the protocol gives each:
a node writes as often, and has as many neighbours, however many there are; each change is told to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilient_train.sim.cluster import Cluster, Job

KINDS = ("idle, per second", "start of the job", "worker lost and replaced", "node lost", "node joins")
"""The events."""
COLUMNS = ("writes", "versions of the record", "signs of life", "changes told", "bytes", "messages between agents")
"""What is counted of each."""
_ORDERS = (1, 0, 1, 2, 2, 1)
"""How each grows with the number of nodes: not, linearly, with its square."""
_STEPS = 10_000
_START = 14.0
_AFTER = 20.0
_IDLE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one event cost, beyond what goes on anyway."""

    writes: float
    """Announcements and versions of the record."""
    swaps: float
    """Versions of the record among them."""
    beats: float
    """Signs of life to the store."""
    changes: float
    """Changes told to watchers, over all watchers."""
    nbytes: float
    """Bytes to and from the store."""
    packets: float
    """Messages between agents."""

    def told_to_few(self, nodes: int, few: int) -> float:
        """The changes told, if only ``few`` watched announcements, and all the record."""
        return few * (self.writes - self.swaps) + nodes * self.swaps

    def values(self) -> tuple[float, ...]:
        """In the order of `COLUMNS`."""
        return (self.writes, self.swaps, self.beats, self.changes, self.nbytes, self.packets)


def count(nodes: int) -> dict[str, Cost]:
    """The costs of every kind of event for a number of nodes with one rank each."""
    cluster = Cluster(Job(nodes=nodes, slots=1, max_nodes=nodes + 1, min_nodes=max(1, nodes - 1), steps=_STEPS))
    cluster.server.traffic.weigh = True
    costs = {"start of the job": _during(cluster, _START, None)}
    idle = _during(cluster, _IDLE, None)
    costs["idle, per second"] = Cost(**_named([value / _IDLE for value in idle.values()]))
    worker = cluster.worker("n1/0")
    assert worker is not None
    worker.end(-9)
    costs["worker lost and replaced"] = _during(cluster, _AFTER, costs["idle, per second"])
    cluster.kill_host("n0")
    costs["node lost"] = _during(cluster, _AFTER, costs["idle, per second"])
    cluster.start_node()
    costs["node joins"] = _during(cluster, _AFTER, costs["idle, per second"])
    return costs


def _during(cluster: Cluster, seconds: float, idle: Cost | None) -> Cost:
    before, begin = _now(cluster), cluster.engine.now
    cluster.run(begin + seconds, to_the_end=True)
    spent = cluster.engine.now - begin
    usual = [value * spent for value in idle.values()] if idle is not None else [0.0] * len(COLUMNS)
    values = [after - old - on for after, old, on in zip(_now(cluster), before, usual, strict=True)]
    return Cost(**_named([max(0.0, value) for value in values]))


def _now(cluster: Cluster) -> tuple[int, ...]:
    traffic = cluster.server.traffic
    return (traffic.writes, traffic.swaps, traffic.beats, traffic.changes, traffic.nbytes, cluster.network.packets)


def _named(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("writes", "swaps", "beats", "changes", "nbytes", "packets"), values, strict=True))


def reckon(small: Cost, few: int, large: Cost, many: int, nodes: int) -> Cost:
    """From the costs for a few and for many nodes those for more."""
    found = []
    for order, one, other in zip(_ORDERS, small.values(), large.values(), strict=True):
        slope = (other - one) / (many - few) if order else 0.0
        found.append(other * (nodes / many) ** 2 if order == 2 else other + max(0.0, slope) * (nodes - many))
    return Cost(**_named(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What the agreement's duration is reckoned from."""

    way: float = 0.0005
    """Seconds of a message from host to host."""
    commit: float = 0.005
    """Seconds for the store to make a version of the record durable on most of its servers."""
    coalesce: float = 0.02
    """Seconds that further reasons are waited for."""
    bandwidth: float = 3e9
    """Bytes a second that the store sends in all: three servers of 1 GB/s."""
    watches: float = 1e5
    """Watchers a second that the store tells."""
    thinking: float = 8e-6
    """Seconds of processor time for each rank to take a loss in, propose and encode; measured for 80,000 ranks."""
    rank: int = 13
    """Bytes of a rank in the record."""


def agreement(nodes: int, slots: int, record: int | None = None, assumed: Assumed | None = None) -> tuple[float, float]:
    """Seconds from the refusal that tells of a lost node to the agreed record, and until the last node has heard it.

    Args:
        nodes: how many.
        slots: ranks on each.
        record: bytes that each node has to be sent; default: the record as it is, which names every rank.
        assumed: what the parts take.
    """
    given = assumed or Assumed()
    ranks = nodes * slots
    whole = ranks * given.rank
    send = whole / (given.bandwidth / 3)
    agreed = 2 * given.way + given.coalesce + ranks * given.thinking + given.way + send + given.commit
    told = nodes / given.watches + nodes * (whole if record is None else record) / given.bandwidth
    return agreed, agreed + told + given.way
