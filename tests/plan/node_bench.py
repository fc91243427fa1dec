"""One machine on one node, under a manual clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from resilient_train.plan import events as ev
from resilient_train.plan import membership as m
from resilient_train.plan.view import Limits, View
from resilient_train.spec.messages import (
    Acknowledge,
    Boundaries,
    Hello,
    Stage,
)
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord


@dataclass
class Bench:
    """Runs one machine: swaps succeed at once, spawned processes run at once, the clock moves by hand."""

    slots: int = 4
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.now = 100.0
        info = NodeInfo(node="n", order=0, endpoint="h:1", slots=self.slots)
        self.state = m.State(view=View(me="n", limits=self.limits, nodes={"n": info}))
        self.effects: list[ev.Effect] = []
        self.wakes: list[float] = []
        self.feed(ev.RecordSeen(None))

    def feed(self, event: ev.Event) -> None:
        self.state, effects = m.step(self.state, event, self.now)
        for effect in effects:
            self.effects.append(effect)
            if isinstance(effect, ev.Swap):
                self.feed(ev.RecordSeen(effect.record))
            elif isinstance(effect, ev.Spawn):
                self.feed(ev.WorkerSpawned(effect.member))
            elif isinstance(effect, ev.Wake):
                self.wakes.append(effect.at)

    def run_for(self, seconds: float) -> None:
        """Let time pass, with a tick whenever the machine asked for one."""
        end = self.now + seconds
        while due := [at for at in self.wakes if at <= end]:
            self.now = max(self.now, min(due))
            self.wakes = [at for at in self.wakes if at > self.now]
            self.feed(ev.Tick())
        self.now = end

    @property
    def record(self) -> WorldRecord:
        assert self.state.view.record is not None
        return self.state.view.record

    def taken(self, kind: type) -> list:
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects = [effect for effect in self.effects if not isinstance(effect, kind)]
        return found

    def say(self, member: str, message: object) -> None:
        self.feed(ev.WorkerSaid(member, message))

    def enter(self, *members: str) -> None:
        """Members form the current generation and begin to step."""
        generation = self.record.generation
        for member in members or self.record.members:
            self.say(member, Acknowledge(generation=generation, at=self.now))
        for member in members or self.record.members:
            self.say(member, Stage(generation=generation, stage="formed", at=self.now))
            self.say(member, Boundaries(generation=generation))

    def start(self) -> None:
        for member in self.record.members:
            self.say(member, Hello(member=member))
        self.enter()


def running(**kwargs: object) -> Bench:
    bench = Bench(**kwargs)
    bench.start()
    bench.effects.clear()
    return bench
