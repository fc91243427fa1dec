"""A simulated agent: the real machines, fed and obeyed as `resilient_train.agent` does, without processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from resilient_train.clock import Alarm
from resilient_train.plan import events as ev
from resilient_train.plan import membership as m
from resilient_train.plan import suspicion
from resilient_train.sim.engine import Action, DriftingClock
from resilient_train.sim.hangs import Hangs, Processes
from resilient_train.sim.links import Links
from resilient_train.sim.network import Network
from resilient_train.sim.store import Server, Snapshot, Store
from resilient_train.spec.messages import Message, WorldIs
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord

BEATS = 5
"""Signs of life within the time after which a silent node is a suspect; as in the real one."""
STORE_BEATS = 3
"""Signs of life to the store within the time after which an announcement expires; as in the real one."""
ASKS = 6
"""Times in which the store is asked for its word, within the time that it holds; as in the real one."""
_CALL_TIMEOUT = 3.0
"""Seconds for the store to answer a call, and to show that it is there to whoever watches it."""
_RETRY = 0.5
"""Seconds before a store that did not answer is asked again."""


class Crew(Processes, Protocol):
    """The workers of one node."""

    def spawn(self, member: str, record: WorldRecord) -> None:
        """Start a process."""

    def stop(self, member: str) -> None:
        """SIGTERM."""

    def tell(self, member: str, world: WorldIs) -> None:
        """Send a message to a worker."""

    def vouch(self, until: float) -> None:
        """Until when workers may step, on the node's clock."""

    def progress(self, record: WorldRecord) -> tuple[int, int] | None:
        """What the board shows: (generation, finished steps) of the furthest member of the current generation."""

    def running(self) -> list[str]:
        """Processes that run."""


@dataclass
class _Call:
    """One call to the store, on the way."""

    call: Callable[[Store], Any] | None
    """None: no call, only its turn is waited for."""
    then: Callable[[Any], None] | None
    name: str = ""
    """Of those that wait under one name only the newest is made."""
    again: bool = False
    """To be made until it is answered."""
    over: bool = False


class StoreLine:
    """Calls one after the other, and a watch beside them; as in `resilient_train.agent.store_line`."""

    def __init__(self, host: str, server: Server, clock: DriftingClock, guard: Callable[[Action], None]) -> None:
        self._host = host
        self._server = server
        self._clock = clock
        self._guard = guard
        self._calls: list[_Call] = []
        self._watch_number = 0
        self._watching = 0
        self.silent: Callable[[str], None] = lambda _: None
        """Told that the store does not answer."""
        self.heard: Callable[[Snapshot], None] = lambda _: None
        """Told of news."""

    def ask(
        self, call: Callable[[Store], Any] | None, then: Callable[[Any], None] | None = None, name: str = ""
    ) -> None:
        """Make a call after those before it, in place of one that waits under the same name."""
        wanted = _Call(call, then, name)
        for index, waiting in enumerate(self._calls):
            if index and name and waiting.name == name:
                self._calls[index] = wanted
                return
        self._calls.append(wanted)
        if len(self._calls) == 1:
            self._begin()

    def listen(self) -> None:
        """Hear the news from now on."""
        self._calls.append(_Call(lambda store: store.look(), self._first, again=True))
        if len(self._calls) == 1:
            self._begin()

    def _first(self, news: Snapshot) -> None:
        self.heard(news)
        self._watch(news.number)

    def _begin(self) -> None:
        call = self._calls[0]
        if call.call is None:
            self._clock.at(
                self._clock.now(), lambda: self._guard(lambda: self._end(call, lambda: call.then and call.then(None)))
            )
            return
        self._server.request(
            self._host,
            call.call,
            lambda result: self._guard(lambda: self._end(call, lambda: call.then and call.then(result))),
            lambda: self._guard(lambda: self._fail(call, "the store refuses")),
        )
        self._clock.at(
            self._clock.now() + _CALL_TIMEOUT,
            lambda: self._guard(lambda: self._fail(call, "the store does not answer")),
        )

    def _fail(self, call: _Call, text: str) -> None:
        if call.over:
            return
        if not call.again:
            self._end(call, lambda: self.silent(text))
            return
        call.over = True
        self._calls[0] = replace(call, over=False)
        self._clock.at(self._clock.now() + _RETRY, lambda: self._guard(self._begin))
        self.silent(text)

    def _end(self, call: _Call, then: Callable[[], object]) -> None:
        if call.over:
            return
        call.over = True
        del self._calls[0]
        if self._calls:
            self._begin()
        then()

    def _watch(self, number: int) -> None:
        self._watching += 1
        turn, self._watch_number = self._watching, number

        def heard(news: Snapshot) -> None:
            if turn == self._watching:
                self.heard(news)
                self._watch(news.number)

        self._server.watch(self._host, number, lambda news: self._guard(lambda: heard(news)))
        self._clock.at(self._clock.now() + _CALL_TIMEOUT, lambda: self._guard(lambda: self._look_after(turn)))

    def _look_after(self, turn: int) -> None:
        """A watch that hangs is found by keepalive packets."""
        if turn != self._watching:
            return
        if self._server.answers(self._host):
            # What was sent in the time that it did not is found by asking from the last number on.
            self._clock.at(self._clock.now() + _CALL_TIMEOUT, lambda: self._guard(lambda: self._look_after(turn)))
            if not self._server.watches(self._host):
                self._watch(self._watch_number)
            return
        self.silent("the watch broke")
        self._watching += 1
        number = self._watch_number
        self._clock.at(self._clock.now() + _RETRY, lambda: self._guard(lambda: self._watch(number)))


class Agent:
    """One node's agent process."""

    def __init__(
        self,
        state: m.State,
        within: float,
        clock: DriftingClock,
        network: Network,
        server: Server,
        directory: dict[str, Links],
        crew: Crew,
        ended: Callable[[ev.End], None],
    ) -> None:
        """Args:
        state: the membership machine's first.
        within: seconds of silence after which a node is a suspect.
        clock: the node's.
        network: the way to the others.
        server: the control store.
        directory: the agents that exist; this one registers itself.
        crew: its workers.
        ended: told when it has nothing left to do.
        """
        self.node = state.view.me
        self.state = state
        self.alive = True
        self.stopped = 0
        self._backlog: list[Action] = []
        self._clock = clock
        self._crew = crew
        self._ended = ended
        self._directory = directory
        self._links = Links(self.node, network, directory, self.guard, self._heard_node, self._refused_by_node)
        self._suspicion = suspicion.State(me=state.info, within=within, at=clock.now())
        self._alarm = Alarm(self._at, self._tick)
        self._look_again = Alarm(self._at, lambda: self._step(suspicion.Looked()))
        self._seen: ev.NodesSeen | None = None
        self._beat_every, self._beat_store_every = within / BEATS, within / STORE_BEATS
        self._unsaid: NodeInfo | None = None
        self._endpoints = 0
        self._asked = False
        self._hangs = Hangs(within, crew, lambda: self.state.view, clock.now, self._at, self.feed)
        self._progress = (0, 0)
        self._store = StoreLine(self.node, server, clock, self.guard)
        self._store.silent, self._store.heard = self._store_silent, self._news
        self._server = server
        directory[self.node] = self._links

    def begin(self) -> None:
        """What the real one's ``run`` does first."""
        self._announce()
        self._beat_lines()
        self._beat_store()
        self._store.listen()
        self._look_at_board()
        self._every(self._hangs.period, self._hangs.look)
        self._every(self.state.view.timing.vouch / ASKS, self._ask_for_word)

    # ---- the process ------------------------------------------------------------------------------------------------

    def guard(self, action: Action) -> None:
        """Run an action if this process lives, or when it is continued."""
        if not self.alive:
            return
        if self.stopped or self._backlog:
            self._backlog.append(action)
        else:
            action()

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped += 1

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped -= 1
        if self.stopped:
            return
        # What happens in the course of this comes after it.
        waiting, self._backlog = self._backlog, []
        for action in waiting:
            if self.alive:
                action()

    def die(self) -> None:
        """The process ends; its kernel hangs up for it."""
        self.alive = False
        self._directory.pop(self.node, None)
        self._links.close()
        self._server.withdraw_watch(self.node)

    def _every(self, seconds: float, action: Action) -> None:
        def again() -> None:
            self._at(self._clock.now() + seconds, again)
            action()

        again()

    def _at(self, when: float, action: Action) -> None:
        self._clock.at(when, lambda: self.guard(action))

    # ---- the machine ------------------------------------------------------------------------------------------------

    def feed(self, event: ev.Event) -> None:
        """Hand one event to the machine and carry out what follows."""
        if not self.alive:
            return
        before = self.state.view.record
        self.state, effects = m.step(self.state, event, self._clock.now())
        record = self.state.view.record
        changed = record is not None and (before is None or record.generation != before.generation)
        if changed and record is not None and record.bootstrap == self.state.info.endpoint:
            self._at(self._clock.now(), self._new_endpoint)
        for effect in effects:
            self._carry_out(effect)

    def _new_endpoint(self) -> None:
        self._endpoints += 1
        self.feed(ev.EndpointReady(f"{self.node}:{self._endpoints}"))

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Swap(proposed):
                self._store.ask(
                    lambda store: store.swap(proposed), lambda record: self.feed(ev.RecordSeen(record)), "swap"
                )
                self._server.traffic.writes += 1
                self._server.traffic.carry(proposed)
            case ev.Announce(info):
                self._suspicion = suspicion.with_own(self._suspicion, info)
                self._announce()
            case ev.Spawn(member):
                assert self.state.view.record is not None
                self._crew.spawn(member, self.state.view.record)
                self.feed(ev.WorkerSpawned(member))
            case ev.Stop(member, _):
                self._crew.stop(member)
            case ev.Tell(member, message):
                assert isinstance(message, WorldIs)
                self._crew.tell(member, message)
            case ev.Vouch(until):
                self._crew.vouch(until)
            case ev.Wake(at):
                self._alarm.set(at)
            case ev.End():
                for member in self._crew.running():
                    self._crew.stop(member)
                self._store.ask(lambda store: store.withdraw(self.state.info.order), lambda _: self._end(effect))
                self._at(self._clock.now() + 2.0, lambda: self._end(effect))
            case ev.Say() | ev.Save():
                pass

    def _end(self, effect: ev.End) -> None:
        if self.alive:
            self.die()
            self._ended(effect)

    def _tick(self) -> None:
        self._watch_board()
        self.feed(ev.Tick())

    def said(self, member: str, message: Message) -> None:
        """A worker's message has come."""
        self.guard(lambda: self.feed(ev.WorkerSaid(member, message)))

    def exited(self, member: str, code: int) -> None:
        """A worker's process has ended."""

        def act() -> None:
            self._watch_board()
            self.feed(ev.WorkerExited(member, code))

        self.guard(act)

    def _look_at_board(self) -> None:
        self._every(1.0, self._watch_board)

    def _watch_board(self) -> None:
        record = self.state.view.record
        progress = self._crew.progress(record) if record is not None else None
        if progress is not None and progress != self._progress:
            self._progress = progress
            self.feed(ev.Progress(*progress))

    # ---- the store --------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        info = self._unsaid = self.state.info

        def announce(store: Store) -> None:
            store.announce(info, self._server.now())
            self._server.traffic.writes += 1
            self._server.traffic.carry(info)

        def said(_: object) -> None:
            if self._unsaid is info:
                self._unsaid = None

        self._store.ask(announce, said, "announce")

    def _beat_store(self) -> None:
        def beat() -> None:
            if self._unsaid is not None:
                self._announce()
            order = self.state.info.order
            self._store.ask(lambda store: store.beat(order, self._server.now()), lambda _: self._store_heard(), "beat")
            self._server.traffic.beats += 1

        self._every(self._beat_store_every, beat)

    def _ask_for_word(self) -> None:
        """Whether the record that this agent knows is the newest."""

        def begun(_: object) -> None:
            at = self._clock.now()
            self._store.ask(lambda store: store.revision(), lambda revision: self.feed(ev.Vouched(revision, at)))

        self._store.ask(None, begun)

    def _store_heard(self) -> None:
        if self.state.view.silent:
            self._ask_for_word()
            self._store.ask(lambda store: store.look(), self._news)

    def _news(self, news: Snapshot) -> None:
        self.feed(ev.RecordSeen(news.record))
        if news.record is not None and not self._asked:
            self._asked = True
            self._ask_for_word()
        self._step(suspicion.Announced(news.nodes))

    def _store_silent(self, text: str) -> None:
        self._step(suspicion.Deaf())
        self.feed(ev.StoreSilent(text, lasting=True))

    # ---- the other nodes --------------------------------------------------------------------------------------------

    def _heard_node(self, node: str) -> None:
        self._step(suspicion.Heard(frozenset({node})))

    def _refused_by_node(self, node: str) -> None:
        self._step(suspicion.Refused(node))

    def _beat_lines(self) -> None:
        def beat() -> None:
            self._links.beat()
            self._step(suspicion.Looked())

        self._every(self._beat_every, beat)

    def _step(self, event: suspicion.Event) -> None:
        if not self.alive:
            return
        self._suspicion, verdict = suspicion.step(self._suspicion, event, self._clock.now())
        self._links.want(verdict.wanted & self._suspicion.peers.keys())
        if verdict.wake_at is not None:
            self._look_again.set(verdict.wake_at)
        seen = ev.NodesSeen(
            nodes=verdict.alive,
            lost=verdict.lost,
            suspects=verdict.suspects,
            doubted=verdict.doubted,
            fading=verdict.fading,
        )
        if seen != self._seen:
            self._seen = seen
            self.feed(seen)
