"""Copy this node's images to other nodes, in the background: which states, the conductor says.

One thread looks at the board, reports to the conductor and puts its orders on the board; `keeper.copying` sends.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable

from resilient_train.errors import FormatError, LinkLost
from resilient_train.image.arena import Board
from resilient_train.keeper.copying import Copier, Errand
from resilient_train.keeper.shelf import Shelf, parity_owner, source_of
from resilient_train.plan.parity import groups
from resilient_train.plan.placement import place
from resilient_train.spec.messages import Peers
from resilient_train.spec.peers import Orders, Report, key_or_none
from resilient_train.spec.topology import Topology
from resilient_train.spec.world import Key, node_of, slot_of
from resilient_train.storage.wire import Wire, connect

logger = logging.getLogger(__name__)

_FASTEST, _SLOWEST, _SLOWER = 0.005, 0.1, 1.2
"""Seconds between two looks at the board: right after a change, at the most, and by what each is longer."""
_RETRY = 0.25
_TIMEOUT = 2.0
"""Seconds for another keeper to answer."""


class Replicator:
    """Follows the conductor from the first `follow` on."""

    def __init__(self, shelf: Shelf, board: Callable[[], Board], say: Callable[[str], None]) -> None:
        """Args:
        shelf: this node's images.
        board: its board.
        say: told what people should know; from any thread.
        """
        self._shelf = shelf
        self._board = board
        self._changed = threading.Condition()
        self._peers: Peers | None = None
        self._secret = b""
        self.saving = False
        """Whether a state is being made durable here; set by the keeper's loop."""
        self.kept: Key | None = None
        """The newest state of the present world that survives the loss of as many nodes as it has copies."""
        self._pending: Key | None = None
        self._done: Key | None = None
        self._missed: Key | None = None
        self._link: Wire | None = None
        self._interval = _FASTEST
        self._reported: Report | None = None
        self._copies: int | None = None
        self._most = 0
        """nodes of a parity group, at most; 0: there are copies"""
        self._targets: tuple[str, ...] = ()
        self._sources: frozenset[str] | None = None
        self._group: tuple[str, ...] = ()
        """where there are parities: the others of this node's group, in the order of its pieces"""
        self._copier = Copier(shelf, lambda: board().kept(), say, self._ended)
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def follow(self, peers: Peers, secret: bytes) -> None:
        """The keepers of the job, or the world, are these now."""
        with self._changed:
            first = self._peers is None
            self._peers, self._secret = peers, secret
            self._sources = None
            if first:
                threading.Thread(target=self._run, name="replicate", daemon=True).start()
                self._copier.start()
            self._changed.notify_all()
        self._wake()

    def keeps_for(self, node: str) -> bool:
        """Whether copies of a node of the world come here, or may: that is known when this node's ranks have said how
        many there are to be."""
        with self._changed:
            return self._sources is None or node in self._sources

    def folds(self, owner: str) -> bool:
        """Whether this node makes parities of that owner, or may."""
        with self._changed:
            return self._sources is None or (bool(self._group) and owner == parity_owner(self._group))

    def look(self) -> None:
        """From any thread: have a look at once."""
        if self._peers is not None:
            self._wake()

    # ---- following --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        current: Peers | None = None
        while True:
            with self._changed:
                while self._peers is current and not (current and takes_part(current)):
                    self._changed.wait()
                peers = self._peers
            assert peers is not None
            if peers is not current:
                self._begin(current, peers)
                current = peers
            if takes_part(peers):
                try:
                    self._round(peers)
                except (LinkLost, FormatError, OSError) as error:
                    if isinstance(error, OSError):
                        logger.warning("reports to the conductor are interrupted: %s", error)
                    self._hang_up()
                    time.sleep(_RETRY)

    def _begin(self, before: Peers | None, peers: Peers) -> None:
        """A new world decides anew what is copied; what is kept stays until it has something newer."""
        same_keepers = before is not None and before.keepers == peers.keepers
        if before is None or before.generation != peers.generation:
            # First of all, or it would say that a former state is copied.
            self._copier.give(None)
            with self._changed:
                self._pending = self._done = self._missed = self.kept = None
            self._board().protect(None, None if alone(peers) else self._board().kept())
        if not same_keepers:
            self._copier.give(None)
            self._hang_up()
            if self._group:
                # Pieces may have gone down with a keeper that had no complete parity yet.
                self._done = None
        with self._changed:
            self._copies, self._group = None, ()
            if self._peers is peers and not takes_part(peers):
                # Nothing comes here any more: what did goes with the next complete state.
                self._sources = frozenset()

    def _place(self, peers: Peers) -> None:
        """Find out where copies go and whose come here, once this world's ranks have said how many there are to be."""
        said = [self._board().copies(slot) for slot in peers.slots]
        wanted = [copies for copies in said if copies is not None]
        most = max((self._board().group(slot) for slot in peers.slots), default=0)
        if len(wanted) < len(said) or not wanted or (self._copies, self._most) == (max(wanted), most):
            return
        topology = Topology({node: peers.labels.get(node, []) for node, _ in peers.keepers})
        group = next((group for group in groups(topology, most) if peers.node in group), ()) if most else ()
        at = group.index(peers.node) if group else 0
        placed = place(topology, 0 if most else max(wanted))
        # Everybody begins with another one.
        others = group[at + 1 :] + group[:at]
        self._copies, self._most = max(wanted), most
        self._targets = tuple(
            endpoint for node in others or placed[peers.node] for name, endpoint in peers.keepers if name == node
        )
        with self._changed:
            if self._peers is peers:
                self._group = others
                self._sources = frozenset(node for node, targets in placed.items() if peers.node in targets)

    def _round(self, peers: Peers) -> None:
        if self._link is None:
            self._link = connect(peers.keepers[0][1], self._secret, _TIMEOUT)
            self._link.patience(_TIMEOUT)
            self._reported = None
        self._place(peers)
        report = self._report(peers)
        self._interval = _FASTEST if report != self._reported else min(_SLOWER * self._interval, _SLOWEST)
        if report != self._reported:
            self._link.offer(report)
            self._reported = report
        poller = select.poll()
        poller.register(self._link, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        for file, _ in poller.poll(self._interval * 1000):
            if file == self._woken:
                os.eventfd_read(self._woken)
            else:
                self._obey(self._link.expect(Orders), peers)

    def _wake(self) -> None:
        """Have the thread look at once; from any other."""
        os.eventfd_write(self._woken, 1)

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _obey(self, orders: Orders, peers: Peers) -> None:
        if orders.generation != peers.generation:
            return
        pending, kept, board = key_or_none(orders.pending), key_or_none(orders.kept), self._board()
        if self._copies:
            board.protect(pending, kept or board.kept())
        with self._changed:
            self._pending = pending
            self.kept = kept or self.kept
        if orders.persist_at and orders.persist_at != board.persist_at():
            board.ask_to_persist(orders.persist_at)

    def _report(self, peers: Peers) -> Report:
        """How far this node is; begins to copy the pending state once all images of it are there."""
        board = self._board()
        published = {slot: board.published(slot) for slot in peers.slots}
        progress = [board.progress(slot) for slot in peers.slots]
        steps = [step for generation, step in progress if generation == peers.generation]
        lineages = {key.lineage if key else 0 for key in published.values()}
        ready = len(steps) == len(peers.slots) > 0 and len(lineages) == 1 and self._copies is not None
        every = max((board.every(slot) for slot in peers.slots), default=1)
        if ready and self._pending not in (None, self._done, self._missed):
            self._attend(peers, published, min(steps), every)
        kept, done = board.kept(), self._done
        if self._group and done is not None and not self._has_parity(done):
            done = None
        with self._changed:
            return Report(
                node=peers.node,
                generation=peers.generation,
                lineage=lineages.pop() if ready else 0,
                slowest=min(steps) if ready else 0,
                furthest=max(steps) if ready else 0,
                published=min(key.step if key else 0 for key in published.values()) if ready else 0,
                every=every,
                done=list(done) if done else None,
                missed=list(self._missed) if self._missed else None,
                moved=self._copier.moved,
                kept=list(kept) if kept else None,
                saving=self.saving,
            )

    def _has_parity(self, key: Key) -> bool:
        """Whether the parity that this node makes is complete: only then its group can do without one of them."""
        owner = parity_owner(self._group)
        return any(of == key and self._shelf.owner(number) == owner for number, of in self._shelf.keys().items())

    def _attend(self, peers: Peers, published: dict[int, Key | None], slowest: int, every: int) -> None:
        pending, errand = self._pending, self._copier.errand
        if pending is None or (errand is not None and errand.key == pending):
            return
        images = {
            slot_of(image.owner): image
            for image in self._shelf.images()
            if image.stamp.key == pending and not source_of(image.owner) and node_of(image.owner) == peers.node
        }
        lacking = [slot for slot in peers.slots if slot not in images]
        if not lacking:
            self._copier.give(
                Errand(
                    key=pending,
                    images=tuple(images[slot] for slot in peers.slots),
                    node=peers.node,
                    targets=self._targets,
                    secret=self._secret,
                    rate=max(self._board().rate(slot) for slot in peers.slots),
                    group=self._group,
                )
            )
        elif slowest > pending.step + 2 * every or any((published[slot] or pending) > pending for slot in lacking):
            # It was named too late for them, or there was no slot for it.
            self._missed = pending

    def _ended(self, errand: Errand, done: bool) -> None:
        """The copier has everything where it belongs, or will not have it."""
        with self._changed:
            if self._copier.errand is errand and done:
                self._done = errand.key
            elif self._copier.errand is errand:
                self._missed = errand.key
        self._wake()


def takes_part(peers: Peers) -> bool:
    """Whether images of this node are copied to another."""
    return len(peers.keepers) > 1 and peers.node in [node for node, _ in peers.keepers]


def alone(peers: Peers) -> bool:
    """Whether all members of the world are on this node."""
    return [node for node, _ in peers.keepers] == [peers.node]
