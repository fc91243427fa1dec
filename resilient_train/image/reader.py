"""Read a shard image, verified: every byte handed out belongs to a block whose checksum matched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from resilient_train.errors import CheckpointDamaged, FormatError
from resilient_train.image.native import checksum
from resilient_train.image.snapshot import TORCH_DTYPES
from resilient_train.spec import jsontree
from resilient_train.spec.shard import BLOCK, Entry, header_size, parse_header

ReadRange = Callable[[int, int], "memoryview | bytes"]
"""(offset, length) -> exactly those bytes of the file, or an error."""


class ImageReader:
    """One image behind a function that reads byte ranges: shared memory, a file, an object."""

    def __init__(self, name: str, size: int, read: ReadRange, *, stable: bool = False) -> None:
        """Reads and checks the header.

        Args:
            name: what errors call the image, a path or ``memory of rank 2``.
            size: length of the image in bytes.
            read: how to get byte ranges.
            stable: whether two reads of a range give the same bytes, so that one check of a block is enough.

        Raises:
            CheckpointDamaged: if it is no image, or header or checksum table are damaged.
        """
        self.name = name
        self._read = read
        self._stable = stable
        try:
            header = read(0, min(size, header_size(read(0, min(size, 8)))))
            self.layout, self.stamp = parse_header(header, size)
            self.header_crc = checksum(header)
        except FormatError as error:
            raise CheckpointDamaged(f"{name}: {error}") from error
        table = bytes(read(self.layout.crc_start, 4 * self.layout.blocks))
        if checksum(table) != self.stamp.crc:
            raise CheckpointDamaged(f"{name}: the checksum table is damaged")
        self._sums = np.frombuffer(table, dtype="<u4")
        self._checked = np.zeros(self.layout.blocks, dtype=bool)
        self._starts = dict(zip(self.layout.entries, self.layout.starts, strict=True))

    def release(self) -> None:
        """Let go of the bytes behind the reader, so that mapped memory can be unmapped."""

        def gone(offset: int, length: int) -> bytes:
            raise CheckpointDamaged(f"{self.name}: read after it was closed ({length} bytes at {offset})")

        self._read = gone

    def entries(self) -> tuple[Entry, ...]:
        """What the image holds."""
        return self.layout.entries

    def tensor(self, entry: Entry) -> torch.Tensor:
        """One entry's elements in its stored dtype and shape; a read-only view where the bytes allow it.

        Raises:
            CheckpointDamaged: if a block it stands in fails its checksum.
        """
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointDamaged(f"{self.name}: {entry.name} has dtype {entry.dtype}, which torch lacks")
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        data = self._verified(self._starts[entry], entry.nbytes)
        array = np.frombuffer(data, dtype=np.uint8)
        if not array.flags.writeable or array.ctypes.data % dtype.itemsize:
            array = array.copy()
        return torch.from_numpy(array).view(dtype).view(entry.shape)

    def json(self) -> Any:
        """The non-tensor state as the JSON value it was stored as."""
        data = bytes(self._verified(self.layout.json_start, self.stamp.json_length))
        try:
            return jsontree.parse(data)
        except FormatError as error:
            raise CheckpointDamaged(f"{self.name}: non-tensor state: {error}") from error

    def _verified(self, start: int, size: int) -> memoryview | bytes:
        """Bytes of the data area, read in whole blocks, each checked once."""
        layout = self.layout
        first, last = (start - layout.data_start) // BLOCK, (start + size - 1 - layout.data_start) // BLOCK
        if size < 0 or start < layout.data_start or start + size > layout.crc_start:
            raise CheckpointDamaged(f"{self.name}: bytes {start} to {start + size} are outside of the data")
        if size == 0:
            return b""
        begin = layout.data_start + first * BLOCK
        end = min(layout.data_start + (last + 1) * BLOCK, layout.crc_start)
        data = memoryview(self._read(begin, end - begin))
        for block in range(first, last + 1):
            if self._stable and self._checked[block]:
                continue
            piece = data[(block - first) * BLOCK : (block - first + 1) * BLOCK]
            if checksum(piece) != self._sums[block]:
                raise CheckpointDamaged(f"{self.name}: block {block} (from byte {begin}) fails its checksum")
            self._checked[block] = True
        return data[start - begin : start - begin + size]


def memory_reader(name: str, view: memoryview) -> ImageReader:
    """A reader of an image in mapped memory; ``view`` must stay locked against its writer while it is used."""
    return ImageReader(name, len(view), lambda offset, length: view[offset : offset + length], stable=True)
