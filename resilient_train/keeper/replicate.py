"""Copy this node's images to the next node, in the background: which states, the conductor says.

Two threads.  One looks at the board, reports to the conductor and puts its orders on the board; the other sends.
"""

from __future__ import annotations

import functools
import select
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from resilient_train.errors import FormatError, LinkLost
from resilient_train.image.arena import Board
from resilient_train.keeper.replicas import yield_to_others
from resilient_train.keeper.shelf import Listed, Shelf, source_of
from resilient_train.spec.messages import Peers
from resilient_train.spec.peers import Orders, Put, Report, key_or_none
from resilient_train.spec.world import Key, node_of, slot_of
from resilient_train.storage.peer import PeerDeclined, put_copy
from resilient_train.storage.wire import Wire, connect

_FASTEST, _SLOWEST = 0.02, 0.1
"""Seconds between two looks at the board: while something changes, and when nothing does."""
_RETRY = 0.25
_TIMEOUT = 2.0
"""Seconds for another keeper to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errand:
    """A state to copy."""

    key: Key
    images: tuple[Listed, ...]
    endpoint: str
    peers: Peers


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
        self._say = say
        self._changed = threading.Condition()
        self._peers: Peers | None = None
        self._secret = b""
        self.saving = False
        """Whether a state is being made durable here; set by the keeper's loop."""
        self.kept: Key | None = None
        """The newest state of the present world that survives the loss of any one node."""
        self._pending: Key | None = None
        self._done: Key | None = None
        self._missed: Key | None = None
        self._moved = 0
        self._errand: _Errand | None = None
        self._link: Wire | None = None
        self._interval = _FASTEST
        self._reported: Report | None = None
        self._said: set[str] = set()

    def follow(self, peers: Peers, secret: bytes) -> None:
        """The keepers of the job, or the world, are these now."""
        with self._changed:
            first = self._peers is None
            self._peers, self._secret = peers, secret
            if first:
                for target, name in ((self._run, "replicate"), (self._run_errands, "copy")):
                    threading.Thread(target=target, name=name, daemon=True).start()
            self._changed.notify_all()

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
                except (LinkLost, FormatError):
                    self._hang_up()
                    time.sleep(_RETRY)

    def _begin(self, before: Peers | None, peers: Peers) -> None:
        """A new world decides anew what is copied; what is kept stays until it has something newer."""
        same_keepers = before is not None and before.keepers == peers.keepers
        if before is None or before.generation != peers.generation:
            with self._changed:
                self._pending = self._done = self._missed = self.kept = self._errand = None
            self._board().protect(None, None if alone(peers) else self._board().kept())
        if not same_keepers:
            with self._changed:
                self._errand = None
            self._hang_up()

    def _round(self, peers: Peers) -> None:
        if self._link is None:
            self._link = connect(peers.keepers[0][1], self._secret, _TIMEOUT)
            self._link.patience(_TIMEOUT)
            self._reported = None
        report = self._report(peers)
        self._interval = _FASTEST if report != self._reported else min(1.5 * self._interval, _SLOWEST)
        if report != self._reported:
            self._link.offer(report)
            self._reported = report
        poller = select.poll()
        poller.register(self._link, select.POLLIN)
        if poller.poll(self._interval * 1000):
            self._obey(self._link.expect(Orders), peers)
        else:
            return
        # Orders come in answer to what somebody reports; there is no need to look again at once.
        time.sleep(_FASTEST / 2)

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _obey(self, orders: Orders, peers: Peers) -> None:
        if orders.generation != peers.generation:
            return
        pending, kept, board = key_or_none(orders.pending), key_or_none(orders.kept), self._board()
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
        ready = len(steps) == len(peers.slots) > 0 and len(lineages) == 1
        every = max((board.every(slot) for slot in peers.slots), default=1)
        if ready and self._pending not in (None, self._done, self._missed):
            self._attend(peers, published, min(steps), every)
        kept = board.kept()
        with self._changed:
            return Report(
                node=peers.node,
                generation=peers.generation,
                lineage=lineages.pop() if ready else 0,
                slowest=min(steps) if ready else 0,
                furthest=max(steps) if ready else 0,
                every=every,
                done=list(self._done) if self._done else None,
                missed=list(self._missed) if self._missed else None,
                moved=self._moved,
                kept=list(kept) if kept else None,
                saving=self.saving,
            )

    def _attend(self, peers: Peers, published: dict[int, Key | None], slowest: int, every: int) -> None:
        pending = self._pending
        if pending is None or (self._errand is not None and self._errand.key == pending):
            return
        images = {
            slot_of(image.owner): image
            for image in self._shelf.images()
            if image.stamp.key == pending and not source_of(image.owner) and node_of(image.owner) == peers.node
        }
        lacking = [slot for slot in peers.slots if slot not in images]
        if not lacking:
            with self._changed:
                chosen = tuple(images[slot] for slot in peers.slots)
                self._errand = _Errand(key=pending, images=chosen, endpoint=_next(peers), peers=peers)
                self._changed.notify_all()
        elif slowest > pending.step + 2 * every or any((published[slot] or pending) > pending for slot in lacking):
            # It was named too late for them, or there was no slot for it.
            self._missed = pending

    # ---- copying ----------------------------------------------------------------------------------------------------

    def _run_errands(self) -> None:
        yield_to_others()
        finished: _Errand | None = None
        wire: Wire | None = None
        connected = ""
        while True:
            with self._changed:
                while self._errand is None or self._errand is finished:
                    self._changed.wait()
                errand = self._errand
            try:
                if wire is None or connected != errand.endpoint:
                    if wire is not None:
                        wire.close()
                    wire, connected = connect(errand.endpoint, self._secret, _TIMEOUT), errand.endpoint
                done = self._copy(errand, wire)
            except PeerDeclined as refusal:
                self._mention(f"{errand.key} is not copied to another node: {refusal}")
                done = False
            except LinkLost:
                if wire is not None:
                    wire.close()
                wire = None
                if self._current(errand):
                    time.sleep(_RETRY)
                    continue
                done = False
            with self._changed:
                finished = errand
                if self._errand is errand:
                    self._done = errand.key if done else self._done
                    self._missed = self._missed if done else errand.key

    def _current(self, errand: _Errand) -> bool:
        """Whether the state is still wanted there."""
        with self._changed:
            return self._errand is errand and self._pending == errand.key

    def _copy(self, errand: _Errand, wire: Wire) -> bool:
        """Copy all images of a state; False if one was overwritten before."""
        with ExitStack() as stack:
            views = [stack.enter_context(self._shelf.reading(image.slot, errand.key)) for image in errand.images]
            for image, view in zip(errand.images, views, strict=True):
                if view is None:
                    return False
                kept = self._board().kept()
                request = Put(
                    source=f"{errand.peers.node}/{slot_of(image.owner)}",
                    lineage=errand.key.lineage,
                    step=errand.key.step,
                    rank=image.stamp.rank,
                    world=image.stamp.world,
                    size=image.size,
                    keep=list(kept) if kept else None,
                )
                put_copy(wire, request, view, functools.partial(self._count, errand))
        return True

    def _count(self, errand: _Errand, nbytes: int) -> None:
        with self._changed:
            self._moved += nbytes
        if not self._current(errand):
            raise LinkLost("the copy is not wanted any more")

    def _mention(self, text: str) -> None:
        reason = text.partition(": ")[2]
        if reason not in self._said:
            self._said.add(reason)
            self._say(text)


def takes_part(peers: Peers) -> bool:
    """Whether images of this node are copied to another."""
    return len(peers.keepers) > 1 and peers.node in [node for node, _ in peers.keepers]


def alone(peers: Peers) -> bool:
    """Whether all members of the world are on this node."""
    return [node for node, _ in peers.keepers] == [peers.node]


def _next(peers: Peers) -> str:
    """Where the node's copies go."""
    nodes = [node for node, _ in peers.keepers]
    return peers.keepers[(nodes.index(peers.node) + 1) % len(nodes)][1]


def previous(peers: Peers) -> str:
    """The node whose copies come here."""
    nodes = [node for node, _ in peers.keepers]
    return nodes[nodes.index(peers.node) - 1]
