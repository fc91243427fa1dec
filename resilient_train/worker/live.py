"""The state of a step boundary that got no snapshot, for as long as the training's own tensors still hold it.

Theory of operation.  Between two optimizer steps parameters and optimizer state are what they were at the boundary.  So
it is enough to put aside what anything may change meanwhile: buffers, random generators, options, documents, small
tensors, and whatever was found not to keep to the rule.  When the world ends before the next optimizer step begins, the
image of that boundary is made of both.

Never of anything else: whoever begins an optimizer step has it forgotten first.  Version counters, objects, addresses
and shapes must be what they were; at a boundary objects and the parameters' addresses are looked at, the others when
the image is made.  Writes that none of these shows (``parameter.data.copy_()`` in a forward) are found by audits, those
of snapshots and those of some of these boundaries, whose sums are compared before an optimizer steps; what is found is
put aside from then on.

Only for tensors on the host.  What stands on a device may not have been computed when the world ends, and it cannot be
told whether what was computed then is of any worth.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from resilient_train.image.arena import Slot
from resilient_train.image.native import engine
from resilient_train.image.snapshot import ImageWriter, Part, addressable, place
from resilient_train.spec.shard import BLOCK, ImageLayout
from resilient_train.spec.world import Key
from resilient_train.worker.capture import Known

MOST_ASIDE = 16 << 20
"""Bytes that may be put aside at every boundary: they take a few milliseconds."""

_version = operator.attrgetter("_version")


class LiveState:
    """What was put aside at the last boundary, for images of one layout."""

    def __init__(
        self, layout: ImageLayout, parts: Sequence[Part], order: Sequence[int], known: Known, rank: int, world: int
    ) -> None:
        """Args:
        layout: the image's.
        parts: what fills ``layout.entries``, in their order; the lazy ones stay where they are.
        order: the numbers of these parts in a `Frame`.
        known: where they were found.
        rank: whose image it would be.
        world: number of ranks.
        """
        self.layout = layout
        self.key: Key | None = None
        """The state that the live tensors still hold as far as is known."""
        self._known = known
        self._rank = rank
        self._world = world
        self._parts = list(parts)
        self._document = b""
        self._versions: list[int] = []
        self._sums: list[int] = []
        lazy = [part for part in parts if part.lazy]
        self._summed = [
            (part.entry.name, source, source.data_ptr(), part.entry.nbytes)
            for part in lazy
            for source in part.sources
            if addressable(source)
        ]
        # A plain tensor and what was made of it by detach() have one counter.
        self._watched = [t for part in lazy for t in part.watched[: 2 if isinstance(part.watched[0], DTensor) else 1]]
        self._aside = [(index, part) for index, part in enumerate(parts) if not part.lazy]
        total = sum(part.entry.nbytes for _, part in self._aside)
        self._memory = np.zeros(total + 4 * -(-total // BLOCK), dtype=np.uint8)
        self._starts: dict[int, int] = {}
        self._placed: list[tuple[int, int]] = []
        """what torch copies: (number in a frame, where to)"""
        pieces = []
        at = 0
        for index, part in self._aside:
            self._starts[index] = at
            direct = part.fixed and all(addressable(source) for source in part.sources)
            if not direct:
                self._placed.append((order[index], at))
            for source in part.sources:
                size = source.numel() * source.element_size()
                pieces.append((at, source.data_ptr() if direct else 0, size, True))
                at += size
        self._copier = engine.Copier(pieces, 0, total)
        # Its threads go on for a moment after `keep`, and the memory must not go before them.
        weakref.finalize(self, self._copier.wait)

    @staticmethod
    def why_not(parts: Sequence[Part], known: Known) -> str:
        """Why nothing can, or should, be put aside of such a state; empty if it can."""
        if not known.capture.fixed:
            return "it has to be looked through at every step"
        if any(source.device.type != "cpu" for part in parts for source in part.sources):
            return "it stands on a device"
        total = sum(part.entry.nbytes for part in parts if not part.lazy)
        return f"{total:,} bytes of it may change outside of optimizer steps" if total > MOST_ASIDE else ""

    def keep(self, key: Key, parts: Sequence[Part], document: bytes, *, audit: bool) -> None:
        """Put aside what may change before the next optimizer step.

        Args:
            key: the state's identity.
            parts: a frame's.
            document: non-tensor state.
            audit: sum up what is not to change, for `changed`.
        """
        self.key = None
        self._copier.wait()
        self._copier.start(self._memory.ctypes.data)
        for number, at in self._placed:
            place(self._memory.data, at, parts[number].sources)
        self._document = document
        self._versions = list(map(_version, self._watched))
        self._sums = self._sum() if audit else []
        self.key = key

    def forget(self) -> None:
        """The live tensors are about to become another state's, or there is an image of it."""
        self.key = None

    def changed(self) -> list[str]:
        """Names of the entries that changed since the boundary although nobody may; empty if it was not audited."""
        if not self._sums:
            return []
        pairs = zip(self._summed, self._sums, self._sum(), strict=True)
        return sorted({name for (name, *_), before, now in pairs if before != now})

    def _sum(self) -> list[int]:
        # Whose memory has been taken away has no sum.
        return [engine.crc32c(at, size) if source.data_ptr() == at else -1 for _, source, at, size in self._summed]

    def is_clean(self) -> bool:
        """Whether nothing tells of a change since the boundary."""
        same = list(map(_version, self._watched)) == self._versions and self._known.in_place()
        return same and not self.changed()

    def write(self, slot: Slot) -> bool:
        """Make the image in ``slot``; False, and there is none, if somebody reads it or something has changed."""
        key = self.key
        if key is None or not self.is_clean():
            return False
        self._copier.wait()
        parts = list(self._parts)
        for index, part in self._aside:
            at = self._starts[index]
            saved = torch.from_numpy(self._memory[at : at + part.entry.nbytes])
            parts[index] = Part(entry=part.entry, sources=(saved,), fixed=True)
        writer = ImageWriter(self.layout, parts, self._rank, self._world)
        if not writer.begin(slot, key, parts, self._document):
            return False
        writer.wait()
        return not writer.conclude(drop=not self.is_clean())
