"""One machine among several nodes, under a manual clock; and announcements and records for it."""

from __future__ import annotations

from dataclasses import replace

from resilient_train.plan import events as ev
from resilient_train.plan import membership as m
from resilient_train.plan.view import Limits, View
from resilient_train.spec.messages import Acknowledge, Boundaries, Hello, Stage
from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.world import WorldRecord, member_id

LIMITS = Limits(min_nodes=1, max_nodes=4)


def worker(member: str, generation: int = 1, **changes: object) -> WorkerInfo:
    """One that trains in a generation."""
    info = WorkerInfo(member=member, elastic=True, acknowledged=generation, formed=generation, stepping=generation)
    return replace(info, **changes)


def node(order: int, *workers: WorkerInfo, **changes: object) -> NodeInfo:
    """An announcement."""
    info = NodeInfo(node=f"n{order}", order=order, endpoint=f"n{order}:0", slots=1, link=f"n{order}:1", workers=workers)
    return replace(info, **changes)


def world(*orders: int, **changes: object) -> WorldRecord:
    """A world with one member on each of some nodes."""
    members = tuple(member_id(f"n{order}", 0, 0) for order in orders)
    record = WorldRecord(revision=1, generation=1, members=members, bootstrap="n0:0", reason="test")
    return replace(record, **changes)


class Bench:
    """One machine; swaps succeed unless it is told otherwise, and the clock moves by hand."""

    def __init__(self, order: int, limits: Limits = LIMITS) -> None:
        self.now = 100.0
        info = node(order)
        self.state = m.State(view=View(me=info.node, limits=limits, nodes={info.node: info}))
        self.effects: list[ev.Effect] = []
        self.wakes: list[float] = []
        self.answers = True
        """Whether the store takes a swap."""

    def feed(self, event: ev.Event) -> None:
        self.state, effects = m.step(self.state, event, self.now)
        for effect in effects:
            self.effects.append(effect)
            if isinstance(effect, ev.Swap) and self.answers:
                self.feed(ev.RecordSeen(effect.record))
            elif isinstance(effect, ev.Spawn):
                self.feed(ev.WorkerSpawned(effect.member))
            elif isinstance(effect, ev.Wake):
                self.wakes.append(effect.at)

    def sees(self, *nodes: NodeInfo, lost: dict[str, str] | None = None, doubted: bool = False) -> None:
        self.feed(ev.NodesSeen(nodes=nodes, lost=lost or {}, doubted=doubted))

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [at for at in self.wakes if at <= end]:
            self.now = max(self.now, min(due))
            self.wakes = [at for at in self.wakes if at > self.now]
            self.feed(ev.Tick())
        self.now = end

    def train(self, member: str) -> None:
        """A local worker says all that it says until it steps."""
        generation = self.record.generation
        self.feed(ev.WorkerSaid(member, Hello(member=member)))
        self.feed(ev.WorkerSaid(member, Acknowledge(generation=generation, at=self.now)))
        self.feed(ev.WorkerSaid(member, Stage(generation=generation, stage="formed", at=self.now)))
        self.feed(ev.WorkerSaid(member, Boundaries(generation=generation)))

    def taken(self, kind: type) -> list:
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects = [effect for effect in self.effects if not isinstance(effect, kind)]
        return found

    @property
    def record(self) -> WorldRecord:
        assert self.state.view.record is not None
        return self.state.view.record


def training(order: int, *others: int, limits: Limits = LIMITS) -> Bench:
    """A node that trains with others."""
    bench = Bench(order, limits)
    bench.sees(*(node(other, worker(f"n{other}/0.0")) for other in others))
    bench.feed(ev.RecordSeen(world(*sorted((order, *others)))))
    bench.train(f"n{order}/0.0")
    bench.effects.clear()
    return bench
