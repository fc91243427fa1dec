"""This node among the others: the store that keeps the record, what it says of them, and the lines to them."""

from __future__ import annotations

from collections.abc import Callable

from resilient_train.agent.links import Links
from resilient_train.agent.loop import Loop
from resilient_train.agent.neighbours import Neighbours
from resilient_train.agent.store_line import StoreLine
from resilient_train.control.store import ControlStore, News
from resilient_train.errors import JobReplaced, ResilientError, StoreGone
from resilient_train.plan import events as ev
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord

STORE_BEATS = 3
"""Signs of life to the store within the time after which it lets a node's announcement expire."""
_ASKS = 6
"""Times in which the store is asked for its word, within the time that it holds."""


class Cluster:
    """Feeds the agent's machine with what the store and the other nodes say."""

    def __init__(
        self,
        loop: Loop,
        store: ControlStore,
        links: Links | None,
        info: NodeInfo,
        within: float,
        vouch: float,
        say: Callable[[str], None],
        feed: Callable[[ev.Event], None],
    ) -> None:
        """Args:
        loop: the agent's.
        store: the agreed record.
        links: lines to the other agents; None on a job's only node, which announces nothing.
        info: this node.
        within: seconds of silence after which a node is a suspect.
        vouch: seconds that the store's word holds.
        say: prints a line for people.
        feed: hands an event to the agent's machine.
        """
        self._loop = loop
        self._links = links
        self._within = within
        self._ask_every = vouch / _ASKS
        self._say = say
        self._feed = feed
        self._info = info
        self._line = StoreLine(store, loop.post, self._silent)
        self._neighbours = Neighbours(info, within, loop.clock, loop.at, feed)
        self._silent_since: float | None = None
        self._gone = False
        self._unreadable: set[str] = set()
        self._unsaid: NodeInfo | None = None
        self._revision = 0
        """That of the newest version that news told of."""
        self._asked = False
        """Whether the store was asked for its word since there is a world that it can speak of."""

    def begin(self) -> None:
        """Take part."""
        if self._links is None:
            self._line.ask(lambda store: store.look().record, lambda record: self._feed(ev.RecordSeen(record)))
            return
        self.announce(self._info)
        self._neighbours.begin(self._links)
        self._loop.every(self._within / STORE_BEATS, self._show_life)
        self._line.listen(self._news)
        self._loop.every(self._ask_every, self._ask_for_word)

    def heard(self, node: str) -> None:
        """A line brought a sign of life."""
        self._neighbours.heard(node)

    def refused(self, node: str) -> None:
        """Nobody listens where a node's agent did."""
        self._neighbours.refused(node)

    def swap(self, record: WorldRecord) -> None:
        """Try to make this the next version of the record, and report what stands."""
        self._line.ask(lambda store: store.swap(record), lambda stands: self._feed(ev.RecordSeen(stands)), "swap")

    def announce(self, info: NodeInfo) -> None:
        """Announce this node, once for all that changes until the store is free for it."""
        self._info = info
        self._neighbours.own(info)
        if self._links is None:
            return
        self._unsaid = info

        def said(_: object) -> None:
            if self._unsaid is info:
                self._unsaid = None

        self._line.ask(lambda store: store.announce(info), said, "announce")

    def close(self, timeout: float) -> None:
        """Take leave; waits up to ``timeout`` seconds for the store to hear of it."""
        if self._links is not None:
            self._neighbours.close()
            self._line.ask(lambda store: store.withdraw())
        self._line.close(timeout)

    def _show_life(self) -> None:
        """A beat; and again the announcement that the store did not take."""
        if self._unsaid is not None:
            self.announce(self._info)
        self._line.ask(lambda store: store.beat(), lambda _: self._alive(), "beat")

    def _alive(self) -> None:
        """After an outage in which nothing has changed no news come by themselves."""
        if self._silent_since is not None:
            self._ask_for_word()
            self._look()

    def _ask_for_word(self) -> None:
        """Whether the record that this agent knows is the newest."""

        def ask(store: ControlStore) -> ev.Vouched:
            asked_at = self._loop.clock.now()
            return ev.Vouched(revision=store.revision(), asked_at=asked_at)

        def heard(word: ev.Vouched) -> None:
            self._feed(word)
            if word.revision > self._revision:
                # The news of it should be here by now, and may have been lost.
                self._look()

        self._line.ask(ask, heard, "word")

    def _look(self) -> None:
        self._line.ask(lambda store: store.look(), self._news, "look")

    def _news(self, news: News) -> None:
        if self._silent_since is not None:
            self._silent_since, self._gone = None, False
            self._say("the control store answers again")
        for text in set(news.unreadable) - self._unreadable:
            self._say(f"a node announces itself in a way that this version does not understand: {text}")
        self._unreadable |= set(news.unreadable)
        self._feed(ev.RecordSeen(news.record))
        if news.record is not None:
            self._revision = max(self._revision, news.record.revision)
        if news.record is not None and not self._asked:
            self._asked = True
            self._ask_for_word()
        self._neighbours.announced(news.nodes)

    def _silent(self, error: ResilientError) -> None:
        now, text, gone = self._loop.clock.now(), str(error), isinstance(error, StoreGone)
        if isinstance(error, JobReplaced):
            self._feed(ev.Superseded(text))
            return
        if gone and not self._gone:
            self._say(f"{text}; training goes on until the world has to change, which ends the job")
        elif self._silent_since is None:
            self._say(f"{text}; training goes on, changes of the world wait")
        self._gone = self._gone or gone
        if self._silent_since is None:
            self._silent_since = now
        self._neighbours.deaf(gone)
        # A store that ends with its host may have lost a single call.
        lasting = self._line.lasting or now < self._silent_since + self._within
        self._feed(ev.StoreSilent(text, lasting, gone))
