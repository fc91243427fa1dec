"""The agent's event loop: it feeds what happens to `resilient_train.plan.membership` and carries out what that decides.

One thread, the process's main thread (children must be spawned from it).  Exits arrive through pidfds, words through
Unix sockets, results of store calls through a pipe from the thread that makes them.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import queue
import selectors
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType

from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.agent.links import Links
from resilient_train.agent.neighbours import BEATS, Neighbours
from resilient_train.agent.store_line import StoreLine
from resilient_train.agent.timeline import Timeline, count_ranks
from resilient_train.agent.workers import Workers
from resilient_train.clock import Clock
from resilient_train.control.store import ControlStore, News
from resilient_train.errors import ExitCode, FormatError, LinkLost, OutsideError
from resilient_train.events import Event as LogEvent
from resilient_train.events import Sink
from resilient_train.ipc.channel import Channel, Listener
from resilient_train.plan import membership as m
from resilient_train.plan.proposal import Limits, Timing, View
from resilient_train.spec.messages import Flushed, Gone, Hello, Notice, Welcome
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import Phase, WorldRecord, slot_of

_KEEPER_RESTARTS = 5
"""Keepers in a row that may die without having made a state durable or served for `_KEEPER_PROVEN` seconds."""
_KEEPER_PROVEN = 60.0
_FLUSH_TIMEOUT = 600.0
_KEEPER_STOP = 30.0
_LAST_CALLS = 2.0
"""Seconds for the store to take this node's leave."""
_UNSENT = 0.05
"""Seconds between attempts to send to a worker that does not read."""
_AT_ONCE = 3
"""Signals after which nothing is waited for any more."""
_EARLY_RETURN = 10
"""Looks at the board, about one a second, between two mentions of ranks whose function has returned before others'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Who this agent is and what it tolerates."""

    node: str
    """This node's id."""
    order: int
    """Its place among the nodes."""
    slots: int
    """Number of workers."""
    limits: Limits
    """What the job tolerates."""
    address: str
    """Abstract address at which workers reach it."""
    within: float = 5.0
    """Seconds within which the loss of a silent node is to be noticed."""
    host: str = "127.0.0.1"
    """The address at which the other nodes' agents reach this one."""
    addresses: tuple[str, ...] = ()
    """All of this machine's addresses."""
    secret: str = ""
    """The job's, by which agents know each other; empty on a job's only node."""
    standby: int = 0
    """Number of workers to keep ready besides."""
    stop_timeout: float = 30.0
    """Seconds between SIGTERM and SIGKILL for a worker that is to end."""
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    """Signals that end this node's part in good order, and the job if it cannot go on; the third one at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the job ended, on this node."""

    code: ExitCode
    """The exit code."""
    text: str = ""
    """Why, for people."""
    culprit: str = ""
    """The member whose failure ended it."""
    unsaved: str = ""
    """What could not be made durable."""
    saved: bool = False
    """Whether some state of this job is durable."""


@dataclass
class _Timers:
    heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (when, next(self.counter), action))

    def due(self, now: float) -> list[Callable[[], None]]:
        actions = []
        while self.heap and self.heap[0][0] <= now:
            actions.append(heapq.heappop(self.heap)[2])
        return actions


class Agent:
    """One node's part in a job."""

    def __init__(
        self,
        settings: AgentConfig,
        workers: Workers,
        keeper: KeeperProcess,
        store: ControlStore,
        new_bootstrap: Callable[[], str],
        sink: Sink,
        say: Callable[[str], None],
        clock: Clock,
    ) -> None:
        """Args:
        settings: who this agent is.
        workers: how to run processes.
        keeper: this node's keeper.
        store: the agreed record.
        new_bootstrap: serves a fresh TCPStore for a generation and returns its host:port.
        sink: where events go.
        say: prints a line for people.
        clock: the node's clock.
        """
        self._settings = settings
        self._workers = workers
        self._keeper = keeper
        self._new_bootstrap = new_bootstrap
        self._sink = sink
        self._say = say
        self._clock = clock
        self._timeline = Timeline(sink, settings.node)
        self._selector = selectors.DefaultSelector()
        self._listener = Listener(settings.address)
        self._channels: dict[str, Channel] = {}
        self._timers = _Timers()
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._store = StoreLine(store, self._post, self._store_silent)
        self._store_answers = True
        self._outcome: Outcome | None = None
        self._progress = (0, 0)
        links = None
        if settings.secret:
            links = Links(
                settings.node, settings.host, settings.secret, self._selector, self._heard_node, self._refused_by_node
            )
        info = NodeInfo(
            node=settings.node,
            order=settings.order,
            endpoint=new_bootstrap(),
            slots=settings.slots,
            standby=settings.standby,
            link=links.address if links is not None else "",
            addresses=settings.addresses,
        )
        timing = Timing.scaled(settings.within)
        view = View(me=settings.node, limits=settings.limits, nodes={settings.node: info}, timing=timing)
        self._state = m.State(view=view)
        self._links = links
        self._neighbours = Neighbours(info, settings.within, clock, self._timers.at, self._feed)
        self._announcing = False
        self._unsaid: NodeInfo | None = None
        self._interrupts = 0
        self._flushed: str | None = None
        self._saved = False
        self._waited_for_done = 0
        self._keeper_deaths = 0
        self._keeper_since = 0.0

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run the job to its end on this node."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain)
        with self._signals():
            self._start_keeper()
            if self._links is not None:
                self._announce()
                self._neighbours.begin(self._links)
                self._every(self._settings.within / BEATS, self._show_life)
                self._store.listen(self._news)
            else:
                self._store.ask(lambda store: store.look().record, lambda record: self._feed(m.RecordSeen(record)))
            self._every(1.0, self._watch_board)
            while self._outcome is None:
                self._once()
            return self._wind_up(self._outcome)

    def _once(self) -> None:
        now = self._clock.now()
        timeout = max(0.0, self._timers.heap[0][0] - now) if self._timers.heap else None
        if not all(channel.push() for channel in self._channels.values()):
            timeout = _UNSENT if timeout is None else min(timeout, _UNSENT)
        for key, _ in self._selector.select(timeout):
            key.data()
        for action in self._timers.due(self._clock.now()):
            action()

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self._timers.at(self._clock.now() + seconds, again)

        again()

    def _feed(self, event: m.Event) -> None:
        """Hand one event to the state machine and carry out what follows."""
        before = self._state.view.record
        self._state, effects = m.step(self._state, event, self._clock.now())
        record = self._state.view.record
        if record is not None and record is not before:
            self._record_changed(before, record)
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: m.Effect) -> None:
        match effect:
            case m.Swap(proposed):
                self._store.ask(lambda store: store.swap(proposed), lambda record: self._feed(m.RecordSeen(record)))
            case m.Announce(info):
                self._neighbours.own(info)
                self._announce()
            case m.Spawn(member):
                self._spawn(member)
            case m.Stop(member, _):
                self._stop(member)
            case m.Tell(member, message):
                channel = self._channels.get(member)
                if channel is not None:
                    with contextlib.suppress(LinkLost):
                        channel.post(message)
            case m.Say(text):
                self._say(text)
            case m.Wake(at):
                self._timers.at(at, self._tick)
            case m.End(code, text):
                record = self._state.view.record
                culprit = record.culprit if record is not None else ""
                if code is ExitCode.STORE_LOST:
                    for worker in self._workers.running():
                        self._workers.signal(worker.member, signal.SIGTERM)
                self._outcome = Outcome(code=code, text=text, culprit=culprit)

    def _tick(self) -> None:
        self._watch_board()
        self._feed(m.Tick())

    def _record_changed(self, before: WorldRecord | None, record: WorldRecord) -> None:
        now = self._clock.now()
        if before is None or record.generation != before.generation:
            self._timeline.agreed(record, now)
            if before is not None:
                self._say(f"generation {record.generation}: {record.reason}; {count_ranks(record.size)}")
            if record.bootstrap == self._state.info.endpoint:
                # Every generation meets in a store that no other has ever written to.
                self._timers.at(now, lambda: self._feed(m.EndpointReady(self._new_bootstrap())))
        if before is not None and record.planned is not None and record.planned != before.planned:
            text = f"{record.planned.reason} at the boundary of step {record.planned.boundary}"
            self._sink.put(LogEvent(at=now, kind="planned", generation=record.generation, text=text))
        if record.phase is not Phase.RUNNING and (before is None or before.phase is Phase.RUNNING):
            self._sink.put(LogEvent(at=now, kind=record.phase, generation=record.generation, text=record.error))
            if record.phase is Phase.FINISHED and (line := self._timeline.unsaid()):
                self._say(line)

    # ---- the store and the other nodes ------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Announce this node, once for all that changes until the store is free for it."""
        if self._links is None or self._announcing:
            return
        self._announcing = True

        def begun(_: object) -> None:
            self._announcing = False
            info = self._unsaid = self._state.info
            self._store.ask(lambda store: store.announce(info), lambda _: said(info))

        def said(info: NodeInfo) -> None:
            if self._unsaid is info:
                self._unsaid = None

        self._store.ask(lambda _: None, begun)

    def _show_life(self) -> None:
        """A beat; or again the announcement that the store did not take."""
        if self._unsaid is not None:
            self._announce()
        else:
            self._store.ask(lambda store: store.beat(), lambda _: self._store_heard())

    def _store_heard(self) -> None:
        """After an outage in which nothing has changed no news come by themselves."""
        if not self._store_answers:
            self._store.ask(lambda store: store.look(), self._news)

    def _news(self, news: News) -> None:
        if not self._store_answers:
            self._store_answers = True
            self._say("the control store answers again")
        self._feed(m.RecordSeen(news.record))
        self._neighbours.announced(news.nodes)

    def _heard_node(self, node: str) -> None:
        self._neighbours.heard(node)

    def _refused_by_node(self, node: str) -> None:
        self._neighbours.refused(node)

    def _store_silent(self, text: str) -> None:
        if self._store_answers and self._outcome is None:
            self._store_answers = False
            self._say(f"{text}; training goes on, changes of the world wait")
        self._feed(m.StoreSilent(text, self._store.lasting))

    def _post(self, action: Callable[[], None]) -> None:
        self._posted.put(action)
        os.write(self._wake_write, b"x")

    def _drain(self) -> None:
        os.read(self._wake_read, 4096)
        while not self._posted.empty():
            self._posted.get()()

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _spawn(self, member: str) -> None:
        record = self._state.view.record
        assert record is not None
        try:
            worker = self._workers.spawn(member, record)
        except OutsideError as error:
            self._feed(m.StopAsked(str(error), ExitCode.USER_ERROR))
            self._feed(m.WorkerExited(member, 1))
            return
        self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._exited(member, worker.pidfd))
        self._feed(m.WorkerSpawned(member))

    def _exited(self, member: str, pidfd: int) -> None:
        at = self._clock.now()
        self._selector.unregister(pidfd)
        code = self._workers.reap(member)
        record = self._state.view.record
        if record is not None and member in record.members and record.phase is Phase.RUNNING:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            rank = record.members.index(member)
            self._timeline.detected(at, f"rank {rank} {how}", member)
        self._watch_board()
        channel = self._channels.get(member)
        if channel is not None:
            # Its last words (a user's error, done) may still be in the socket.
            self._read(channel)
        self._hang_up(member)
        self._keeper.tell(Gone(member=member))
        self._feed(m.WorkerExited(member, code))

    def _stop(self, member: str) -> None:
        self._workers.signal(member, signal.SIGTERM)
        self._timers.at(
            self._clock.now() + self._settings.stop_timeout, lambda: self._workers.signal(member, signal.SIGKILL)
        )

    def _accept(self) -> None:
        channel = self._listener.accept()
        if channel is not None:
            self._selector.register(channel, selectors.EVENT_READ, lambda: self._read(channel))

    def _read(self, channel: Channel) -> None:
        if channel.fileno() < 0:
            return
        try:
            messages = channel.pending()
        except (LinkLost, FormatError):
            member = next((name for name, known in self._channels.items() if known is channel), "")
            self._hang_up(member, channel)
            return
        for message, _ in messages:
            if isinstance(message, Hello) and message.member not in self._channels:
                self._channels[message.member] = channel
                with contextlib.suppress(LinkLost):  # It may be dead already; its pidfd tells the rest.
                    channel.post(Welcome(keeper=self._keeper.address))
            member = next((name for name, known in self._channels.items() if known is channel), "")
            if not member:
                continue
            line = self._timeline.heard(member, message, self._clock.now())
            if line:
                self._say(line)
            self._feed(m.WorkerSaid(member, message))

    def _hang_up(self, member: str, channel: Channel | None = None) -> None:
        channel = self._channels.pop(member, channel)
        if channel is not None and channel.fileno() >= 0:
            self._selector.unregister(channel)
            channel.close()

    def _watch_board(self) -> None:
        """How far the local members of the current generation are."""
        board, record = self._keeper.board, self._state.view.record
        if board is None or record is None:
            return
        self._mention_early_return(record)
        slots = [slot_of(worker.member) for worker in self._state.info.workers if worker.member in record.members]
        now = [board.progress(slot) for slot in slots]
        steps = [step for generation, step in now if generation == record.generation]
        progress = (record.generation, max(steps)) if steps else self._progress
        if progress != self._progress:
            self._progress = progress
            self._feed(m.Progress(*progress))

    def _mention_early_return(self, record: WorldRecord) -> None:
        """A function that returns on some ranks only leaves the others waiting in a collective: say so."""
        alive = self._state.view.workers()
        done = [r for r, x in enumerate(record.members) if x in alive and alive[x].done == record.generation]
        if not done or len(done) == record.size or record.phase is not Phase.RUNNING:
            self._waited_for_done = 0
            return
        self._waited_for_done += 1
        if self._waited_for_done % _EARLY_RETURN == 0:
            others = [str(rank) for rank in range(record.size) if rank not in done]
            ranks = ", ".join(map(str, done))
            self._say(f"the function has returned on rank {ranks} and goes on on rank {', '.join(others)}")

    # ---- the keeper -------------------------------------------------------------------------------------------------

    def _start_keeper(self) -> None:
        self._keeper.start()
        self._keeper_since = self._clock.now()
        pidfd = self._keeper.pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._keeper_died(pidfd))
        self._reach_keeper()

    def _reach_keeper(self) -> None:
        if self._keeper.channel is not None or self._keeper.pidfd < 0:
            return
        if not self._keeper.try_connect():
            self._timers.at(self._clock.now() + 0.02, self._reach_keeper)
            return
        assert self._keeper.channel is not None
        self._selector.register(self._keeper.channel, selectors.EVENT_READ, self._read_keeper)
        # Who ended while there was no keeper to hear of it.
        for owner in self._keeper.owners() - {worker.member for worker in self._workers.running()}:
            self._keeper.tell(Gone(member=owner))

    def _read_keeper(self) -> None:
        channel = self._keeper.channel
        if channel is None:
            return
        try:
            for message, descriptors in channel.pending():
                if self._keeper.take_in(message, descriptors):
                    continue
                if isinstance(message, Notice):
                    self._say(message.text)
                    if message.kind == "persisted":
                        self._saved, self._keeper_deaths = True, 0
                    self._sink.put(LogEvent(at=message.at, kind=message.kind, text=message.text))
                if isinstance(message, Flushed):
                    self._flushed = message.text
        except (LinkLost, FormatError):
            # Its pidfd tells the rest.
            self._selector.unregister(channel)
            channel.close()
            self._keeper.channel = None

    def _keeper_died(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        if self._keeper.channel is not None:
            self._read_keeper()
        if self._keeper.channel is not None:
            self._selector.unregister(self._keeper.channel)
        code = self._keeper.died()
        self._sink.put(LogEvent(at=self._clock.now(), kind="keeper_died", text=f"exit code {code}"))
        proven = self._clock.now() - self._keeper_since >= _KEEPER_PROVEN
        self._keeper_deaths = 1 if proven else self._keeper_deaths + 1
        if self._keeper_deaths > _KEEPER_RESTARTS:
            text = f"the keeper of this node died {self._keeper_deaths} times in a row (exit code {code})"
            self._feed(m.StopAsked(text, ExitCode.USER_ERROR))
            return
        self._say(f"the keeper died (exit code {code}); another takes over its images")
        self._start_keeper()

    def _wind_up(self, outcome: Outcome) -> Outcome:
        """The workers are gone: wait for the last state to become durable, then end the keeper."""
        unsaved = self._flush()
        if self._keeper.pidfd >= 0:
            self._selector.unregister(self._keeper.pidfd)
        self._keeper.stop(_KEEPER_STOP if self._interrupts < _AT_ONCE else 0.0)
        self._listener.close()
        if self._links is not None:
            self._neighbours.close()
            self._store.ask(lambda store: store.withdraw())
        self._store.close(_LAST_CALLS if self._interrupts < _AT_ONCE else 0.0)
        return replace(outcome, unsaved=unsaved, saved=self._saved)

    def _flush(self) -> str:
        """Have the keeper, or the one that takes over from it, make the last state durable; why it is not, if so."""
        now = self._clock.now()
        deadline, mention = now + _FLUSH_TIMEOUT, now + 1.0
        asked: Channel | None = None
        self._flushed = None
        while self._flushed is None and self._keeper.pidfd >= 0 and self._clock.now() < deadline:
            if self._interrupts >= _AT_ONCE:
                break
            if self._keeper.channel is not None and self._keeper.channel is not asked and self._keeper.flush():
                asked = self._keeper.channel
            self._timers.at(self._clock.now() + 0.5, lambda: None)
            self._once()
            if self._flushed is None and self._clock.now() > mention:
                self._say("waiting for the last state to become durable")
                mention = self._clock.now() + 10.0
        if self._flushed is not None:
            return self._flushed
        standing = self._keeper.standing
        if standing is None or standing.policy is None:
            return ""
        why = f"that took more than {_FLUSH_TIMEOUT:g} s" if self._clock.now() >= deadline else "it was not waited for"
        return f"the last state may not be durable: {why if self._keeper.pidfd >= 0 else 'the keeper died too often'}"

    # ---- signals ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals end the job in good order; the third one ends it at once."""

        def asked(number: int, frame: FrameType | None) -> None:
            del frame
            self._interrupts += 1
            name = signal.Signals(number).name
            self._post(lambda: self._interrupted(name))

        before = {number: signal.signal(number, asked) for number in self._settings.signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self, name: str) -> None:
        if self._interrupts >= _AT_ONCE:
            for worker in self._workers.running():
                self._workers.signal(worker.member, signal.SIGKILL)
        if self._interrupts == 1 and self._links is not None:
            self._feed(m.LeaveAsked(f"its agent got {name}"))
            leaving = bool(self._state.info.leaving)
        else:
            self._feed(m.StopAsked(f"the agent got {name}"))
            leaving = False
        self._say(f"got {name}, {'leaving' if leaving else 'ending'} the job")
        if self._state.view.record is None:
            self._outcome = Outcome(code=ExitCode.INTERRUPTED, text=f"the agent got {name}")


def print_line(text: str) -> None:
    """A line for people, on stderr."""
    print(f"[rtrun] {text}", file=sys.stderr, flush=True)
