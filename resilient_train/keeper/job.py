"""This keeper among the keepers of its job: serving them, following them, deciding with them what the last state is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from resilient_train.clock import Clock
from resilient_train.errors import LinkLost, ResilientError
from resilient_train.image.arena import Board
from resilient_train.keeper.conduct import Conductor
from resilient_train.keeper.parities import Parities
from resilient_train.keeper.rebuilding import rebuild, remains
from resilient_train.keeper.replicas import Replicas
from resilient_train.keeper.replicate import Replicator, alone
from resilient_train.keeper.serve import PeerServer
from resilient_train.keeper.shelf import Shelf, is_parity, source_of
from resilient_train.keeper.survey import Finding, Survey
from resilient_train.plan.last import Kept, KeptParities, Last, last_state
from resilient_train.spec.messages import Peers, Serving
from resilient_train.spec.world import Key, node_of

_DECISION = 10.0
"""Seconds to wait for the other nodes to decide on the last state as well."""
_ASK_AGAIN = 0.1


Rows = list[list[object]]
"""[endpoint, rows of what is there] of keepers."""


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
        slots: dict[str, Callable[[int], None]] = {
            "added": lambda slot: loop.post(lambda: loop.deposit(slot)),
            "useless": lambda slot: loop.post(lambda: loop.drop(slot)),
        }
        self._replicas = Replicas(shelf, lambda: board().kept(), **slots)
        replicator = self._replicator
        self._parities = Parities(
            shelf, lambda: board().kept(), **slots, completed=replicator.look, wanted=replicator.folds
        )
        self._last: Last | None = None
        self._decided: Callable[[Last], None] = lambda _: None
        self._rebuilding: set[Key] = set()
        self._deadline = 0.0

    def _say(self, kind: str, text: str) -> None:
        self._loop.post(lambda: self._loop.notice(kind, text))

    # ---- who there is -----------------------------------------------------------------------------------------------

    @property
    def involved(self) -> bool:
        """Whether there are other nodes that may hold images of this job."""
        return self._peers is not None and len({*map(tuple, self._peers.keepers), *map(tuple, self._peers.others)}) > 1

    @property
    def together(self) -> bool:
        """Whether it takes more than the images here to say what there is: other nodes', or parities of lost ones'."""
        return self.involved or (self._server is not None and self._shelf.has_parities())

    @property
    def rebuilding(self) -> bool:
        """Whether a lost image is being made again."""
        return bool(self._rebuilding)

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
        """Whether a slot holds copies of a node that sends them here, or parities of the group, and will be used
        again."""
        if is_parity(owner):
            return self._member and self._replicator.folds(owner)
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
                parts = (self._shelf, self._replicas, self._parities, self._conductor, self._chosen)
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
        self._parities.let_go()

    def time_to_persist(self) -> None:
        """Have all nodes make a state durable, if it is this one that says when."""
        if self._peers is not None and self._peers.keepers and self._peers.keepers[0][0] == self._peers.node:
            self._conductor.persist()

    def list(self, answer: Callable[[Rows, Rows, str], None]) -> None:
        """Have ``answer`` called, on the loop, with the images of other nodes, their parities and the job's secret."""

        def found(finding: Finding) -> None:
            rows: Rows = [
                [
                    endpoint,
                    [[i.slot, i.key.lineage, i.key.step, i.rank, i.world, i.size, int(i.replica)] for i in images],
                ]
                for endpoint, images in finding.images.items()
            ]
            parities: Rows = [
                [endpoint, [parity.row() for parity in held]] for endpoint, held in finding.parities.items() if held
            ]
            self._loop.post(lambda: answer(rows, parities, self._secret))

        self._survey.ask(found, patient=True)

    # ---- the last state ---------------------------------------------------------------------------------------------

    def _chosen(self) -> Key | None:
        """What this node has decided; told to the others."""
        last = self._last
        return None if last is None else last.key or Key(0, 0)

    def decide_last(self, decided: Callable[[Last], None]) -> None:
        """Have ``decided`` called, on the loop, with the last state, which all nodes agree on; then call `settled`.

        It may be called again, with a later state that others found complete.
        """
        self._decided = decided

        def found(finding: Finding) -> None:
            self._loop.post(lambda: self._decide(finding, decided))

        self._survey.ask(found)

    def _decide(self, finding: Finding, decided: Callable[[Last], None]) -> None:
        assert self._server is not None
        own = self._server.endpoint
        images, parities = _kept(self._shelf, finding, own), _parities(self._shelf, finding, own)
        chosen = [key for key in finding.chosen.values() if key is not None and key.lineage]
        last = self._last = last_state(images, parities, chosen, own)
        self._deadline = self._clock.now() + _DECISION
        if last.key is None or not last.rebuild:
            decided(last)
        elif last.key not in self._rebuilding:
            # Whoever asks again meanwhile is told by the same.
            self._rebuilding.add(last.key)
            arguments = (last, last.key, finding, decided)
            threading.Thread(target=self._rebuild, args=arguments, name="rebuild", daemon=True).start()

    def _rebuild(self, last: Last, key: Key, finding: Finding, decided: Callable[[Last], None]) -> None:
        """Make lost images again, and go on with what there is then."""
        made = dict(last.images)

        def end() -> None:
            self._rebuilding.discard(key)
            decided(replace(last, images=made))

        try:
            with remains(self._shelf, finding, key, bytes.fromhex(self._secret)) as left:
                for rank in last.rebuild:
                    made[rank] = rebuild(self._shelf, left, key, rank)
        except (ResilientError, OSError) as error:
            self._say("persist", f"a lost node's part of the last state cannot be made again: {error}")
        finally:
            self._loop.post(end)

    def settled(self) -> None:
        """This node has written its part: wait until the others know theirs, for they need to hear of this one's."""

        def found(finding: Finding) -> None:
            self._loop.post(lambda: self._wait_or_end(finding))

        self._survey.ask(found)

    def _wait_or_end(self, finding: Finding) -> None:
        mine = self._last.key if self._last is not None else None
        if any(chosen is not None and chosen > (mine or Key(0, 0)) for chosen in finding.chosen.values()):
            # It became complete between their decision and this one.
            self._decide(finding, self._decided)
        elif None in finding.chosen.values() and self._clock.now() < self._deadline:
            timer = threading.Timer(_ASK_AGAIN, lambda: self._loop.post(self.settled))
            timer.daemon = True
            timer.start()
        else:
            self._loop.settled(mine)


def _kept(shelf: Shelf, finding: Finding, own: str) -> list[Kept]:
    """Every image in any keeper's memory."""
    found = [
        Kept(
            place=own,
            slot=image.slot,
            key=image.stamp.key,
            rank=image.stamp.rank,
            world=image.stamp.world,
            copied=bool(source_of(image.owner)),
        )
        for image in shelf.images()
    ]
    return found + [
        Kept(place=place, slot=i.slot, key=i.key, rank=i.rank, world=i.world, copied=i.replica)
        for place, images in finding.images.items()
        for i in images
    ]


def _parities(shelf: Shelf, finding: Finding, own: str) -> KeptParities:
    """Every parity in any keeper's memory."""
    everywhere = {**finding.parities, own: shelf.parities()}
    return {place: [(one.key, one.parity) for one in held] for place, held in everywhere.items()}
