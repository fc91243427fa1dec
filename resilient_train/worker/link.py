"""This worker's line to its agent: a monitor thread hears of a new world and frees the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from resilient_train.errors import FormatError, LinkLost
from resilient_train.ipc.channel import Channel, connect
from resilient_train.spec.messages import Ask, Hello, Message, Position, Promise, Welcome, WorldIs
from resilient_train.spec.rank import RankReport
from resilient_train.spec.world import Phase, WorldRecord
from resilient_train.worker.position import entered, position

_CONNECT_TIMEOUT = 30.0
_ABORT_EVERY = 0.005
_LOOK_EVERY = 0.02


class Abortable(Protocol):
    """What the monitor frees the main thread from."""

    def abort(self, generation: int | None = None) -> int:
        """Free the main thread from ``generation``, if it has not left that yet; may be called again and again."""
        ...


class AgentLink:
    """Shared between the main thread, which waits and steps, and the monitor thread, which listens."""

    def __init__(self, address: str, hello: Hello, groups: Abortable, on_device: bool = False) -> None:
        """Connects to the agent and starts to listen; the calling thread is the one that trains.

        Raises:
            LinkLost: if there is no agent.
        """
        self.member = hello.member
        self._hello = hello
        self._groups = groups
        self._changed = threading.Condition()
        self._record: WorldRecord | None = None
        self.hosts: frozenset[str] = frozenset()
        """addresses of the members' machines, as far as the agents know them"""
        self.device = 0
        """index of the accelerator that this process computes on"""
        self._generation = 0
        self._busy = False
        self._step = -1
        self._last_step = -1
        self._stop_at: int | None = None
        self._answered = 0
        self._lost = False
        self._trainer = threading.get_ident()
        self._on_device = on_device
        self._channel: Channel = connect(address, _CONNECT_TIMEOUT)
        self.send(hello)
        received = self._channel.receive(_CONNECT_TIMEOUT)
        if received is None or not isinstance(received[0], Welcome):
            raise LinkLost("the agent did not welcome this worker")
        self.keeper, self.verdict = received[0].keeper, received[0].verdict
        threading.Thread(target=self._listen, name="resilient_train monitor", daemon=True).start()

    def send(self, message: Message) -> None:
        """Say something to the agent.

        Raises:
            LinkLost: if it is gone.
        """
        self._channel.send(message)

    # ---- main thread ------------------------------------------------------------------------------------------------

    def next_world(self) -> WorldRecord:
        """Wait until this worker is named in a generation that it has not entered yet, or the job is over.

        Raises:
            LinkLost: if the agent is gone.
        """
        with self._changed:
            self._busy = False
            self._stop_at = None
            said = False
            while True:
                record = self._record
                if self._lost:
                    raise LinkLost("the agent on this node is gone")
                if record is not None:
                    if record.phase is not Phase.RUNNING:
                        return record
                    named = self.member in record.members
                    if named and record.generation > self._generation:
                        self._generation = record.generation
                        self._busy = True
                        self._step = self._last_step = -1
                        return record
                    if not named and not said:
                        said = True
                        self.send(self._hello)
                self._changed.wait()

    def wait_for_verdict(self, timeout: float | None) -> WorldRecord | None:
        """After a failed collective: the record that explains it, or None if none comes within ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._over(), timeout)
            return self._record if self._over() else None

    def wait_until_over(self) -> WorldRecord:
        """After the function returned: wait until the job is finished, failed, or needs this rank again.

        Raises:
            LinkLost: if the agent is gone.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._over())
            if not self._over() or self._record is None:
                raise LinkLost("the agent on this node is gone")
            return self._record

    def over(self) -> bool:
        """Whether the generation that the main thread works in has ended by a loss or the end of the job."""
        with self._changed:
            return self._over() and not self._leaving_later()

    def begin_steps(self, step: int, last: int) -> None:
        """The main thread steps through boundaries from ``step`` to ``last`` from now on."""
        with self._changed:
            self._step, self._last_step = step, last

    def reach(self, step: int) -> bool:
        """The main thread is at the boundary before ``step``; whether it is to stop here."""
        with self._changed:
            self._step = step
            return self._stop_at == step

    def heard(self) -> WorldRecord | None:
        """The newest record."""
        with self._changed:
            return self._record

    @property
    def step(self) -> int:
        """The step that the main thread is in; -1 before its first boundary of the generation."""
        return self._step

    def wait_while(self, condition: Callable[[], bool]) -> bool:
        """Wait until ``condition`` does not hold any more (False), or the generation has ended by a loss (True).

        Raises:
            LinkLost: if the agent is gone.
        """
        with self._changed:
            while condition() and not (self._over() and not self._leaving_later()):
                if self._lost:
                    raise LinkLost("the agent on this node is gone")
                self._changed.wait(_LOOK_EVERY)
            return self._over() and not self._leaving_later()

    def wait_at_boundary(self) -> bool:
        """Wait for the planned change to be committed (True: leave) or taken back (False: go on).

        That it was taken back may be heard of only by the next one, at a later boundary.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._over() or self._stop_at != self._step)
            return self._over()

    # ---- monitor thread ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            try:
                received = self._channel.receive(None if self._to_abort() is None else _ABORT_EVERY)
                if received is not None and isinstance(received[0], WorldIs):
                    self._hear(received[0])
                elif received is not None and isinstance(received[0], Ask):
                    self.send(Position(number=received[0].number, report=self._report().to_json()))
            except (LinkLost, FormatError):
                # The main thread, wherever it waits, must not wait for news that cannot come.
                with self._changed:
                    self._lost = True
                    self._changed.notify_all()
                return
            generation = self._to_abort()
            if generation is not None:
                # By the time this is heard the main thread may have left it, and be forming the next.
                self._groups.abort(generation)

    def _report(self) -> RankReport:
        where, frame = position(self._trainer)
        return RankReport(
            member=self.member,
            generation=self._generation,
            step=self._step,
            where=where,
            frame=frame,
            counts=tuple(entered()),
            device=self._on_device,
            finished=0 <= self._last_step == self._step,
        )

    def _hear(self, world: WorldIs) -> None:
        record = WorldRecord.from_json(world.record)
        answer: Promise | None = None
        with self._changed:
            if self._record is not None and record.revision <= self._record.revision:
                return
            self._record = record
            self.hosts = frozenset(world.hosts)
            self.device = world.device if world.device >= 0 else self.device
            planned = record.planned
            if planned is not None and planned.number > self._answered and self._busy:
                accepted = record.generation == self._generation and self._step < planned.boundary <= self._last_step
                self._answered = planned.number
                self._stop_at = planned.boundary if accepted else None
                answer = Promise(number=planned.number, accepted=accepted)
            elif planned is None and record.generation == self._generation:
                self._stop_at = None
            self._changed.notify_all()
        if answer is not None:
            try:
                self.send(answer)
            except LinkLost:
                return

    def _over(self) -> bool:
        record = self._record
        return record is not None and (record.generation > self._generation or record.phase is not Phase.RUNNING)

    def _leaving_later(self) -> bool:
        """The next world begins at a boundary that this rank has promised and not reached yet."""
        record = self._record
        return (
            record is not None
            and record.phase is Phase.RUNNING
            and record.generation == self._generation + 1
            and record.boundary is not None
            and record.boundary == self._stop_at
        )

    def _to_abort(self) -> int | None:
        """The generation that the main thread must be freed from, if there is one."""
        with self._changed:
            finished = self._record is not None and self._record.phase is Phase.FINISHED
            must = self._busy and self._over() and not finished and not self._leaving_later()
            return self._generation if must else None
