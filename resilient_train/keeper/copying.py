"""Send the images of a state to the nodes that keep copies or parities of them: one thread, behind everything else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from resilient_train.errors import LinkLost, ResilientError
from resilient_train.image.native import checksum
from resilient_train.keeper.replicas import yield_to_others
from resilient_train.keeper.shelf import Listed, Shelf
from resilient_train.plan.pace import Pace
from resilient_train.plan.parity import cut
from resilient_train.spec.peers import Fold, Put
from resilient_train.spec.shard import BLOCK
from resilient_train.spec.world import Key, slot_of
from resilient_train.storage.peer import PUT_PIECE, PeerDeclined, put_bytes
from resilient_train.storage.wire import Wire, connect

_RETRY = 0.25
"""Seconds before a transfer that broke goes on."""
_TIMEOUT = 2.0
"""Seconds for another keeper to answer."""
_BREATH = 0.1
"""Seconds of the agreed bandwidth that are sent at once."""
_LEAST_PIECE = 64 << 10
_BROKEN = 8
"""Connections that may break in the middle of one state."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Errand:
    """A state to copy."""

    key: Key
    """Which."""
    images: tuple[Listed, ...]
    """This node's images of it."""
    node: str
    """This node."""
    targets: tuple[str, ...]
    """host:port of the keepers that are to have them."""
    secret: bytes
    """The job's."""
    rate: int
    """Bytes per second; 0 for as fast as possible."""
    group: tuple[str, ...] = ()
    """Where the images are folded into parities instead: the nodes of the targets, in their order."""


class Copier:
    """Carries out the last errand that it was given; a transfer that breaks goes on where it stopped."""

    def __init__(
        self,
        shelf: Shelf,
        kept: Callable[[], Key | None],
        say: Callable[[str], None],
        ended: Callable[[Errand, bool], None],
    ) -> None:
        """Args:
        shelf: this node's images.
        kept: the newest state that is copied everywhere, as far as this node knows.
        say: told what people should know; from any thread.
        ended: told, from the thread that sends, of an errand and whether everybody has all of it.
        """
        self._shelf = shelf
        self._kept = kept
        self._say = say
        self._ended = ended
        self._changed = threading.Condition()
        self._errand: Errand | None = None
        self._wires: dict[str, Wire] = {}
        self._pace = Pace(0.0)
        self._said: set[str] = set()
        self.moved = 0
        """Bytes sent so far."""

    def start(self) -> None:
        """Begin to take errands."""
        threading.Thread(target=self._run, name="copy", daemon=True).start()

    def give(self, errand: Errand | None) -> None:
        """Copy this now, and nothing that was asked for before; from any thread."""
        with self._changed:
            self._errand = errand
            self._changed.notify_all()

    @property
    def errand(self) -> Errand | None:
        """The last that was given."""
        return self._errand

    def _run(self) -> None:
        yield_to_others()
        before: Errand | None = None
        while True:
            with self._changed:
                while self._errand is None or self._errand is before:
                    self._changed.wait()
                errand = self._errand
            if before is None or errand.rate != before.rate:
                self._pace = Pace(float(errand.rate))
            self._ended(errand, self._carry_out(errand))
            before = errand

    def _carry_out(self, errand: Errand) -> bool:
        """Whether all targets have all images; False also if they are not wanted any more."""
        for gone in self._wires.keys() - set(errand.targets):
            self._hang_up(gone)
        done: set[str] = set()
        broken = 0
        while True:
            target = next((target for target in errand.targets if target not in done), None)
            if target is None:
                return True
            try:
                if target not in self._wires:
                    self._wires[target] = connect(target, errand.secret, _TIMEOUT)
                if not (self._fold if errand.group else self._copy)(errand, target):
                    return False
                done.add(target)
            except PeerDeclined as refusal:
                self._mention(f"{errand.key} is not copied to another node: {refusal}")
                return False
            except LinkLost as error:
                broken += target in self._wires
                self._hang_up(target)
                if self._errand is not errand:
                    return False
                if broken >= _BROKEN:
                    # One that nobody can reach is lost soon; this one is there, and may never get it whole.
                    self._mention(f"{errand.key} is not copied to another node: {error}")
                    return False
                time.sleep(_RETRY)
            except (ResilientError, OSError) as error:
                # This node lacks something, memory or files; whoever waits for the copy is to hear that.
                self._hang_up(target)
                self._mention(f"{errand.key} is not copied to another node: {error}")
                return False

    def _hang_up(self, target: str) -> None:
        if wire := self._wires.pop(target, None):
            wire.close()

    def _copy(self, errand: Errand, target: str) -> bool:
        """Have one keeper hold all images of a state; False if one was overwritten before."""
        with self._reading(errand) as views:
            for image, view in zip(errand.images, views, strict=False):
                kept = self._kept()
                request = Put(
                    source=f"{errand.node}/{slot_of(image.owner)}",
                    lineage=errand.key.lineage,
                    step=errand.key.step,
                    rank=image.stamp.rank,
                    world=image.stamp.world,
                    size=image.size,
                    keep=list(kept) if kept else None,
                )
                self._put(errand, target, request, [view])
            return bool(views)

    def _fold(self, errand: Errand, target: str) -> bool:
        """Have one keeper fold its piece of this node's images into its parity; False if one was overwritten before."""
        index = errand.targets.index(target)
        with self._reading(errand) as views:
            if not views:
                return False
            images = {image.stamp.rank: view for image, view in zip(errand.images, views, strict=True)}
            parts = cut([(rank, len(view)) for rank, view in images.items()], len(errand.targets))[index]
            data = [images[part.rank][part.begin : part.end] for part in parts]
            kept = self._kept()
            request = Fold(
                node=errand.node,
                lineage=errand.key.lineage,
                step=errand.key.step,
                world=errand.images[0].stamp.world,
                others=[node for node in (*errand.group, errand.node) if node != errand.group[index]],
                parts=[part.row() for part in parts],
                sums=[checksum(block) for block in _blocks(data)],
                keep=list(kept) if kept else None,
            )
            self._put(errand, target, request, data)
            for view in data:
                view.release()
        return True

    @contextmanager
    def _reading(self, errand: Errand) -> Iterator[list[memoryview]]:
        """The bytes of all images; none if one was overwritten before."""
        with ExitStack() as stack:
            views = [stack.enter_context(self._shelf.reading(image.slot, errand.key)) for image in errand.images]
            there = [view for view in views if view is not None]
            yield there if len(there) == len(views) else []

    def _put(self, errand: Errand, target: str, request: Put | Fold, data: Sequence[memoryview]) -> None:
        piece = max(_LEAST_PIECE, min(PUT_PIECE, int(errand.rate * _BREATH) or PUT_PIECE))
        put_bytes(self._wires[target], request, data, lambda nbytes: self._take_turn(errand, nbytes), piece)

    def _take_turn(self, errand: Errand, nbytes: int) -> None:
        delay = self._pace.delay(time.monotonic(), nbytes)
        with self._changed:
            if delay:
                self._changed.wait_for(lambda: self._errand is not errand, delay)
            if self._errand is not errand:
                raise LinkLost("the copy is not wanted any more")
        self.moved += nbytes

    def _mention(self, text: str) -> None:
        reason = text.partition(": ")[2]
        if reason not in self._said:
            self._said.add(reason)
            self._say(text)


def _blocks(views: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """Bytes that stand one behind the other, block by block."""
    rest = b""
    for view in views:
        first = min(len(view), BLOCK - len(rest) if rest else 0)
        rest += view[:first]
        if len(rest) == BLOCK:
            yield rest
            rest = b""
        if rest:
            continue
        whole = first + (len(view) - first) // BLOCK * BLOCK
        yield from (view[at : at + BLOCK] for at in range(first, whole, BLOCK))
        rest = bytes(view[whole:])
    if rest:
        yield rest
