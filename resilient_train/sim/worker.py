"""Simulated workers: what `resilient_train.worker.session` and `link` answer, and groups that step in lockstep.

The main thread and the monitor thread are told apart: the monitor hears the record at once and promises or declines;
the main thread finds out when it comes free, at a boundary, or because its collective fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from resilient_train.sim.engine import Action, Engine
from resilient_train.sim.network import Network
from resilient_train.spec.messages import (
    Acknowledge,
    Boundaries,
    Busy,
    Done,
    Hello,
    Message,
    Promise,
    Resumed,
    Stage,
    Troubled,
)
from resilient_train.spec.rank import RankReport, Where
from resilient_train.spec.world import Key, Phase, WorldRecord, node_of

VERDICT = 30.0
"""Seconds that a failed collective waits for the agents to say who was lost; as in the real one."""
LOCAL = 0.0003
"""Seconds that a message between processes of one node takes."""
_FREED = 0.02
"""Seconds until a main thread that is freed from a collective has let go of its world."""
_FORM = 0.02
_RESTORE = 0.05
_AGAIN = 0.2
"""Seconds between attempts of a collective to get through a network that is cut."""


class Site(Protocol):
    """What a worker needs of the cluster."""

    engine: Engine
    network: Network
    total: int
    """Steps of the training."""
    mesh: tuple[int, int]
    """What the world size must be a multiple of, and the most that it may be (0: any)."""

    def step_time(self) -> float:
        """Seconds that a step takes one rank."""
        ...

    def group(self, record: WorldRecord) -> Group:
        """Where the members of a generation meet."""
        ...

    def say(self, worker: Worker, message: Message) -> None:
        """Send a message to the worker's agent."""
        ...

    def exited(self, worker: Worker, code: int) -> None:
        """The worker's process has ended."""
        ...

    def choose(self, group: Group, record: WorldRecord) -> Key | None:
        """The state that a generation resumes."""
        ...

    def at_boundary(self, worker: Worker, key: Key) -> None:
        """A worker has published its image of a state."""
        ...

    def entered(self, worker: Worker, record: WorldRecord) -> None:
        """A worker begins to form a generation."""
        ...

    def vouched(self, worker: Worker) -> bool:
        """Whether the board says that the worker's world may step."""
        ...

    def stepped(self, group: Group, step: int) -> None:
        """All ranks of a world have finished a step."""
        ...


class Worker:
    """One process."""

    def __init__(self, site: Site, member: str) -> None:
        self.site = site
        self.member = member
        self.host = node_of(member)
        self.doing = "starting"
        self.waits = False
        """Whether what it does is to wait for others."""
        self.generation = 0
        self.step = -1
        """Finished steps, at the last boundary of this generation."""
        self.ended = False
        self.board = (0, 0)
        """(generation, finished steps), as the agent sees them."""
        self._entered = 0
        self.record: WorldRecord | None = None
        self.group: Group | None = None
        self.busy_until = 0.0
        """Until then the main thread does not come free, whatever it is to hear."""
        self._stopped = 0
        self._backlog: list[Action] = []
        self._busy = False
        self._last = -1
        self._stop_at: int | None = None
        self._answered = 0
        self._said = False
        self.turn = 0
        """Counts what the main thread does."""

    # ---- the process ------------------------------------------------------------------------------------------------

    def begin(self, seconds: float) -> None:
        """Import torch and all that, for so long; then say hello."""

        def ready() -> None:
            self._say(self._hello())
            self._next_world()

        self.main("starting", seconds, ready)

    def end(self, code: int) -> None:
        """The process ends."""
        if not self.ended:
            self.ended = True
            self._leave_group()
            self.site.exited(self, code)

    def stop(self) -> None:
        """SIGSTOP."""
        self._stopped += 1

    def resume(self) -> None:
        """SIGCONT."""
        self._stopped -= 1
        while self._backlog and not self._stopped and not self.ended:
            self._backlog.pop(0)()

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped."""
        return self._stopped > 0

    @property
    def is_stuck(self) -> bool:
        """Whether its main thread never comes back from what it does."""
        return self.busy_until == float("inf")

    def run(self, action: Action) -> None:
        """Run an action of this process, once it is not stopped."""
        if self.ended:
            return
        if self._stopped:
            self._backlog.append(action)
        else:
            action()

    def main(self, doing: str, seconds: float, action: Action) -> None:
        """The main thread does something for a time, and then ``action``, unless it is freed from it before."""
        self.doing, self.waits = doing, False
        self.turn += 1
        turn, engine = self.turn, self.site.engine

        def act() -> None:
            if turn != self.turn:
                return
            if engine.now < self.busy_until and doing != "done":  # What it does behind its function is nobody's.
                engine.at(self.busy_until, lambda: self.run(act))
            else:
                action()

        engine.after(seconds, lambda: self.run(act))

    def _wait(self, doing: str) -> None:
        self.doing, self.waits = doing, True
        self.turn += 1

    def _say(self, message: Message) -> None:
        self.site.say(self, message)

    def _hello(self) -> Hello:
        multiple, most = self.site.mesh
        return Hello(member=self.member, multiple=multiple, most=most)

    # ---- the monitor thread -----------------------------------------------------------------------------------------

    def hear(self, record: WorldRecord) -> None:
        """The agent tells of a version of the record."""
        if self.record is not None and record.revision <= self.record.revision:
            return
        self.record = record
        planned = record.planned
        if planned is not None and planned.number > self._answered and self._busy:
            accepted = record.generation == self.generation and self.step < planned.boundary <= self._last
            self._answered = planned.number
            self._stop_at = planned.boundary if accepted else None
            self._say(Promise(number=planned.number, accepted=accepted))
        elif planned is None and record.generation == self.generation:
            self._stop_at = None
        if self.doing in ("waiting", "boundary", "verdict", "done", "held"):
            # The main thread waits for just this.
            self.main(self.doing, 0.0, self._look)
        elif self._busy and self._over() and not self._leaving_later() and record.phase is not Phase.FINISHED:
            self.main("freed", _FREED, self._leave)

    def report(self) -> RankReport:
        """Where the main thread is."""
        return RankReport(
            member=self.member,
            generation=self.generation,
            step=self.step,
            where=Where.COMMUNICATION if self.doing in ("collective", "forming") else Where.ELSEWHERE,
            frame=self.doing,
            counts=(("all", self._entered),),
            finished=0 <= self._last == self.step,
        )

    def _over(self) -> bool:
        record = self.record
        return record is not None and (record.generation > self.generation or record.phase is not Phase.RUNNING)

    def _leaving_later(self) -> bool:
        record = self.record
        return (
            record is not None
            and record.phase is Phase.RUNNING
            and record.generation == self.generation + 1
            and record.boundary is not None
            and record.boundary == self._stop_at
        )

    # ---- the main thread --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Go on waiting, or not."""
        assert self.record is not None
        if self.doing == "waiting":
            self._look_for_world()
        elif self.doing == "held" and (not self._over() or self._leaving_later()):
            self._compute(self.step)
        elif self._over():
            if self.record.phase is Phase.FINISHED and self.doing == "done":
                self.end(0)
            else:
                self._leave()
        elif self.doing == "boundary" and self._stop_at != self.step:
            self._compute(self.step)

    def _next_world(self) -> None:
        self._busy, self._stop_at, self._said = False, None, False
        self._wait("waiting")
        self._look_for_world()

    def _look_for_world(self) -> None:
        record = self.record
        if record is None:
            return
        if record.phase is not Phase.RUNNING:
            self.end(0 if record.phase is Phase.FINISHED else 1)
            return
        named = self.member in record.members
        if named and record.generation > self.generation:
            self.generation, self._busy, self.step, self._last = record.generation, True, -1, -1
            self._entered = 0
            self._say(Acknowledge(generation=record.generation, at=self.site.engine.now))
            self.site.entered(self, record)
            self._wait("forming")
            self.group = self.site.group(record)
            self.group.arrive(self)
        elif not named and not self._said:
            self._said = True
            self._say(self._hello())

    def formed(self) -> None:
        """The group is there: restore."""
        self._say(Stage(generation=self.generation, stage="formed", at=self.site.engine.now))
        self.main("restoring", _RESTORE, lambda: self._enter(-1))

    def restored(self, source: Key | None, first: bool) -> None:
        """All ranks have the state."""
        if first:
            key = None if source is None else (source.lineage, source.step)
            self._say(Resumed(generation=self.generation, lineage=self.generation, source=key, text=""))
        self.step, self._last = source.step if source is not None else 0, self.site.total
        self._say(Boundaries(generation=self.generation))
        self._boundary(self.step)

    def _boundary(self, step: int) -> None:
        if self._over() and not self._leaving_later():
            self._leave()
            return
        self.step = step
        self.board = (self.generation, step)
        self.site.at_boundary(self, Key(self.generation, step))
        if self._stop_at == step:
            self._wait("boundary")
            if self._over():
                self._leave()
        else:
            self._compute(step)

    def _compute(self, step: int) -> None:
        if step == self._last:
            self._say(Done(generation=self.generation))
            self._wait("done")
            if self._over():
                self.main("done", 0.0, self._look)
        elif not self._may_step():
            if self.doing != "held" and self.record is not None and self.record.elastic:
                self._say(Busy(name="waiting for the control store"))
            self.main("held", _AGAIN, self._look)
        else:
            if self.doing == "held":
                self._say(Busy(name=""))
            self.main("computing", self.site.step_time(), lambda: self._enter(step))

    def _may_step(self) -> bool:
        return self.record is not None and self.record.elastic and self.site.vouched(self)

    def _enter(self, step: int) -> None:
        self._wait("collective")
        self._entered += 1
        assert self.group is not None
        self.group.enter(self, step)

    def passed(self, step: int) -> None:
        """The step's collective has ended."""
        self._boundary(step + 1)

    def failed(self) -> None:
        """A communication error: somebody is gone."""
        if self.doing not in ("computing", "collective", "restoring"):
            return
        if self._over():
            self.main("freed", _FREED, self._leave)
            return
        self.main("verdict", VERDICT, self._doubt)

    def _doubt(self) -> None:
        self._say(Troubled(generation=self.generation, text="a communication error"))
        self.end(1)

    def _leave(self) -> None:
        self._leave_group()
        if self.doing == "held":
            self._say(Busy(name=""))
        if self.record is not None and self.record.phase is Phase.FAILED:
            self.end(1)
            return
        self._say(Stage(generation=self.generation, stage="aborted", at=self.site.engine.now))
        self._next_world()

    def _leave_group(self) -> None:
        if self.group is not None:
            self.group.left(self)
            self.group = None


class Group:
    """A process group of one generation: whatever its members do together, all of them do."""

    def __init__(self, site: Site, record: WorldRecord) -> None:
        self.record = record
        self.site = site
        self._here: dict[str, Worker] = {}
        self._entered: dict[str, int] = {}
        self._source: Key | None = None

    def arrive(self, worker: Worker) -> None:
        """A member begins to form it."""
        self._here[worker.member] = worker
        self._try("forming", _FORM, lambda worker: worker.formed())

    def enter(self, worker: Worker, step: int) -> None:
        """A member enters the collective of a step; -1: that of the restore."""
        self._entered[worker.member] = step
        if any(self._entered.get(member) != step for member in self.record.members):
            return
        if step >= 0:
            self._try("collective", 0.001, lambda worker: worker.passed(step), lambda: self.site.stepped(self, step))
            return
        first = self.record.members[0]

        def chosen() -> None:
            leader = self._here[first]
            assert leader.record is not None
            heard = leader.record if leader.record.generation == self.record.generation else self.record
            self._source = self.site.choose(self, heard)

        self._try("collective", 0.002, lambda w: w.restored(self._source, w.member == first), chosen)

    def left(self, worker: Worker) -> None:
        """A member is gone or has let go: those it was connected to notice, if its host can still say so."""
        self._here.pop(worker.member, None)
        for other in list(self._here.values()):
            if self.site.network.reaches(worker.host, other.host) and self.site.network.random.random() < 0.7:
                self.site.engine.after(0.02, lambda other=other: self._notice(other))  # type: ignore[misc]

    def _notice(self, worker: Worker) -> None:
        if self._here.get(worker.member) is worker:
            worker.run(worker.failed)

    def _try(self, doing: str, seconds: float, then: Callable[[Worker], None], before: Action = lambda: None) -> None:
        """Do something with all members, as soon as all are here and reach each other."""
        if any(self._doing(member) != doing for member in self.record.members):
            return
        hosts = sorted({node_of(member) for member in self.record.members})
        network, engine = self.site.network, self.site.engine
        stopped = any(self._here[member].is_stopped for member in self.record.members)
        cut = not network.whole() and not all(network.connected(a, b) for a in hosts for b in hosts if a < b)
        if stopped or cut:
            engine.after(_AGAIN, lambda: self._try(doing, seconds, then, before))
            return
        before()
        for member in self.record.members:
            worker = self._here[member]
            turn = worker.turn

            def act(worker: Worker = worker, turn: int = turn) -> None:
                if worker.turn == turn:
                    then(worker)

            engine.after(seconds * (1 + network.random.random()), lambda w=worker, act=act: w.run(act))  # type: ignore[misc]

    def _doing(self, member: str) -> str:
        worker = self._here.get(member)
        return worker.doing if worker is not None else ""
