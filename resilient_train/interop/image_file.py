"""Write one shard image to durable storage straight from tensors, without holding the image in memory.

The header stands first and holds the checksum of the checksums, which stand last.  So the tensors are read twice: once
for the sums, and once to be written, when the sums are computed again: what was changed in between is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import numpy as np
import numpy.typing as npt
import torch

from resilient_train.errors import OutsideError, UnsupportedState
from resilient_train.image.native import checksum
from resilient_train.image.snapshot import DTYPES
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import BLOCK, Entry, Stamp, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing
from resilient_train.storage.commit import ImageFile, folder_of, image_name
from resilient_train.storage.tier import Tier

_CHUNK = 8 << 20
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

Load = Callable[[], torch.Tensor]
"""Gives a tensor's elements, the same at every call."""
Written = Callable[[int], None]
"""Hears how many further bytes were read or written."""


def _unheard(count: int) -> None:
    del count


def entry_of(name: str, dtype: torch.dtype, box: Box, shape: tuple[int, ...]) -> Entry:
    """How a box of a tensor stands in an image: dtypes that safetensors lacks as bytes with one more axis."""
    stored = DTYPES.get(dtype)
    if stored is not None:
        return Entry(name=name, dtype=stored, shape=box.shape, global_shape=shape, offset=box.offset)
    width = dtype.itemsize
    return Entry(
        name=name,
        dtype="U8",
        shape=(*box.shape, width),
        global_shape=(*shape, width),
        offset=(*box.offset, 0),
        real_dtype=str(dtype).removeprefix("torch."),
    )


def next_key(tier: Tier, step: int) -> Key:
    """A key for a state of another library: of a lineage that nothing at the place was computed by."""
    committed, unfinished = listing(tier)
    return Key(max((key.lineage for key in committed + unfinished), default=0) + 1, step)


@contextmanager
def or_nothing(tier: Tier, key: Key) -> Iterator[None]:
    """After an error the checkpoint will never be complete; what is there only takes the room of the next one."""
    try:
        yield
    except BaseException:
        with suppress(OutsideError):
            tier.delete(folder_of(key))
        raise


class ImageSource:
    """The bytes of an image, to be read as often as needed."""

    def __init__(
        self, key: Key, rank: int, world: int, loads: Mapping[Entry, Load], document: bytes, written: Written = _unheard
    ) -> None:
        """Reads every tensor once, for the checksums.

        Args:
            key: the state's identity.
            rank: whose image it is.
            world: number of ranks.
            loads: what gives the elements of each entry.
            document: non-tensor state.
            written: hears of progress, which passes over every byte of a tensor twice.

        Raises:
            FormatError: if names collide.
            UnsupportedState: naming a tensor that is no plain one or has another shape or dtype than was planned.
        """
        self._layout = plan_image(list(loads), len(document))
        self._loads = loads
        self._document = document.ljust(self._layout.json_capacity)
        self._written = written
        self._sums = _block_sums(self._pieces())
        table = b"".join(value.to_bytes(4, "little") for value in self._sums)
        header = bytearray(self._layout.header)
        crc = checksum(table)
        stamp = Stamp(key=key, rank=rank, world=world, json_length=len(document), crc=crc)
        for at, value in stamp.fields():
            header[at : at + len(value)] = value
        self._header = bytes(header)
        self._tail = table + bytes(self._layout.total - self._layout.crc_start - len(table))
        self.file = ImageFile(
            name=image_name(rank, world),
            rank=rank,
            size=self._layout.total,
            header_crc=checksum(self._header),
            table_crc=crc,
        )
        """The image's line in the manifest."""
        self._path = f"{folder_of(key)}/{self.file.name}"

    def put(self, tier: Tier) -> ImageFile:
        """Write the image.

        Raises:
            StorageError: if it could not be written.
            UnsupportedState: if a tensor was changed meanwhile; nothing is visible then.
        """
        tier.put(self._path, self, self.file.size)
        return self.file

    def __iter__(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        sums = _Sums()
        for piece in self._pieces():
            sums.add(piece)
            yield piece.data
        if sums.finished() != self._sums:
            raise UnsupportedState(f"{self._path}: the tensors were changed while they were being saved")
        yield memoryview(self._tail)

    def _pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        for entry in self._layout.entries:
            data = _bytes_of(entry, self._loads[entry]())
            for at in range(0, len(data), _CHUNK):
                piece = data[at : at + _CHUNK]
                yield piece
                self._written(len(piece))
        yield np.frombuffer(self._document, dtype=np.uint8)


def _bytes_of(entry: Entry, tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A tensor's elements in order, from wherever they stand."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        kind = type(tensor).__name__
        raise UnsupportedState(f"{entry.name} is a {kind} with layout {tensor.layout}, which a checkpoint cannot hold")
    dtype = DTYPES.get(tensor.dtype, "U8")
    shape = tuple(tensor.shape) if tensor.dtype in DTYPES else (*tensor.shape, tensor.element_size())
    if (dtype, shape) != (entry.dtype, entry.shape):
        raise UnsupportedState(f"{entry.name} has {dtype} {list(shape)}, {entry.dtype} {list(entry.shape)} was planned")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: npt.NDArray[np.uint8] = flat.numpy()
    return array


class _Sums:
    """CRC32C of each block of a stream."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._crc = self._filled = 0

    def add(self, piece: npt.NDArray[np.uint8]) -> None:
        """The next bytes."""
        at = 0
        while at < len(piece):
            count = min(BLOCK - self._filled, len(piece) - at)
            self._crc = checksum(piece[at : at + count].data, self._crc)
            at += count
            self._filled += count
            if self._filled == BLOCK:
                self._sums.append(self._crc)
                self._crc = self._filled = 0

    def finished(self) -> list[int]:
        """The sums, once everything was added."""
        return [*self._sums, self._crc] if self._filled else self._sums


def _block_sums(pieces: Iterator[npt.NDArray[np.uint8]]) -> list[int]:
    sums = _Sums()
    for piece in pieces:
        sums.add(piece)
    return sums.finished()
