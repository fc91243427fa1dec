"""The agent's event loop: it feeds what happens to `resilient_train.plan.membership` and carries out what that decides.

One thread, the process's main thread (children must be spawned from it).  Exits arrive through pidfds, words through
Unix sockets, results of store calls through a pipe from the thread that makes them.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FrameType

from resilient_train.agent.bootstraps import Bootstraps
from resilient_train.agent.cluster import Cluster
from resilient_train.agent.hangs import Hangs
from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.agent.keeping import Keeping
from resilient_train.agent.links import Links
from resilient_train.agent.loop import Loop
from resilient_train.agent.timeline import Timeline, count_ranks
from resilient_train.agent.workers import Workers
from resilient_train.clock import Alarm, Clock
from resilient_train.control.store import ControlStore
from resilient_train.errors import ExitCode, FormatError, LinkLost, OutsideError
from resilient_train.events import Event as LogEvent
from resilient_train.events import Sink
from resilient_train.ipc.channel import Channel, Listener
from resilient_train.plan import events as ev
from resilient_train.plan import membership as m
from resilient_train.plan.ring import peers_of
from resilient_train.plan.view import Limits, Timing, View
from resilient_train.spec.messages import (
    AskStatus,
    Gone,
    Hello,
    Message,
    Save,
    Status,
    Welcome,
    Wish,
    Wished,
)
from resilient_train.spec.node import NodeInfo, Terms
from resilient_train.spec.world import Phase, WorldRecord, slot_of

_LAST_CALLS = 2.0
"""Seconds for the store to take this node's leave."""
_UNSENT = 0.05
"""Seconds between attempts to send to a worker or keeper that does not read."""
_VERDICT = (6.0, 10.0)
"""How long a failed collective waits to hear who was lost: times ``within`` (a silent node is out after one), at least
so many seconds (the agreement takes its time, too)."""
_AT_ONCE = 3
"""Signals after which nothing is waited for any more."""
_MENTION_FIRST, _MENTION_AGAIN = 5.0, 60.0
"""Seconds until it is said that nodes are waited for, and until it is said again."""
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
    """Abstract address at which workers and ``rtctl`` reach it."""
    job: str = ""
    """The job's id."""
    within: float = 5.0
    """Seconds within which the loss of a silent node is to be noticed."""
    host: str = "127.0.0.1"
    """The address at which the other nodes' agents reach this one."""
    addresses: tuple[str, ...] = ()
    """All of this machine's addresses."""
    labels: tuple[str, ...] = ()
    """Where this machine stands: ``rack=r1`` and the like."""
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
        self._sink = sink
        self._say = say
        self._clock = clock
        self._loop = loop = Loop(clock)
        self._alarm = Alarm(loop.at, self._tick)
        self._bootstraps = Bootstraps(
            new_bootstrap, loop.post, lambda endpoint: self._feed(ev.EndpointReady(endpoint)), say
        )
        self._timeline = Timeline(sink, settings.node)
        self._listener = Listener(settings.address)
        self._accepted: set[Channel] = set()
        """Everybody who has called: workers, and `rtctl`."""
        self._channels: dict[str, Channel] = {}
        """The workers that have said hello."""
        self._outcome: Outcome | None = None
        self._progress = (0, 0)
        self._vouched_until = 0.0
        self._several = bool(settings.secret)
        links = None
        if self._several:
            links = Links(settings.node, settings.host, settings.secret, loop.selector, self._heard, self._refused)
        info = NodeInfo(
            node=settings.node,
            order=settings.order,
            endpoint=new_bootstrap(),
            slots=settings.slots,
            standby=settings.standby,
            link=links.address if links is not None else "",
            addresses=settings.addresses,
            labels=settings.labels,
            terms=Terms(
                min_nodes=settings.limits.min_nodes, max_nodes=settings.limits.max_nodes, within=settings.within
            ),
        )
        timing = Timing.scaled(settings.within)
        view = View(me=settings.node, limits=settings.limits, nodes={settings.node: info}, timing=timing)
        self._state = m.State(view=view)
        self._cluster = Cluster(loop, store, links, info, settings.within, timing.vouch, say, self._feed)
        self._keeping = Keeping(keeper, loop, sink, _Surroundings(self), settings.within)
        self._keeper = keeper
        self._hangs = Hangs(settings.within, workers, _Surroundings(self), clock)
        self._interrupts = 0
        self._mention_at = clock.now() + _MENTION_FIRST
        self._waited_for_done = 0
        self._stands_still = False

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run the job to its end on this node."""
        self._loop.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        with self._signals():
            if self._several:
                self._keeper.serve(self._settings.host, self._settings.secret)
            self._keeping.begin()
            self._cluster.begin()
            self._loop.every(1.0, self._watch_board)
            self._loop.every(self._hangs.period, self._hangs.look)
            while self._outcome is None:
                self._once()
            return self._wind_up(self._outcome)

    def _once(self) -> None:
        sent = [self._keeper.push(), *(channel.push() for channel in self._accepted)]
        self._loop.once(None if all(sent) else _UNSENT)

    def _heard(self, node: str) -> None:
        self._cluster.heard(node)

    def _refused(self, node: str) -> None:
        self._cluster.refused(node)

    def _feed(self, event: ev.Event) -> None:
        """Hand one event to the state machine and carry out what follows."""
        before = self._state.view.record
        self._state, effects = m.step(self._state, event, self._clock.now())
        record = self._state.view.record
        if record is not None and record is not before:
            self._record_changed(before, record)
        if self._several and (peers := peers_of(self._state.view)) is not None:
            self._keeper.follow(peers)  # Before the workers ask it for what the others hold.
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Swap(proposed):
                self._cluster.swap(proposed)
            case ev.Announce(info):
                self._cluster.announce(info)
            case ev.Spawn(member):
                self._spawn(member)
            case ev.Stop(member, _):
                self._stop(member)
            case ev.Save():
                self._keeper.tell(Save())
            case ev.Vouch(until):
                self._vouched_until = until
                self._show_word()
            case ev.Tell(member, message):
                self._tell(member, message)
            case ev.Say(text):
                self._say(text)
            case ev.Wake(at):
                self._alarm.set(at)
            case ev.End(code, text):
                record = self._state.view.record
                culprit = record.culprit if record is not None else ""
                if code in (ExitCode.STORE_LOST, ExitCode.INTERRUPTED, ExitCode.USAGE):
                    for worker in self._workers.running():
                        self._workers.signal(worker.member, signal.SIGTERM)
                self._outcome = Outcome(code=code, text=text, culprit=culprit)

    def _tell(self, member: str, message: Message) -> None:
        channel = self._channels.get(member)
        if channel is not None:
            with contextlib.suppress(LinkLost):
                channel.post(message)

    def _show_word(self) -> None:
        """The workers and the keeper see until when this node's world is known to be the current one."""
        if self._several and self._keeper.board is not None:
            self._keeper.board.vouch(self._vouched_until)

    def _tick(self) -> None:
        self._watch_board()
        self._feed(ev.Tick())

    def _record_changed(self, before: WorldRecord | None, record: WorldRecord) -> None:
        now = self._clock.now()
        if before is None or record.generation != before.generation:
            self._timeline.agreed(record, now)
            if before is not None:
                self._say(f"generation {record.generation}: {record.reason}; {count_ranks(record.size)}")
            if record.bootstrap == self._state.info.endpoint:
                # Every generation meets in a store that no other has ever written to.
                self._bootstraps.renew()
        if before is not None and record.planned is not None and record.planned != before.planned:
            text = f"{record.planned.reason} at the boundary of step {record.planned.boundary}"
            self._sink.put(LogEvent(at=now, kind="planned", generation=record.generation, text=text))
        if record.phase is not Phase.RUNNING and (before is None or before.phase is Phase.RUNNING):
            self._sink.put(LogEvent(at=now, kind=record.phase, generation=record.generation, text=record.error))
            if record.phase is Phase.FINISHED and (line := self._timeline.unsaid()):
                self._say(line)

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _spawn(self, member: str) -> None:
        record = self._state.view.record
        assert record is not None
        try:
            worker = self._workers.spawn(member, record)
        except OutsideError as error:
            self._unfit(str(error))
            self._feed(ev.WorkerExited(member, 1))
            return
        self._loop.selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._exited(member, worker.pidfd))
        self._feed(ev.WorkerSpawned(member))

    def _unfit(self, text: str) -> None:
        """This node cannot do its part: it leaves the job, which ends only if it has no other."""
        if self._several and self._state.view.elastic():
            self._say(text)
            self._feed(ev.LeaveAsked(text))
        else:
            self._feed(ev.StopAsked(text, ExitCode.USER_ERROR))

    def _exited(self, member: str, pidfd: int) -> None:
        at = self._clock.now()
        self._loop.selector.unregister(pidfd)
        code = self._workers.reap(member)
        record = self._state.view.record
        if record is not None and member in record.members and record.phase is Phase.RUNNING:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            rank = record.members.index(member)
            if member in self._state.view.workers():  # Else it hangs, and that was the event.
                self._timeline.detected(at, f"rank {rank} {how}", member)
        self._watch_board()
        channel = self._channels.get(member)
        if channel is not None:
            # Its last words (a user's error, done) may still be in the socket.
            self._read(channel)
        self._hang_up(member)
        self._keeper.tell(Gone(member=member))
        self._feed(ev.WorkerExited(member, code))

    def _stop(self, member: str) -> None:
        self._workers.signal(member, signal.SIGTERM)
        self._loop.at(
            self._clock.now() + self._settings.stop_timeout, lambda: self._workers.signal(member, signal.SIGKILL)
        )

    def _accept(self) -> None:
        channel = self._listener.accept()
        if channel is not None:
            self._accepted.add(channel)
            self._loop.selector.register(channel, selectors.EVENT_READ, lambda: self._read(channel))

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
            if isinstance(message, (AskStatus, Wish)):
                with contextlib.suppress(LinkLost):
                    channel.post(self._status() if isinstance(message, AskStatus) else self._wish(message))
                continue
            if isinstance(message, Hello) and message.member not in self._channels:
                self._channels[message.member] = channel
                self._sink.put(LogEvent(at=self._clock.now(), kind="ready", member=message.member))
                with contextlib.suppress(LinkLost):  # It may be dead already; its pidfd tells the rest.
                    channel.post(Welcome(keeper=self._keeper.address, verdict=self._verdict()))
            member = next((name for name, known in self._channels.items() if known is channel), "")
            if not member:
                continue
            line = self._timeline.heard(member, message, self._clock.now())
            if line:
                self._say(line)
            self._hangs.heard(member, message)
            self._feed(ev.WorkerSaid(member, message))

    def _verdict(self) -> float:
        times, least = _VERDICT
        return max(least, times * self._settings.within)

    def _status(self) -> Status:
        now, record = self._clock.now(), self._state.view.record
        return Status(
            job=self._settings.job,
            node=self._settings.node,
            record=None if record is None else record.to_json(),
            nodes=[node.to_json() for node in self._state.view.nodes.values()],
            step=self._progress[1],
            incidents=[[now - at, text] for at, text in self._timeline.incidents],
            store="" if self._state.silence is None else self._state.silence.text,
        )

    def _wish(self, wish: Wish) -> Wished:
        known = self._state.view.nodes
        unknown = [node for node in wish.leave if node not in known]
        if unknown:
            return Wished(error=f"this job has no node {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        if not self._state.view.elastic() or not self._several:
            return Wished(error="only jobs of several nodes, with an elastic script, can change while they run")
        if 0 < wish.room < self._settings.limits.min_nodes:
            return Wished(error=f"this job needs at least {self._settings.limits.min_nodes} nodes (MIN of --nnodes)")
        self._feed(ev.Wished(tuple(wish.leave), wish.room))
        return Wished(error="")

    def _hang_up(self, member: str, channel: Channel | None = None) -> None:
        channel = self._channels.pop(member, channel)
        if channel is not None:
            self._accepted.discard(channel)
        if channel is not None and channel.fileno() >= 0:
            self._loop.selector.unregister(channel)
            channel.close()

    def _mention_waiting(self) -> None:
        """There is no world yet, and whoever started this node may wonder why."""
        now, limits = self._clock.now(), self._settings.limits
        if self._several and now >= self._mention_at:
            self._mention_at = now + _MENTION_AGAIN
            span = "" if limits.min_nodes == limits.max_nodes else f" to {limits.max_nodes}"
            here = len(self._state.view.nodes)
            self._say(f"waiting for nodes: {here} of {limits.min_nodes}{span} {'is' if here == 1 else 'are'} here")

    def _watch_board(self) -> None:
        """How far the local members of the current generation are."""
        self._show_word()
        board, record = self._keeper.board, self._state.view.record
        if record is None:
            self._mention_waiting()
        if board is None or record is None:
            return
        self._mention_standing_still(record)
        self._mention_early_return(record)
        slots = [slot_of(worker.member) for worker in self._state.info.workers if worker.member in record.members]
        now = [board.progress(slot) for slot in slots]
        steps = [step for generation, step in now if generation == record.generation]
        progress = (record.generation, max(steps)) if steps else self._progress
        if progress != self._progress:
            self._progress = progress
            self._feed(ev.Progress(*progress))

    def _mention_standing_still(self, record: WorldRecord) -> None:
        """Whoever sees no step must not look for a hang in the model."""
        silence = self._state.silence
        waits = silence is not None and self._several and self._clock.now() >= self._vouched_until
        if waits and not self._stands_still and record.phase is Phase.RUNNING and record.members:
            self._say("training stands still until the control store answers: this world may not be the job's any more")
        self._stands_still = waits

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

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _wind_up(self, outcome: Outcome) -> Outcome:
        """The workers are gone: wait for the last state to become durable, then end the keeper."""
        unsaved = self._keeping.flush(self._once, self._in_a_hurry)
        self._keeping.stop(at_once=self._in_a_hurry())
        self._listener.close()
        self._cluster.close(0.0 if self._in_a_hurry() else _LAST_CALLS)
        return replace(outcome, unsaved=unsaved, saved=self._keeping.saved)

    def _in_a_hurry(self) -> bool:
        return self._interrupts >= _AT_ONCE

    # ---- signals ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals end the job in good order; the third one ends it at once."""

        def asked(number: int, frame: FrameType | None) -> None:
            del frame
            self._interrupts += 1
            name = signal.Signals(number).name
            self._loop.post(lambda: self._interrupted(name))

        before = {number: signal.signal(number, asked) for number in self._settings.signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self, name: str) -> None:
        if self._in_a_hurry():
            for worker in self._workers.running():
                self._workers.signal(worker.member, signal.SIGKILL)
        if self._several:  # Whatever comes after the first concerns this node only.
            self._feed(ev.LeaveAsked(f"its agent got {name}"))
            leaving = bool(self._state.info.leaving)
        else:
            self._feed(ev.StopAsked(f"the agent got {name}"))
            leaving = False
        self._say(f"got {name}, {'leaving' if leaving else 'ending'} the job")
        if self._state.view.record is None:
            self._outcome = Outcome(code=ExitCode.INTERRUPTED, text=f"the agent got {name}")


class _Surroundings:
    """An agent, as its keeper and its `Hangs` see it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.say = agent._say
        self.at = agent._loop.at
        self.tell = agent._tell

    def view(self) -> View:
        return self._agent._state.view

    def progress(self, member: str) -> tuple[int, int]:
        board = self._agent._keeper.board
        return (0, 0) if board is None else board.progress(slot_of(member))

    def feed(self, event: ev.Event) -> None:
        agent = self._agent
        if isinstance(event, ev.Hung):
            agent._timeline.detected(agent._clock.now(), event.reason, event.member)
        elif isinstance(event, ev.Deadlocked):
            agent._timeline.detected(agent._clock.now(), event.reason, "")
        agent._feed(event)

    def running(self) -> set[str]:
        return {worker.member for worker in self._agent._workers.running()}

    def serves(self, endpoint: str) -> None:
        self._agent._feed(ev.KeeperServes(endpoint))

    def no_keeper(self, text: str) -> None:
        self.serves("")  # Nobody is to wait for its answers.
        self._agent._unfit(text)


def print_line(text: str) -> None:
    """A line for people, on stderr; nobody hears it where that is a full disk, or its reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        print(f"[rtrun] {text}", file=sys.stderr, flush=True)
