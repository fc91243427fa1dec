"""Write a shard image: tensors and non-tensor state into a slot, in the background, published atomically.

The writer zeroes the slot's first eight bytes before it touches anything, copies, and stores them last.  Whoever finds
them zero finds no image; a process killed in between leaves no image.

Parts that are *lazy* are copied while the program goes on, because nobody changes them before the next optimizer step.
Nobody can be forced to keep to that, so it is checked: by the version counters of the tensors, which ordinary in-place
operations count up, and in an *audit* by the bytes themselves.  An audited image is copied at once, and its sources are
compared with it at the time when a lazy copy would have had to be finished.

Tensors on a CUDA device are read by the device itself, behind the work that it has been given at that time, and "at
once" means before its later work.  Nobody waits for it: a *fence* has the computing stream wait.  The writer holds on
to its sources, as torch's allocator gives freed memory to others without asking whether another stream still reads it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from resilient_train.errors import FormatError
from resilient_train.image.arena import Slot
from resilient_train.image.device import copying_threads, device_of, stream_of
from resilient_train.image.native import Copier, CudaError, Device, DeviceCopier, Piece, engine
from resilient_train.image.publish import publish
from resilient_train.spec.shard import Entry, ImageLayout, Stamp
from resilient_train.spec.world import Key

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""torch dtypes that safetensors has; others are stored as bytes with one more axis."""
TORCH_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One entry of an image and where its bytes come from."""

    entry: Entry
    """What it is."""
    sources: tuple[torch.Tensor, ...]
    """Local tensors, any device, any strides, whose elements one after the other are the entry's bytes."""
    watched: tuple[torch.Tensor, ...] = ()
    """Tensors whose version counters tell of changes to the sources."""
    lazy: bool = False
    """Whether the sources may be copied in the background."""
    fixed: bool = False
    """Whether later snapshots copy from the same addresses."""


def addressable(tensor: torch.Tensor, device: Device | None = None) -> bool:
    """Whether a tensor's bytes can be copied from where they stand: on the host, or on ``device``."""
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return False
    held = device_of(tensor)
    return held is device if held is not None else tensor.device.type == "cpu"


class ImageWriter:
    """Writes successive images of one layout into slots that it has exclusive use of, one at a time."""

    def __init__(self, layout: ImageLayout, parts: Sequence[Part], rank: int, world: int, threads: int = 1) -> None:
        """Args:
        layout: where everything stands.
        parts: what fills ``layout.entries``, in their order.
        rank: whose image it is.
        world: number of ranks.
        threads: native threads that copy.

        Raises:
            CudaError: if there are parts on a CUDA device and it refuses what copying them takes.
        """
        if [part.entry for part in parts] != list(layout.entries):
            raise FormatError("the parts are not the layout's")
        self.layout = layout
        self._rank = rank
        self._world = world
        self._slot: Slot | None = None
        self._stamp: Stamp | None = None
        self._audited = False
        self._torn_at_fence: list[str] | None = None
        self._device: Device | None = None
        """the device that some parts stand on; those on a second one are copied by torch"""
        self._example: torch.Tensor | None = None
        """one of them"""
        for source in (source for part in parts if part.fixed for source in part.sources):
            self._device = device_of(source)
            if self._device is not None:
                self._example = source
                break
        self._sources: list[torch.Tensor] = []
        """what is read without torch's knowledge"""
        pieces: list[Piece] = []
        remote: list[int] = []
        self._owners: list[int] = []
        """piece -> part"""
        self._placed: list[int] = []
        """parts that are copied by torch at every snapshot"""
        for index, (part, start) in enumerate(zip(parts, layout.starts, strict=True)):
            at = start
            direct = part.fixed and all(addressable(source, self._device) for source in part.sources)
            if direct:
                self._sources += part.sources
            else:
                self._placed.append(index)
            for source in part.sources:
                size = source.numel() * source.element_size()
                if direct and device_of(source) is not None:
                    remote.append(len(pieces))
                pieces.append((at, source.data_ptr() if direct else 0, size, not part.lazy))
                self._owners.append(index)
                at += size
            if at != start + part.entry.nbytes:
                raise FormatError(f"{part.entry.name}: its sources have {at - start} bytes, {part.entry.nbytes} belong")
        pieces.append((layout.json_start, 0, layout.json_capacity, True))
        self._names = [part.entry.name for part in parts]
        self._watched = [(i, tensor) for i, part in enumerate(parts) if part.lazy for tensor in part.watched]
        self._versions: list[int] = []
        bounds = (layout.data_start, layout.crc_start)
        if self._device is None:
            self._copier: Copier = engine.Copier(pieces, *bounds, threads)
        else:
            make = cast(Any, engine).Copier
            self._copier = make(pieces, *bounds, max(threads, copying_threads()), self._device, remote)

    @property
    def on_device(self) -> bool:
        """Whether a CUDA device copies some of the parts."""
        return self._device is not None

    def begin(self, slot: Slot, key: Key, parts: Sequence[Part], document: bytes, *, audit: bool = False) -> bool:
        """Begin to write one image; `conclude` must follow before the next.

        When this returns, everything but the lazy parts has been copied.

        Args:
            slot: of exactly ``layout.total`` bytes.
            key: the state's identity.
            parts: as at construction, with the present sources of those that are not fixed.
            document: non-tensor state, at most ``layout.json_capacity`` bytes.
            audit: copy everything at once, for `changed` to compare with later.

        Returns:
            False, with nothing touched, if somebody is reading the slot.

        Raises:
            FormatError: if the state does not fit the layout.
            CudaError: if the device refuses to copy.
        """
        layout = self.layout
        if len(document) > layout.json_capacity or slot.size != layout.total or self._slot is not None:
            raise FormatError("the state does not fit the image's layout")
        if not slot.try_lock(exclusive=True):
            return False
        try:
            engine.retract(slot.address)
            slot.map[8 : layout.data_start] = layout.header[8:]
            for index in self._placed:
                place(slot.map, layout.starts[index], parts[index].sources)
            slot.map[layout.json_start : layout.crc_start] = document.ljust(layout.json_capacity)
            self._versions = [tensor._version for _, tensor in self._watched]
            self._torn_at_fence = None
            if self._device is not None and self._example is not None:
                slot.lock_pages(self._device)
                cast(DeviceCopier, self._copier).start(slot.address, audit, stream_of(self._example))
            else:
                self._copier.start(slot.address, audit)
        except BaseException:
            slot.unlock()
            raise
        self._slot, self._audited = slot, audit
        self._stamp = Stamp(key=key, rank=self._rank, world=self._world, json_length=len(document), crc=0)
        return True

    def wait(self) -> None:
        """Block until the copy is complete; afterwards the sources may change.

        Raises:
            CudaError: if a device failed to copy; the image is not complete then.
        """
        self._copier.wait()

    def fence(self) -> None:
        """With parts on a CUDA device: they may be changed by what it is given from now on, others by anybody.

        The host waits only for the others.

        Raises:
            CudaError: if the device failed; nothing is read any more then.
        """
        if self._example is None:
            raise FormatError("there are no parts on a device")
        cast(DeviceCopier, self._copier).fence(stream_of(self._example))
        if self._torn_at_fence is None:
            # Later changes are as they should be, although the host may get there before the device has copied.
            self._torn_at_fence = [] if self._audited else self._torn()

    def conclude(self, *, drop: bool = False) -> list[str]:
        """Wait for the copy, then publish the image, or drop it if a source was changed meanwhile.

        Args:
            drop: drop it in any case.

        Returns:
            Names of the entries that were changed; with any, there is no image.

        Raises:
            CudaError: if a device failed to copy; there is no image then.
        """
        slot, stamp = self._slot, self._stamp
        if slot is None or stamp is None:
            raise FormatError("no image is being written")
        try:
            self._copier.wait()
        except CudaError:
            slot.unlock()
            self._slot = None
            raise
        torn = self._torn_at_fence
        if torn is None:
            torn = [] if self._audited else self._torn()
        if not torn and not drop:
            publish(slot, self.layout, stamp)
        slot.unlock()
        self._slot = None
        return torn

    def _torn(self) -> list[str]:
        pairs = zip(self._watched, self._versions, strict=True)
        return sorted({self._names[index] for (index, tensor), version in pairs if tensor._version != version})

    def changed(self) -> list[str]:
        """Names of the entries whose sources differ from the audited image that was written last."""
        return sorted({self._names[self._owners[piece]] for piece in self._copier.changed()})


def place(memory: mmap.mmap | memoryview, start: int, sources: Sequence[torch.Tensor]) -> None:
    """Have torch copy the elements of ``sources``, one after the other, to byte ``start`` of writable memory."""
    at = start
    for source in sources:
        count = source.numel()
        if count and at % source.element_size():
            # What is stored as bytes may stand anywhere, and torch relies on the alignment of its elements.
            data = source.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
            torch.frombuffer(memory, dtype=torch.uint8, count=len(data), offset=at).copy_(data)
        elif count:
            target = torch.frombuffer(memory, dtype=source.dtype, count=count, offset=at)
            target.view(source.shape).copy_(source)
        at += count * source.element_size()
