"""What goes wrong, when, and with whom: schedules drawn from a seed, written and read as text, and made smaller.

A scenario is a job and its faults::

    job nodes=3 slots=2 min_nodes=1 max_nodes=3 standby=0 steps=40 seed=7
    at 6.250 kill-agent n1
    at 7.000 cut n0 n2 store for 3.000

so a failing one can be pasted into a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random

from resilient_train.errors import FormatError
from resilient_train.plan.events import LeaveAsked, Wished
from resilient_train.sim.cluster import Cluster, Job
from resilient_train.sim.network import STORE
from resilient_train.spec.world import node_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    at: float
    """When, in seconds from the beginning."""
    what: str
    """A verb of `VERBS`."""
    whom: tuple[str, ...] = ()
    """Nodes (``n1``), places (``n1/0``) or ``store``."""
    seconds: float = 0.0
    """How long, where it ends by itself."""

    def __str__(self) -> str:
        words = [f"at {self.at:.3f}", self.what, *self.whom]
        return " ".join(words) + (f" for {self.seconds:.3f}" if self.seconds else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A job and what happens to it."""

    job: Job
    """What is run."""
    faults: tuple[Fault, ...] = ()
    """What goes wrong."""

    def __str__(self) -> str:
        settings = " ".join(f"{f.name}={getattr(self.job, f.name)}" for f in fields(self.job))
        return "\n".join([f"job {settings}", *map(str, self.faults)])

    @property
    def over_at(self) -> float:
        """When the last fault has ended."""
        return max((fault.at + fault.seconds for fault in self.faults), default=0.0)


def parse(text: str) -> Scenario:
    """A scenario from its text; empty lines and what follows a ``#`` are left out.

    Raises:
        FormatError: if a line says nothing known.
    """
    job, faults = Job(), []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            if words[0] == "job":
                job = _job(words[1:])
            else:
                faults.append(_fault(words))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise FormatError(f"not a line of a scenario: {line!r}") from error
    return Scenario(job=job, faults=tuple(faults))


def _job(words: list[str]) -> Job:
    settings = dict(word.split("=") for word in words)
    within = float(settings.pop("within", Job().within))
    return Job(within=within, **{name: int(value) for name, value in settings.items()})


def _fault(words: list[str]) -> Fault:
    if words[0] != "at" or words[2] not in VERBS:
        raise ValueError
    seconds = 0.0
    if len(words) > 4 and words[-2] == "for":
        seconds, words = float(words[-1]), words[:-2]
    return Fault(at=float(words[1]), what=words[2], whom=tuple(words[3:]), seconds=seconds)


# ---- what each does -------------------------------------------------------------------------------------------------


def _kill_worker(cluster: Cluster, fault: Fault) -> None:
    worker = cluster.worker(fault.whom[0])
    if worker is not None:
        worker.end(-9)


def _stop_worker(cluster: Cluster, fault: Fault) -> None:
    worker = cluster.worker(fault.whom[0])
    if worker is not None:
        worker.stop()
        cluster.engine.after(fault.seconds, worker.resume)


def _busy_worker(cluster: Cluster, fault: Fault) -> None:
    worker = cluster.worker(fault.whom[0])
    if worker is not None:
        worker.busy_until = cluster.engine.now + fault.seconds


def _stick_worker(cluster: Cluster, fault: Fault) -> None:
    """Its main thread never comes out of what it does; not in first steps, which take as long as they take, nor where
    it waits for others, from which it is freed."""
    worker = cluster.worker(fault.whom[0])
    steps = sum(worker is not None and at[1] == worker.generation for at in cluster.checker.steps)
    if worker is not None and steps > _SETTLED and not worker.waits:
        worker.busy_until = float("inf")


def _kill_agent(cluster: Cluster, fault: Fault) -> None:
    node = cluster.node(fault.whom[0])
    if node is not None:
        node.die()


def _kill_hosts(cluster: Cluster, fault: Fault) -> None:
    """A host, or all of a rack."""
    for name in fault.whom:
        cluster.kill_host(name)


def _stop_agent(cluster: Cluster, fault: Fault) -> None:
    node = cluster.node(fault.whom[0])
    if node is not None:
        node.agent.stop()
        cluster.engine.after(fault.seconds, node.agent.resume)


def _drain(cluster: Cluster, fault: Fault) -> None:
    node = cluster.node(fault.whom[0])
    if node is not None:
        node.agent.feed(LeaveAsked("drained"))


def _start_node(cluster: Cluster, fault: Fault) -> None:
    del fault
    cluster.start_node()


def _cut(cluster: Cluster, fault: Fault) -> None:
    """Nothing passes between the first and the others; ``cut-to``: nothing from the first."""
    one, others = fault.whom[0], fault.whom[1:]
    ways = [(one, other) for other in others]
    if fault.what != "cut-to":
        ways += [(other, one) for other in others]
    for way in ways:
        cluster.network.cut(*way)
        cluster.engine.after(fault.seconds, lambda way=way: cluster.network.heal(*way))  # type: ignore[misc]


def _cut_world(cluster: Cluster, fault: Fault) -> None:
    """All nodes of the world are cut off from the store and from all other nodes, but not from each other."""
    record = cluster.record
    world = {node_of(member) for member in record.members} if record is not None else set()
    others = [*(name for name in cluster.nodes if name not in world), STORE]
    for one in sorted(world):
        _cut(cluster, Fault(at=fault.at, what="cut", whom=(one, *others), seconds=fault.seconds))


def _wish(cluster: Cluster, fault: Fault) -> None:
    """``rtctl drain``, or ``scale`` to a number of nodes, said to the first node that lives."""
    node = next((node for node in cluster.nodes.values() if node.alive), None)
    if node is None:
        return
    leave = fault.whom if fault.what == "wish-drain" else ()
    room = int(fault.whom[0]) if fault.what == "wish-scale" else 0
    if set(leave) <= node.agent.state.view.nodes.keys() and node.agent.state.view.elastic():
        node.agent.guard(lambda: node.agent.feed(Wished(leave, room)))


def _reject(cluster: Cluster, fault: Fault) -> None:
    """The first host's own firewall refuses all that it sends to the others."""
    one, others = fault.whom[0], fault.whom[1:]
    links = cluster.directory.get(one)
    for other in others:
        cluster.network.rejected.add((one, other))
        if links is not None:
            links.reject(other)

    def heal() -> None:
        cluster.network.rejected -= {(one, other) for other in others}

    cluster.engine.after(fault.seconds, heal)
    _cut(cluster, fault)


def _freeze_store(cluster: Cluster, fault: Fault) -> None:
    cluster.server.freeze()
    losing = fault.what == "freeze-store-losing-leases"
    cluster.engine.after(fault.seconds, lambda: cluster.server.thaw(losing))


def _down_store(cluster: Cluster, fault: Fault) -> None:
    cluster.server.fall()
    cluster.engine.after(fault.seconds, cluster.server.rise)


def _lose_answer(cluster: Cluster, fault: Fault) -> None:
    del fault
    cluster.server.trouble.lost_answers += 1


def _slow_store(cluster: Cluster, fault: Fault) -> None:
    late = float(fault.whom[0])
    cluster.server.trouble.slow += late

    def fast() -> None:
        cluster.server.trouble.slow = max(0.0, cluster.server.trouble.slow - late)

    cluster.engine.after(fault.seconds, fast)


VERBS: dict[str, Callable[[Cluster, Fault], None]] = {
    "kill-worker": _kill_worker,
    "stop-worker": _stop_worker,
    "busy-worker": _busy_worker,
    "stick-worker": _stick_worker,
    "kill-agent": _kill_agent,
    "kill-host": _kill_hosts,
    "stop-agent": _stop_agent,
    "drain": _drain,
    "start-node": _start_node,
    "cut": _cut,
    "cut-to": _cut,
    "reject": _reject,
    "cut-world": _cut_world,
    "wish-drain": _wish,
    "wish-scale": _wish,
    "freeze-store": _freeze_store,
    "freeze-store-losing-leases": _freeze_store,
    "down-store": _down_store,
    "lose-answer": _lose_answer,
    "slow-store": _slow_store,
}
"""What can go wrong, by name."""
OF_STORE = frozenset({"freeze-store", "freeze-store-losing-leases", "down-store", "lose-answer", "slow-store"})
"""Troubles of the store alone; they change no world."""
PLANNED = frozenset({"drain", "start-node", "wish-drain", "wish-scale"})
"""What is meant to change the world, and loses no step."""
_DRAINS = ("drain", "wish-drain")
_WEIGHTS = {
    "kill-worker": 4,
    "stop-worker": 1,
    "busy-worker": 2,
    "stick-worker": 2,
    "kill-agent": 4,
    "kill-host": 4,
    "stop-agent": 4,
    "drain": 2,
    "wish-drain": 2,
    "wish-scale": 1,
    "start-node": 2,
    "cut": 5,
    "cut-to": 3,
    "reject": 2,
    "freeze-store": 2,
    "freeze-store-losing-leases": 2,
    "down-store": 2,
    "lose-answer": 2,
    "slow-store": 1,
}
_SETTLED = 25
"""Steps after which the agents, which look once a second, have seen enough of a generation to find a hang in it."""
_SPECIAL = 20
"""One seed of so many loses a rack; another has a world cut off from the store, beside nodes that are not."""


# ---- schedules ------------------------------------------------------------------------------------------------------


def draw(seed: int) -> Scenario:
    """The scenario of a seed: some faults, and nodes started again so that enough are left for the job."""
    random = Random(seed)
    if seed % _SPECIAL == _SPECIAL - 1:
        return _rack(random, seed)
    if seed % _SPECIAL == _SPECIAL - 2:
        return _split(random, seed)
    nodes = random.choice((2, 3, 3, 4, 5))
    least = random.randint(1, max(1, nodes - 1))
    slots = random.choice((1, 1, 2))
    job = Job(
        nodes=nodes,
        slots=slots,
        min_nodes=least,
        max_nodes=random.choice((nodes, nodes, nodes, max(least, nodes - 1))),
        standby=random.choice((0, 0, 0, 1)),
        multiple=random.choice((1, slots)),
        steps=random.choice((30, 60, 100)),
        seed=seed,
    )
    count = random.choice((1, 1, 2, 2, 3, 4, 5))
    times = sorted(round(random.uniform(0.5, 13.0), 3) for _ in range(count))
    only_store = random.random() < 0.1
    verbs = [verb for verb in _WEIGHTS if not only_store or verb in OF_STORE]
    faults = []
    for at in times:
        verb = random.choices(verbs, [_WEIGHTS[verb] for verb in verbs])[0]
        faults.append(_drawn(random, job, at, verb))
        if verb in ("kill-agent", "kill-host", *_DRAINS) and random.random() < 0.5:
            faults.append(Fault(at=round(at + random.uniform(0.5, 6.0), 3), what="start-node"))
    gone = {fault.whom[0] for fault in faults if fault.what in ("kill-agent", "kill-host", *_DRAINS)}
    come = sum(fault.what == "start-node" for fault in faults)
    for missing in range(least - (nodes - len(gone) + come)):
        faults.append(Fault(at=round(15.0 + missing, 3), what="start-node"))
    return Scenario(job=job, faults=tuple(sorted(faults, key=lambda fault: fault.at)))


def _split(random: Random, seed: int) -> Scenario:
    """A world that only its own nodes hear of, and spare nodes that are there or come."""
    nodes = random.randint(2, 5)
    room = random.randint(1, nodes - 1)
    job = Job(
        nodes=nodes,
        slots=random.choice((1, 2)),
        min_nodes=random.randint(1, min(room, nodes - room)),
        max_nodes=room,
        standby=random.choice((0, 0, 1)),
        steps=random.choice((300, 600)),
        within=random.choice((2.0, 5.0)),
        seed=seed,
    )
    at = round(random.uniform(6.0, 12.0), 3)
    faults = [Fault(at=at, what="cut-world", seconds=round(random.uniform(5.0, 90.0), 3))]
    for _ in range(random.choice((0, 0, 1, 2))):
        when = round(at + random.uniform(-3.0, 60.0), 3)
        verb = random.choice(("start-node", "stop-agent", "cut", "cut-to", "freeze-store", "kill-worker", "cut-world"))
        faults.append(_drawn(random, job, when, verb))
    return Scenario(job=job, faults=tuple(sorted(faults, key=lambda fault: fault.at)))


def _rack(random: Random, seed: int) -> Scenario:
    """Nodes beside each other lose their power at once."""
    nodes = random.choice((10, 16, 20))
    job = Job(nodes=nodes, slots=1, min_nodes=1, max_nodes=nodes, steps=150, seed=seed)
    count = random.randint(2, nodes - 2)
    first = random.randrange(nodes - count)
    whom = tuple(f"n{order}" for order in range(first, first + count))
    return Scenario(job=job, faults=(Fault(at=round(random.uniform(8.0, 14.0), 3), what="kill-host", whom=whom),))


def _drawn(random: Random, job: Job, at: float, verb: str) -> Fault:
    names = [f"n{order}" for order in range(job.nodes)]
    node = random.choice(names)
    seconds = round(random.choice((random.uniform(0.1, 3.0), random.uniform(3.0, 12.0))), 3)
    if verb.endswith("-worker"):
        place = f"{node}/{random.randrange(job.slots)}"
        lasts = verb in ("stop-worker", "busy-worker")
        return Fault(at=at, what=verb, whom=(place,), seconds=seconds if lasts else 0.0)
    if verb == "wish-scale":
        return Fault(at=at, what=verb, whom=(str(random.randint(job.min_nodes, job.nodes)),))
    if verb in ("kill-agent", "kill-host", *_DRAINS):
        return Fault(at=at, what=verb, whom=(node,))
    if verb == "stop-agent":
        return Fault(at=at, what=verb, whom=(node,), seconds=seconds)
    if verb in ("cut", "cut-to", "reject"):
        others = [name for name in names if name != node]
        if random.random() < 0.5:
            others = random.sample(others, random.randint(1, len(others)))
        if random.random() < 0.5:
            others.append(STORE)
        return Fault(at=at, what=verb, whom=(node, *others), seconds=seconds)
    if verb == "slow-store":
        return Fault(at=at, what=verb, whom=(f"{random.uniform(0.05, 2.0):.2f}",), seconds=seconds)
    return Fault(at=at, what=verb, seconds=0.0 if verb in ("lose-answer", "start-node") else seconds)


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """The same with every fault left out that is not needed for it to fail."""
    smaller = True
    while smaller:
        smaller = False
        for index in range(len(scenario.faults)):
            without = replace(scenario, faults=scenario.faults[:index] + scenario.faults[index + 1 :])
            if fails(without):
                scenario, smaller = without, True
                break
    return scenario
