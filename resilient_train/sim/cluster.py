"""A cluster: hosts with agents and workers, one control store, a network between them, and what can happen to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from resilient_train.errors import ExitCode
from resilient_train.plan import events as ev
from resilient_train.plan import membership as m
from resilient_train.plan.view import Limits, Timing, View
from resilient_train.sim.agent import Agent
from resilient_train.sim.engine import DriftingClock, Engine
from resilient_train.sim.invariants import Checker
from resilient_train.sim.links import Links
from resilient_train.sim.network import Network
from resilient_train.sim.store import Server
from resilient_train.sim.worker import LOCAL, Group, Worker
from resilient_train.spec.messages import Message, WorldIs
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.rank import RankReport
from resilient_train.spec.world import Key, Phase, WorldRecord, ancestry, in_ancestry, node_of, slot_of

_DRIFT = 0.005
"""How much faster or slower than another a node's clock may go."""
_PERSIST_EVERY = 10
"""Steps between states that outlive all nodes."""
_HEARS = 5.0
"""Seconds after which a node that can hear of the record again has heard of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is run, and on what."""

    nodes: int = 3
    """Nodes that are there from the beginning."""
    slots: int = 2
    """Ranks on each."""
    min_nodes: int = 1
    """As in ``--nnodes``."""
    max_nodes: int = 3
    """As in ``--nnodes``."""
    standby: int = 0
    """As in ``--standby``."""
    multiple: int = 1
    """The mesh takes multiples of so many ranks."""
    most: int = 0
    """The mesh takes so many ranks at most; 0 for any number."""
    steps: int = 40
    """Steps of the training."""
    within: float = 5.0
    """As in ``--detect-within``."""
    seed: int = 0
    """Of all that is random."""


class Node:
    """A host with its agent and its workers."""

    def __init__(self, cluster: Cluster, name: str, order: int) -> None:
        job, random = cluster.job, cluster.random
        self.name = name
        self.workers: dict[str, Worker] = {}
        self.ended: ev.End | None = None
        self.vouched_until = 0.0
        self._cluster = cluster
        self.clock = clock = DriftingClock(
            cluster.engine, random.random() * 1e5, 1 + _DRIFT * (2 * random.random() - 1)
        )
        info = NodeInfo(
            node=name, order=order, endpoint=f"{name}:0", slots=job.slots, standby=job.standby, link=f"{name}:link"
        )
        limits = Limits(min_nodes=job.min_nodes, max_nodes=job.max_nodes)
        view = View(me=name, limits=limits, nodes={name: info}, timing=Timing.scaled(job.within))
        self.agent = Agent(
            m.State(view=view), job.within, clock, cluster.network, cluster.server, cluster.directory, self, self._end
        )

    @property
    def alive(self) -> bool:
        """Whether its agent is there."""
        return self.agent.alive

    def _end(self, end: ev.End) -> None:
        self.ended = end

    def die(self) -> None:
        """The agent's process ends, and its children with it."""
        self.agent.die()
        for worker in list(self.workers.values()):
            worker.end(-9)

    def spawn(self, member: str, record: WorldRecord) -> None:
        del record
        if member in self._cluster.spawned:
            self._cluster.checker.wrong(f"{member} was started twice")
        self._cluster.spawned.add(member)
        worker = Worker(self._cluster, member)
        self.workers[member] = worker
        worker.begin(1.5 + 1.5 * self._cluster.random.random())

    def stop(self, member: str) -> None:
        worker = self.workers.get(member)
        if worker is not None:
            self._cluster.engine.after(30.0 if worker.is_stopped else 0.02, lambda: worker.end(-15))

    def tell(self, member: str, world: WorldIs) -> None:
        worker = self.workers.get(member)
        if worker is not None:
            record = self._cluster.checker.records[world.record["revision"]]
            self._cluster.engine.after(LOCAL, lambda: worker.run(lambda: worker.hear(record)))

    def vouch(self, until: float) -> None:
        self.vouched_until = until

    def progress(self, record: WorldRecord) -> tuple[int, int] | None:
        steps = [w.step for w in self.workers.values() if w.member in record.members and w.step >= 0]
        current = [w.step for w in self.workers.values() if w.generation == record.generation and w.step >= 0]
        return (record.generation, max(current)) if steps and current else None

    def running(self) -> list[str]:
        return list(self.workers)

    def board(self) -> dict[str, tuple[int, int]]:
        return {member: worker.board for member, worker in self.workers.items()}

    def stopped(self) -> set[str]:
        return {member for member, worker in self.workers.items() if worker.is_stopped}

    def ask(self, member: str, answer: Callable[[RankReport], None]) -> None:
        worker, engine = self.workers.get(member), self._cluster.engine
        if worker is None:
            return

        def say() -> None:
            report = worker.report()
            engine.after(LOCAL, lambda: self.agent.guard(lambda: answer(report)))

        engine.after(LOCAL, lambda: worker.run(say))

    def kill(self, member: str) -> None:
        worker = self.workers.get(member)
        if worker is not None:
            worker.end(-9)


class Cluster:
    """Everything, and time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.random = Random(job.seed)
        self.engine = Engine()
        self.network = Network(self.engine, self.random)
        self.server = Server(self.engine, self.network, job.within)
        self.checker = Checker()
        self.server.committed.append(lambda record: self.checker.committed(record, self.engine.now))
        self.directory: dict[str, Links] = {}
        self.nodes: dict[str, Node] = {}
        self.spawned: set[str] = set()
        self.total = job.steps
        self.mesh = (job.multiple, job.most)
        self.starting = 0
        """Nodes that are on their way."""
        self._groups: dict[int, Group] = {}
        self._durable: list[Key] = []
        self._deaf_at: dict[str, float] = {}
        self._images: dict[str, dict[int, int]] = {}
        for _ in range(job.nodes):
            self.start_node()

    def run(self, until: float, to_the_end: bool = False) -> None:
        """Let time pass, until something is wrong; no further than the end of the job everywhere, unless asked to."""
        self.engine.run(until, lambda: bool(self.checker.problems) or (not to_the_end and self.over()))

    def over(self) -> bool:
        """Whether no agent is left and none comes."""
        return bool(self.nodes) and not self.starting and not any(node.alive for node in self.nodes.values())

    @property
    def record(self) -> WorldRecord | None:
        """The record as it is in the store."""
        return self.server.store.record

    # ---- what workers ask for ---------------------------------------------------------------------------------------

    def step_time(self) -> float:
        return 0.1 + 0.05 * self.random.random()

    def group(self, record: WorldRecord) -> Group:
        return self._groups.setdefault(record.generation, Group(self, record))

    def say(self, worker: Worker, message: Message) -> None:
        node = self.nodes[worker.host]
        self.engine.after(LOCAL, lambda: node.agent.said(worker.member, message))

    def exited(self, worker: Worker, code: int) -> None:
        node = self.nodes[worker.host]
        node.workers.pop(worker.member, None)
        self.engine.after(2 * LOCAL, lambda: node.agent.exited(worker.member, code))

    def entered(self, worker: Worker, record: WorldRecord) -> None:
        self.checker.entered(worker.member, record)

    def stepped(self, group: Group, step: int) -> None:
        now = self.engine.now
        hosts = {node_of(member) for member in group.record.members}
        for host in hosts:
            hears = self.server.answers(host) and self.server.watches(host)
            if self.nodes[host].agent.stopped or not hears:
                self._deaf_at[host] = now
        deaf = all(now - self._deaf_at.get(host, -_HEARS) < _HEARS for host in hosts)
        self.checker.stepped(now, group.record, step, deaf)

    def vouched(self, worker: Worker) -> bool:
        node = self.nodes[worker.host]
        return node.clock.now() < node.vouched_until

    def at_boundary(self, worker: Worker, key: Key) -> None:
        self._images.setdefault(worker.host, {})[key.lineage] = key.step
        if key.step % _PERSIST_EVERY == 0 and key not in self._durable:
            self._durable.append(key)

    def choose(self, group: Group, record: WorldRecord) -> Key | None:
        past = ancestry(record.restores)
        hosts = {node_of(member) for member in group.record.members}
        # A node that leaves serves its images until the others have resumed.
        hosts |= {name for name, node in self.nodes.items() if node.alive and node.agent.state.info.leaving}
        found = [Key(*item) for host in hosts for item in self._images.get(host, {}).items()] + self._durable
        source = max((key for key in found if in_ancestry(key, past)), default=None)
        self.checker.resumed(group.record, source)
        return source

    # ---- what happens -----------------------------------------------------------------------------------------------

    def start_node(self) -> None:
        """A host comes up and its agent joins the job."""
        self.starting += 1

        def join() -> None:
            answered = False

            def joined(order: int) -> None:
                nonlocal answered
                if not answered:
                    answered = True
                    self.starting -= 1
                    node = Node(self, f"n{order}", order)
                    self.nodes[node.name] = node
                    node.agent.begin()

            def again() -> None:
                if not answered:
                    join()

            self.server.request("new", lambda store: store.join(), joined, lambda: None)
            self.engine.after(3.0, again)

        self.engine.after(1.0 + 0.5 * self.random.random(), join)

    def worker(self, place: str) -> Worker | None:
        """The process that runs in a place such as ``n1/0`` at the moment."""
        node = self.nodes.get(place.partition("/")[0])
        slot = int(place.partition("/")[2] or 0)
        workers = [w for w in node.workers.values() if slot_of(w.member) == slot] if node is not None else []
        return workers[-1] if workers else None

    def node(self, name: str) -> Node | None:
        """A node whose agent lives."""
        node = self.nodes.get(name)
        return node if node is not None and node.alive else None

    def kill_host(self, name: str) -> None:
        """The power of a host fails: nothing answers there any more."""
        node = self.node(name)
        if node is not None:
            self.network.dead.add(name)
            node.die()

    def settled(self) -> str:
        """What is missing for all that is alive to train; empty if nothing is."""
        record = self.record
        alive = [node for node in self.nodes.values() if node.alive and not node.agent.state.info.leaving]
        if record is None:
            return "there is no world"
        if record.phase is not Phase.RUNNING:
            return ""
        group = self._groups.get(record.generation)
        if group is None or not self.checker.steps or self.checker.steps[-1][1] != record.generation:
            return f"generation {record.generation} does not train"
        given_up = any(count >= m.FAILED_STARTS for n in alive for count in n.agent.state.failed_starts.values())
        wanted = self._wanted(len(alive), record)
        ending = any(w.doing == "done" for node in alive for w in node.workers.values())
        if record.size < wanted and not given_up and not ending:
            return f"{record.size} of {wanted} ranks train"
        return ""

    def unhelped(self) -> bool:
        """Whether the only rank of the world is stuck: nobody waits for it, so it may as well be slow."""
        members = self.record.members if self.record is not None else ()
        workers = [self.nodes[node_of(member)].workers.get(member) for member in members]
        return len(workers) == 1 and workers[0] is not None and workers[0].is_stuck

    def _wanted(self, nodes: int, record: WorldRecord) -> int:
        """The ranks that can train on so many nodes."""
        job = self.job
        ranks = min(nodes, record.room or job.max_nodes) * job.slots
        ranks = min(ranks, job.most or ranks)
        return ranks - ranks % job.multiple

    def outcome(self) -> str:
        """How the job stands or ended."""
        record = self.record
        if record is None:
            return "no world"
        if record.phase is Phase.FAILED:
            return f"failed ({ExitCode(record.exit_code).name.lower()}): {record.error}"
        ends = sorted({node.ended.code.name.lower() for node in self.nodes.values() if node.ended is not None})
        if record.phase is Phase.RUNNING and ends and self.over():
            return f"all have left ({', '.join(ends)})"
        if self.unhelped():
            return "running, its only rank is stuck"
        return str(record.phase)

    def story(self) -> list[str]:
        """Each world in a line."""
        lines = []
        for world in self.checker.worlds.values():
            where = "" if world.boundary is None else " at a boundary"
            lines.append(
                f"generation {world.generation}{where}: {world.reason} -> {' '.join(world.members) or 'nobody'}"
            )
        return [*lines, self.outcome()]
