"""This keeper among the keepers of its job: serving them, following them, deciding with them what the last state is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from resilient_train.clock import Clock
from resilient_train.errors import LinkLost
from resilient_train.image.arena import Board
from resilient_train.keeper.conduct import Conductor
from resilient_train.keeper.replicas import Replicas
from resilient_train.keeper.replicate import Replicator, alone
from resilient_train.keeper.serve import PeerServer
from resilient_train.keeper.shelf import Shelf, source_of
from resilient_train.keeper.survey import Finding, Survey
from resilient_train.plan.recovery import Found, complete_keys
from resilient_train.spec.messages import Peers, Serving
from resilient_train.spec.world import Key, node_of

_DECISION = 10.0
"""Seconds to wait for the other nodes to decide on the last state as well."""
_ASK_AGAIN = 0.1


class Loop(Protocol):
    """What this needs of the keeper."""

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: have the loop do something."""
        ...

    def deposit(self, slot: int) -> None:
        """Leave a slot with the agent as well."""
        ...

    def drop(self, slot: int) -> None:
        """Let go of a slot."""
        ...

    def notice(self, kind: str, text: str, *, workers: bool = False) -> None:
        """Say something worth an event."""
        ...

    def settled(self, newest: Key | None) -> None:
        """Every node has decided, and this one has written what it could."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Last:
    """The last state, as far as it concerns this node."""

    key: Key | None
    """Which; None if no state is complete anywhere."""
    world: int
    """Number of ranks that it is the state of."""
    images: Mapping[int, int]
    """rank -> slot, of the images that this node makes durable."""


class JobWide:
    """Runs on the keeper's loop, but for what its threads do."""

    def __init__(self, shelf: Shelf, board: Callable[[], Board], clock: Clock, loop: Loop) -> None:
        """Args:
        shelf: this node's images.
        board: its board.
        clock: its clock.
        loop: the keeper.
        """
        self._shelf = shelf
        self._loop = loop
        self._clock = clock
        self._peers: Peers | None = None
        self._secret = ""
        self._server: PeerServer | None = None
        self._survey = Survey()
        self._conductor = Conductor(clock.now, lambda text: self._say("replication", text))
        self._replicator = Replicator(shelf, board, lambda text: self._say("replication", text))
        self._replicas = Replicas(
            shelf,
            lambda: board().kept(),
            added=lambda slot: loop.post(lambda: loop.deposit(slot)),
            useless=lambda slot: loop.post(lambda: loop.drop(slot)),
        )
        self._last: Last | None = None
        self._deadline = 0.0

    def _say(self, kind: str, text: str) -> None:
        self._loop.post(lambda: self._loop.notice(kind, text))

    # ---- who there is -----------------------------------------------------------------------------------------------

    @property
    def involved(self) -> bool:
        """Whether there are other nodes that may hold images of this job."""
        return self._peers is not None and len({*map(tuple, self._peers.keepers), *map(tuple, self._peers.others)}) > 1

    @property
    def shared(self) -> bool:
        """Whether the present world has, or may have, members on other nodes."""
        return self._peers is not None and not alone(self._peers)

    @property
    def left_behind(self) -> bool:
        """Whether the job goes on without this node."""
        return self._peers is not None and bool(self._peers.keepers) and not self._member

    @property
    def _member(self) -> bool:
        return self._peers is not None and self._belongs(self._peers.node)

    @property
    def asked_at(self) -> float:
        """When another node asked for something last."""
        return self._server.asked_at if self._server is not None else 0.0

    @property
    def kept(self) -> Key | None:
        """The newest state of the present world that survives the loss of as many nodes as it has copies."""
        return self._replicator.kept

    def keeps(self, owner: str) -> bool:
        """Whether a slot holds copies of a node that sends them here, and will be used again."""
        source = source_of(owner)
        return self._member and self._belongs(node_of(source)) and self._replicator.keeps_for(node_of(source))

    def _belongs(self, node: str) -> bool:
        return self._peers is not None and node in [member for member, _ in self._peers.keepers]

    def serve(self, host: str, secret: str) -> Serving:
        """Begin to serve other nodes."""
        try:
            if self._server is None or secret != self._secret:
                if self._server is not None:
                    self._server.close()
                key = bytes.fromhex(secret)
                parts = (self._shelf, self._replicas, self._conductor, self._chosen)
                self._server, self._secret = PeerServer(host, key, *parts), secret
        except (LinkLost, ValueError) as error:
            return Serving(endpoint="", error=str(error))
        return Serving(endpoint=self._server.endpoint)

    def follow(self, peers: Peers) -> None:
        """The keepers of the job, or its world, are these now."""
        if self._server is None or peers == self._peers:
            return
        if self._peers is None or peers.generation != self._peers.generation:
            self._last = None
        self._peers = peers
        key = bytes.fromhex(self._secret)
        self._survey.follow(peers, self._server.endpoint, key)
        self._conductor.lead(peers)
        self._replicator.follow(peers, key)

    def tick(self, saving: bool) -> None:
        """A moment has passed."""
        self._replicator.saving = saving

    def time_to_persist(self) -> None:
        """Have all nodes make a state durable, if it is this one that says when."""
        if self._peers is not None and self._peers.keepers and self._peers.keepers[0][0] == self._peers.node:
            self._conductor.persist()

    def list(self, answer: Callable[[list[list[object]], str], None]) -> None:
        """Have ``answer`` called, on the loop, with the images of other nodes and the job's secret."""

        def found(finding: Finding) -> None:
            rows: list[list[object]] = [
                [
                    endpoint,
                    [[i.slot, i.key.lineage, i.key.step, i.rank, i.world, i.size, int(i.replica)] for i in images],
                ]
                for endpoint, images in finding.images.items()
            ]
            self._loop.post(lambda: answer(rows, self._secret))

        self._survey.ask(found, patient=True)

    # ---- the last state ---------------------------------------------------------------------------------------------

    def _chosen(self) -> Key | None:
        """What this node has decided; told to the others."""
        last = self._last
        return None if last is None else last.key or Key(0, 0)

    def decide_last(self, decided: Callable[[Last], None]) -> None:
        """Have ``decided`` called, on the loop, with the last state, which all nodes agree on; then call `settled`."""

        def found(finding: Finding) -> None:
            self._loop.post(lambda: self._decide(finding, decided))

        self._survey.ask(found)

    def _decide(self, finding: Finding, decided: Callable[[Last], None]) -> None:
        assert self._server is not None
        self._last = last_state(self._shelf, finding, self._server.endpoint)
        self._deadline = self._clock.now() + _DECISION
        decided(self._last)

    def settled(self) -> None:
        """This node has written its part: wait until the others know theirs, for they need to hear of this one's."""

        def found(finding: Finding) -> None:
            undecided = [endpoint for endpoint, chosen in finding.chosen.items() if chosen is None]
            self._loop.post(lambda: self._wait_or_end(bool(undecided)))

        self._survey.ask(found)

    def _wait_or_end(self, undecided: bool) -> None:
        if undecided and self._clock.now() < self._deadline:
            timer = threading.Timer(_ASK_AGAIN, lambda: self._loop.post(self.settled))
            timer.daemon = True
            timer.start()
        else:
            self._loop.settled(self._last.key if self._last is not None else None)


def last_state(shelf: Shelf, finding: Finding, own: str) -> Last:
    """The newest state that is complete over all nodes, or that another node has begun to make durable, and which of
    its images the keeper at ``own`` writes: its originals, and copies whose originals are gone."""
    mine = [(own, i.slot, i.stamp.key, i.stamp.rank, i.stamp.world, bool(source_of(i.owner))) for i in shelf.images()]
    theirs = [
        (endpoint, image.slot, image.key, image.rank, image.world, image.replica)
        for endpoint, images in finding.images.items()
        for image in images
    ]
    images = mine + theirs
    found = (Found(key=key, rank=rank, world=world) for _, _, key, rank, world, _ in images)
    chosen = [key for key in finding.chosen.values() if key is not None and key.lineage]
    keys = sorted({*complete_keys(found, {}), *chosen}, reverse=True)
    if not keys:
        return Last(key=None, world=0, images={})
    holders: dict[int, list[tuple[bool, str, int]]] = {}
    world = 0
    for endpoint, slot, key, rank, size, replica in images:
        if key == keys[0]:
            holders.setdefault(rank, []).append((replica, endpoint, slot))
            world = size
    first = {rank: min(places) for rank, places in holders.items()}
    return Last(
        key=keys[0], world=world, images={rank: slot for rank, (_, where, slot) in first.items() if where == own}
    )
