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

A CUDA device gets to the boundary behind its host, and copies what is put aside when it does.  Only if that copy had
arrived before the world's collectives were aborted was the boundary's state computed: what is computed behind an abort
means nothing.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from resilient_train.image.arena import Slot
from resilient_train.image.device import copying_threads, device_of, stream_of
from resilient_train.image.native import Copier, CudaError, Device, DeviceCopier, Piece, engine
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
        self._abandoned = False
        self._arrived: Key | None = None
        """the state that was computed when the collectives were aborted"""
        sources = [source for part in parts for source in part.sources]
        self._example = next((source for source in sources if device_of(source) is not None), None)
        """a tensor on the device, if there is one"""
        self._device = None if self._example is None else device_of(self._example)
        lazy = [part for part in parts if part.lazy]
        self._summed = [
            (part.entry.name, source, source.data_ptr(), part.entry.nbytes)
            for part in lazy
            for source in part.sources
            if _is_dense(source, self._device)
        ]
        self._on_device = [device_of(source) is not None for _, source, *_ in self._summed]
        # A plain tensor and what was made of it by detach() have one counter.
        self._watched = [t for part in lazy for t in part.watched[: 2 if isinstance(part.watched[0], DTensor) else 1]]
        self._aside = [(index, part) for index, part in enumerate(parts) if not part.lazy]
        self._starts: dict[int, int] = {}
        self._placed: list[tuple[int, int]] = []
        """what torch copies: (number in a frame, where to)"""
        pieces: list[Piece] = []
        remote: list[int] = []
        at = 0
        for index, part in self._aside:
            self._starts[index] = at
            direct = part.fixed and all(addressable(source, self._device) for source in part.sources)
            if not direct:
                self._placed.append((order[index], at))
            for source in part.sources:
                size = source.numel() * source.element_size()
                if direct and device_of(source) is not None:
                    remote.append(len(pieces))
                pieces.append((at, source.data_ptr() if direct else 0, size, True))
                at += size
        if self._example is not None and not remote:
            # Something has to tell how far the device is.
            remote.append(len(pieces))
            pieces.append((at, self._example.data_ptr(), self._example.element_size(), True))
            at += self._example.element_size()
        self._memory = np.zeros(at + 4 * -(-at // BLOCK), dtype=np.uint8)
        if self._device is None:
            self._copier: Copier = engine.Copier(pieces, 0, at)
        else:
            self._copier = cast(Any, engine).Copier(pieces, 0, at, copying_threads(), self._device, remote)
        # Its threads go on for a moment after `keep`, and the memory must not go before them.
        weakref.finalize(self, _let_go, self._copier, self._memory).atexit = False

    @staticmethod
    def why_not(parts: Sequence[Part], known: Known) -> str:
        """Why nothing can, or should, be put aside of such a state; empty if it can."""
        if not known.capture.fixed:
            return "it has to be looked through at every step"
        sources = [source for part in parts for source in part.sources]
        held = {id(device): device for device in map(device_of, sources) if device is not None}
        if len(held) > 1 or any(source.device.type != "cpu" and device_of(source) is None for source in sources):
            return "torch copies a part of it from a device"
        if any(not device.has_kernels for device in held.values()):
            return "it stands on a device for which the engine has no kernels, so changes could not be found"
        total = sum(part.entry.nbytes for part in parts if not part.lazy)
        return f"{total:,} bytes of it may change outside of optimizer steps" if total > MOST_ASIDE else ""

    def keep(self, key: Key, parts: Sequence[Part], document: bytes, *, audit: bool) -> None:
        """Put aside what may change before the next optimizer step.

        Args:
            key: the state's identity.
            parts: a frame's.
            document: non-tensor state.
            audit: sum up what is not to change, for `changed`.

        Raises:
            CudaError: if the device refuses.
        """
        self.key = None
        self._copier.wait()
        if self._example is None:
            self._copier.start(self._memory.ctypes.data)
        else:
            cast(DeviceCopier, self._copier).start(self._memory.ctypes.data, False, stream_of(self._example))
        for number, at in self._placed:
            place(self._memory.data, at, parts[number].sources)
        self._document = document
        self._versions = list(map(_version, self._watched))
        self._sums = self._sum() if audit else []
        self.key = key

    def abandon(self) -> None:
        """Collectives are to be aborted: what a device has not computed yet is no state. From any thread, at once."""
        key = self.key
        self._abandoned = True
        self._arrived = None if self._copier.running() else key

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
        ranges = [(at, size if source.data_ptr() == at else 0) for _, source, at, size in self._summed]
        found = [
            -1 if remote or source.data_ptr() != at else engine.crc32c(at, size)
            for (_, source, at, size), remote in zip(self._summed, self._on_device, strict=True)
        ]
        if self._device is not None and self._example is not None and any(self._on_device):
            where = [index for index, remote in enumerate(self._on_device) if remote]
            prints = self._device.fingerprints([ranges[index] for index in where], stream_of(self._example))
            for index, value in zip(where, prints, strict=True):
                found[index] = value
        return found

    def is_clean(self) -> bool:
        """Whether nothing tells of a change since the boundary.

        Raises:
            CudaError: if the device does not tell.
        """
        if self._abandoned and self._example is not None and self._arrived != self.key:
            return False
        same = list(map(_version, self._watched)) == self._versions and self._known.in_place()
        return same and not self.changed()

    def write(self, slot: Slot) -> bool:
        """Make the image in ``slot``; False, and there is none, if somebody reads it or something has changed.

        Raises:
            CudaError: if a device fails to copy; there is no image then.
        """
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
        clean = False
        try:
            writer.wait()
            clean = self.is_clean()
        finally:
            torn = writer.conclude(drop=not clean)
        return clean and not torn


def _is_dense(source: torch.Tensor, device: Device | None) -> bool:
    """Whether its elements are the bytes from its address on, in any order (``channels_last``)."""
    dims = sorted(range(source.dim()), key=source.stride, reverse=True)
    return addressable(source.permute(dims), device)


def _let_go(copier: Copier, memory: np.ndarray[Any, Any]) -> None:
    with contextlib.suppress(CudaError):
        copier.wait()
    del memory
