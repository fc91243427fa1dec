"""The keeper in the agent's loop: started, heard, replaced when it dies, asked for the last state at the end."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from typing import Protocol

from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.agent.loop import Loop
from resilient_train.errors import FormatError, LinkLost
from resilient_train.events import Event, Sink
from resilient_train.ipc.channel import Channel
from resilient_train.spec.messages import Flushed, Gone, Notice, Ping, Pong, Serving

_RESTARTS = 5
"""Keepers in a row that may die without having made a state durable or served for `_PROVEN` seconds."""
_PROVEN = 60.0
_UNANSWERED = 5
"""Questions in a row without an answer after which a keeper that lives is taken for hanging.  Counted, not timed: an
agent that was stopped itself has not asked."""
_SILENT = (3.0, 10.0)
"""Seconds that this takes: times what a loss may go unnoticed, and at least so many, as a keeper computes nothing but
may be short of processor time."""
_FLUSH_TIMEOUT = 600.0
_STOP = 30.0


class Surroundings(Protocol):
    """What a keeper's end and words matter to."""

    def say(self, text: str) -> None:
        """Print a line for people."""
        ...

    def running(self) -> set[str]:
        """Ids of the workers that run."""
        ...

    def serves(self, endpoint: str) -> None:
        """The keeper serves other nodes here; or nowhere, if empty."""
        ...

    def no_keeper(self, text: str) -> None:
        """There will be no keeper any more."""
        ...


class Keeping:
    """This node's keeper, whichever process it is."""

    def __init__(self, process: KeeperProcess, loop: Loop, sink: Sink, around: Surroundings, within: float) -> None:
        """Args:
        process: how to run one.
        loop: the agent's.
        sink: where events go.
        around: the agent.
        within: seconds in which a loss is to be noticed.
        """
        self.process = process
        self.saved = False
        """Whether some state of this job is durable."""
        self._loop = loop
        self._within = within
        self._sink = sink
        self._around = around
        self._flushed: str | None = None
        self._deaths = 0
        self._since = 0.0
        self._unanswered = 0

    def begin(self) -> None:
        """Start one (from the main thread), and see to it that there is one that answers."""
        self._start()
        times, least = _SILENT
        self._loop.every(max(least, times * self._within) / _UNANSWERED, self._ask)

    def _ask(self) -> None:
        if self.process.channel is None:
            return
        if self._unanswered >= _UNANSWERED:
            self._around.say(f"the keeper has not answered {self._unanswered} times in a row; it is killed")
            self._unanswered = 0
            self.process.kill()
            return
        self._unanswered += 1
        self.process.tell(Ping())

    def _start(self) -> None:
        self.process.start()
        self._unanswered = 0
        self._since = self._loop.clock.now()
        pidfd = self.process.pidfd
        self._loop.selector.register(pidfd, selectors.EVENT_READ, lambda: self._died(pidfd))
        self._reach()

    def _reach(self) -> None:
        process = self.process
        if process.channel is not None or process.pidfd < 0:
            return
        if not process.try_connect():
            self._loop.at(self._loop.clock.now() + 0.02, self._reach)
            return
        assert process.channel is not None
        self._loop.selector.register(process.channel, selectors.EVENT_READ, self._read)
        # Who ended while there was no keeper to hear of it.
        for owner in process.owners() - self._around.running():
            process.tell(Gone(member=owner))

    def _read(self) -> None:
        channel = self.process.channel
        if channel is None:
            return
        try:
            for message, descriptors in channel.pending():
                if self.process.take_in(message, descriptors):
                    continue
                if isinstance(message, Pong):
                    self._unanswered = 0
                if isinstance(message, Notice):
                    self._around.say(message.text)
                    if message.kind == "persisted":
                        self.saved, self._deaths = True, 0
                    self._sink.put(Event(at=message.at, kind=message.kind, text=message.text))
                if isinstance(message, Flushed):
                    self._flushed = message.text
                if isinstance(message, Serving):
                    if message.error:
                        self._around.say(f"images are not copied to other nodes: {message.error}")
                    self._around.serves(message.endpoint)
        except (LinkLost, FormatError):
            # Its pidfd tells the rest.
            self._loop.selector.unregister(channel)
            channel.close()
            self.process.channel = None

    def _died(self, pidfd: int) -> None:
        self._loop.selector.unregister(pidfd)
        if self.process.channel is not None:
            self._read()
        if self.process.channel is not None:
            self._loop.selector.unregister(self.process.channel)
        code = self.process.died()
        now = self._loop.clock.now()
        self._sink.put(Event(at=now, kind="keeper_died", text=f"exit code {code}"))
        self._deaths = 1 if now - self._since >= _PROVEN else self._deaths + 1
        if self._deaths > _RESTARTS:
            self._around.no_keeper(f"the keeper of this node died {self._deaths} times in a row (exit code {code})")
            return
        self._around.say(f"the keeper died (exit code {code}); another takes over its images")
        self._start()

    def flush(self, once: Callable[[], None], hurry: Callable[[], bool]) -> str:
        """Have the last state made durable, by the keeper or the one that takes over from it; why it is not, if so.

        Args:
            once: lets the agent's loop do the next thing.
            hurry: whether somebody does not want to wait any more.
        """
        process, clock = self.process, self._loop.clock
        deadline, mention = clock.now() + _FLUSH_TIMEOUT, clock.now() + 1.0
        asked: Channel | None = None
        self._flushed = None
        while self._flushed is None and process.pidfd >= 0 and clock.now() < deadline and not hurry():
            if process.channel is not None and process.channel is not asked and process.flush():
                asked = process.channel
            self._loop.at(clock.now() + 0.5, lambda: None)
            once()
            if self._flushed is None and clock.now() > mention:
                self._around.say("waiting for the last state to become durable")
                mention = clock.now() + 10.0
        if self._flushed is not None:
            return self._flushed
        standing = process.standing
        if standing is None or standing.policy is None:
            return ""
        why = f"that took more than {_FLUSH_TIMEOUT:g} s" if clock.now() >= deadline else "it was not waited for"
        return f"the last state may not be durable: {why if process.pidfd >= 0 else 'the keeper died too often'}"

    def stop(self, at_once: bool) -> None:
        """Let it end."""
        if self.process.pidfd >= 0:
            self._loop.selector.unregister(self.process.pidfd)
        self.process.stop(0.0 if at_once else _STOP)
