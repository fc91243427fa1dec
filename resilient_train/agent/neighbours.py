"""The other nodes, as this agent finds them: feeds `resilient_train.plan.suspicion` and keeps the lines it asks for."""

from __future__ import annotations

from collections.abc import Callable

from resilient_train.agent.links import Links
from resilient_train.clock import Alarm, Clock
from resilient_train.plan import suspicion
from resilient_train.plan.events import NodesSeen
from resilient_train.spec.node import NodeInfo

BEATS = 5
"""Signs of life over a line within the time after which a silent node is a suspect."""


class Neighbours:
    """Who of the job's nodes is there."""

    def __init__(
        self,
        me: NodeInfo,
        within: float,
        clock: Clock,
        at: Callable[[float, Callable[[], None]], None],
        changed: Callable[[NodesSeen], None],
    ) -> None:
        """Args:
        me: this node.
        within: seconds of silence after which a node is a suspect.
        clock: the node's clock.
        at: has something called at a time.
        changed: told when the nodes, or what is known of them, are not what they were.
        """
        self._state = suspicion.State(me=me, within=within, at=clock.now())
        self._clock = clock
        self._at = at
        self._changed = changed
        self._links: Links | None = None
        self._seen: NodesSeen | None = None
        self._beat_every = within / BEATS
        self._alarm = Alarm(at, lambda: self._step(suspicion.Looked()))

    def begin(self, links: Links) -> None:
        """Begin to listen."""
        self._links = links
        self._beat()

    def own(self, me: NodeInfo) -> None:
        """This node's own announcement has changed."""
        self._state = suspicion.with_own(self._state, me)

    def announced(self, nodes: tuple[NodeInfo, ...]) -> None:
        """These announcements stand."""
        self._step(suspicion.Announced(nodes))

    def heard(self, node: str) -> None:
        """A line brought a sign of life."""
        self._step(suspicion.Heard(frozenset({node})))

    def refused(self, node: str) -> None:
        """Nobody listens where this node's agent did."""
        self._step(suspicion.Refused(node))

    def deaf(self, gone: bool) -> None:
        """The store does not answer; ``gone``: it has ended for good."""
        self._step(suspicion.Deaf(gone))

    def close(self) -> None:
        """Hang up."""
        if self._links is not None:
            self._links.close()
            self._links = None

    def _beat(self) -> None:
        if self._links is not None:
            self._links.beat()
            self._step(suspicion.Looked())
            self._at(self._clock.now() + self._beat_every, self._beat)

    def _step(self, event: suspicion.Event) -> None:
        now = self._clock.now()
        self._state, verdict = suspicion.step(self._state, event, now)
        if self._links is not None:
            peers = self._state.peers
            self._links.want({name: peers[name].info.link for name in verdict.wanted if name in peers})
        if verdict.wake_at is not None:
            self._alarm.set(verdict.wake_at)
        seen = NodesSeen(
            nodes=verdict.alive,
            lost=verdict.lost,
            suspects=verdict.suspects,
            doubted=verdict.doubted,
            fading=verdict.fading,
        )
        if seen != self._seen:
            self._seen = seen
            self._changed(seen)
