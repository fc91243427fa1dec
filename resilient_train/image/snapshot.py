"""Write a shard image: tensors and non-tensor state into a slot, published atomically.

The writer zeroes the slot's first eight bytes before it touches anything, copies, and stores them last.  Whoever finds
them zero finds no image; a process killed in between leaves no image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resilient_train.errors import FormatError
from resilient_train.image.arena import Slot
from resilient_train.image.native import engine
from resilient_train.spec.shard import BLOCK, ImageLayout, Stamp
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


class SlotWriter:
    """Writes successive images of one layout into slots that it has exclusive use of."""

    def __init__(self, layout: ImageLayout, rank: int, world: int) -> None:
        self.layout = layout
        self._rank = rank
        self._world = world

    def write(self, slot: Slot, key: Key, tensors: Sequence[torch.Tensor], json_bytes: bytes) -> bool:
        """Write and publish one image.

        Args:
            slot: at least ``layout.total`` bytes.
            key: the state's identity.
            tensors: the stored parts in the order of ``layout.entries``; any device, any strides.
            json_bytes: non-tensor state, at most ``layout.json_capacity`` bytes.

        Returns:
            False, with nothing touched, if somebody is reading the slot.

        Raises:
            FormatError: if the tensors or the JSON do not fit the layout.
        """
        layout = self.layout
        if len(json_bytes) > layout.json_capacity or slot.size != layout.total or len(tensors) != len(layout.entries):
            raise FormatError("the state does not fit the image's layout")
        if not slot.try_lock(exclusive=True):
            return False
        try:
            engine.retract(slot.address)
            slot.map[8 : layout.data_start] = layout.header[8:]
            sums = _BlockSums(slot, layout)
            for start, tensor in zip(layout.starts, tensors, strict=True):
                sums.copy(start, tensor)
            padded = json_bytes.ljust(layout.json_capacity)
            slot.map[layout.json_start : layout.crc_start] = padded
            sums.add(layout.json_start, layout.json_capacity)
            table = b"".join(value.to_bytes(4, "little") for value in sums.finish())
            slot.map[layout.crc_start : layout.crc_start + len(table)] = table
            crc = engine.crc32c(slot.address + layout.crc_start, len(table))
            stamp = Stamp(key=key, rank=self._rank, world=self._world, json_length=len(json_bytes), crc=crc)
            for at, value in stamp.fields():
                slot.map[at : at + len(value)] = value
            engine.publish(slot.address, layout.data_start - 8)
        finally:
            slot.unlock()
        return True


class _BlockSums:
    """Checksums of consecutive 1 MiB blocks, fed in file order."""

    def __init__(self, slot: Slot, layout: ImageLayout) -> None:
        self._slot = slot
        self._start = layout.data_start
        self._at = layout.data_start
        self._crc = 0
        self._sums: list[int] = []

    def copy(self, start: int, tensor: torch.Tensor) -> None:
        """Copy a tensor's elements to ``start`` and sum them."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            self._feed(start, size, tensor.data_ptr())
            return
        if size:
            target = torch.frombuffer(self._slot.map, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            target.view(tensor.shape).copy_(tensor)
        self.add(start, size)

    def add(self, start: int, size: int) -> None:
        """Sum bytes that already stand in the slot."""
        self._feed(start, size, None)

    def _feed(self, start: int, size: int, source: int | None) -> None:
        if start != self._at:
            raise FormatError(f"image data out of order: expected byte {self._at}, got {start}")
        done = 0
        while done < size:
            room = BLOCK - (self._at - self._start) % BLOCK
            n = min(room, size - done)
            target = self._slot.address + self._at
            if source is None:
                self._crc = engine.crc32c(target, n, self._crc)
            else:
                self._crc = engine.copy_crc32c(target, source + done, n, self._crc)
            self._at += n
            done += n
            if n == room:
                self._sums.append(self._crc)
                self._crc = 0

    def finish(self) -> list[int]:
        """All sums, the last block's included."""
        if (self._at - self._start) % BLOCK:
            self._sums.append(self._crc)
        return self._sums
