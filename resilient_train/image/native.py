"""The native engine, or the same in Python where the extension is not built.

Both take addresses and sizes.  The Python versions are as exact and far slower; `tests/image/test_native.py` holds one
against the other.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from resilient_train.spec.shard import BLOCK

Words = npt.NDArray[np.uint32]


class Copier(Protocol):
    """Fills images of one layout in the background; see `csrc/copier.hpp`."""

    def start(self, image: int, all_now: bool = False) -> None:
        """Begin to fill the image at address ``image``; what is not lazy is copied when this returns."""
        ...

    def running(self) -> bool:
        """Whether a copy is running."""
        ...

    def wait(self) -> None:
        """Block until no copy is running; other Python threads go on."""
        ...

    def changed(self) -> list[int]:
        """Indices of the pieces, those copied at once left out, whose sources differ from what was copied."""
        ...


Rows = tuple[int, int, int, int]
"""(first byte in the blocks, size, stride, count): see `resilient_train.image.fetch.Rows`."""
PlacedRows = tuple[int, int, int, int, int, int]
"""The same, and (address of the first, bytes from one's address to the next's)."""
Piece = tuple[int, int, int, bool]
"""(byte of the image, address of the source or 0 if the bytes stand there already, size, copied at once)."""


class Upload(Protocol):
    """Copies to a device that are under way; see `csrc/upload.hpp`."""

    def wait(self) -> None:
        """Block until everything is on the device; other Python threads go on."""
        ...


class Device(Protocol):
    """A CUDA device; see `csrc/device.hpp`. Only the extension has it. Methods raise `CudaError`."""

    has_kernels: bool
    """Whether small pieces are packed, and fingerprints taken, by kernels."""
    why_no_kernels: str
    """Why not."""

    def lock(self, address: int, size: int) -> None:
        """Page-lock mapped memory; at once if it is locked already."""
        ...

    def unlock(self, address: int) -> None:
        """Undo `lock`, before the memory is unmapped."""
        ...

    def fingerprints(self, ranges: Sequence[tuple[int, int]], stream: int) -> list[int]:
        """64-bit sums of (address, size) there, as they are when ``stream`` gets there; waits. Needs kernels."""
        ...

    def upload(self, copies: Sequence[tuple[int, int, int]], stream: int, threads: int = 1) -> Upload:
        """Begin to copy (address on the device, address here, size), behind what ``stream`` has to do so far."""
        ...


class DeviceCopier(Copier, Protocol):
    """A copier some of whose pieces stand on a CUDA device. Methods raise `CudaError`."""

    def start(self, image: int, all_now: bool = False, stream: int = 0) -> None:
        """The same; pieces on the device are copied as they are when ``stream`` gets there."""
        ...

    def fence(self, stream: int) -> None:
        """Have what ``stream`` is given from now on wait until the sources are read; the host joins its own pieces."""
        ...


class Engine(Protocol):
    """What `csrc` exports."""

    def Copier(  # noqa: N802
        self, pieces: Sequence[Piece], data_start: int, table_start: int, threads: int = 1
    ) -> Copier:
        """A copier of ``pieces``, which follow each other from ``data_start`` to ``table_start``.

        The extension's takes two more arguments, a `Device` and the indices of the pieces on it, and is then a
        `DeviceCopier`.

        Raises:
            ValueError: if they do not.
        """
        ...

    def crc32c(self, data: int, size: int, crc: int = 0) -> int:
        """CRC32C of ``size`` bytes at address ``data``, continuing ``crc``."""
        ...

    def scatter(self, source: int, segments: Sequence[tuple[int, int]], sums: Sequence[int]) -> int:
        """Put consecutive blocks of an image where they belong, and verify them in the same pass.

        Args:
            source: address of the blocks' bytes; 0 if they stand at their targets already.
            segments: (address or 0 for what nobody wants, size) one after the other.
            sums: the CRC32C of every block.

        Returns:
            Index of the first block that fails its checksum, or -1.

        Raises:
            ValueError: if there are not as many checksums as the segments have blocks.
        """
        ...

    def scatter_file(self, handle: int, offset: int, segments: Sequence[tuple[int, int]], sums: Sequence[int]) -> int:
        """The same of blocks that stand in an open file, from byte ``offset`` on.

        Raises:
            ValueError: as above.
            EOFError: if the file ends before the blocks do.
            OSError: as the system says it.
        """
        ...

    def gather_rows(self, source: int, total: int, rows: Sequence[Rows], target: int) -> list[int]:
        """Copy rows of consecutive blocks one behind the other.

        Args:
            source: address of the blocks.
            total: their bytes.
            rows: in order and disjoint.
            target: where to copy them.

        Returns:
            What the gaps between the rows add to the CRC32C of every block: see `csrc/gather.hpp`.

        Raises:
            ValueError: if the rows are not in order within the blocks.
        """
        ...

    def scatter_rows(
        self, source: int, total: int, rows: Sequence[PlacedRows], gaps: Sequence[int], sums: Sequence[int]
    ) -> int:
        """Put what `gather_rows` copied where it belongs, and verify the blocks, gaps included.

        Args:
            source: address of the rows.
            total: bytes of the blocks.
            rows: the same, and where they belong.
            gaps: what `gather_rows` said.
            sums: the CRC32C of every block.

        Returns:
            Index of the first block that fails its checksum, or -1.

        Raises:
            ValueError: if the rows are not in order within the blocks, or there are not as many numbers as blocks.
        """
        ...

    def place_rows(self, source: int, total: int, rows: Sequence[PlacedRows], sums: Sequence[int]) -> int:
        """Put rows of blocks where they belong, and verify all bytes of the blocks in the same pass.

        Args:
            source: address of the blocks.
            total: their bytes.
            rows: in order and disjoint.
            sums: the CRC32C of every block.

        Returns:
            Index of the first block that fails its checksum, or -1.

        Raises:
            ValueError: if the rows are not in order within the blocks, or there are not as many numbers as blocks.
        """
        ...

    def place_file_rows(
        self, handle: int, offset: int, total: int, rows: Sequence[PlacedRows], sums: Sequence[int]
    ) -> int:
        """The same of blocks that stand in an open file, from byte ``offset`` on.

        Raises:
            ValueError: as above.
            EOFError: if the file ends before the blocks do.
            OSError: as the system says it.
        """
        ...

    def xor_into(self, target: int, source: int, size: int) -> None:
        """Replace ``size`` bytes at address ``target`` by their exclusive or with those at ``source``."""
        ...

    def publish(self, word: int, value: int) -> None:
        """Store a 64-bit word after everything written before."""
        ...

    def retract(self, word: int) -> None:
        """Store 0 before everything written after."""
        ...

    def observe(self, word: int) -> int:
        """Read a 64-bit word before everything read after."""
        ...


class PythonCopier:
    """The fallback: everything is copied and summed at once, nothing in the background."""

    def __init__(self, pieces: Sequence[Piece], data_start: int, table_start: int) -> None:
        at = data_start
        for index, (begin, _, size, _) in enumerate(pieces):
            if begin != at or size > table_start - at:
                raise ValueError(f"piece {index} does not follow the one before it")
            at += size
        if at != table_start:
            raise ValueError("the pieces end before the checksums begin")
        self._pieces = [piece for piece in pieces if piece[1] and piece[2]]
        self._indices = [index for index, piece in enumerate(pieces) if piece[1] and piece[2]]
        self._data, self._table = data_start, table_start
        self._image = 0

    def start(self, image: int, all_now: bool = False) -> None:
        del all_now
        self._image = image
        for at, source, size, _ in self._pieces:
            ctypes.memmove(image + at, source, size)
        sums = [_sum(image + at, min(BLOCK, self._table - at)) for at in range(self._data, self._table, BLOCK)]
        table = b"".join(value.to_bytes(4, "little") for value in sums)
        ctypes.memmove(image + self._table, table, len(table))

    def running(self) -> bool:
        return False

    def wait(self) -> None:
        pass

    def changed(self) -> list[int]:
        found = []
        for index, (at, source, size, now) in zip(self._indices, self._pieces, strict=True):
            if not now and ctypes.string_at(self._image + at, size) != ctypes.string_at(source, size):
                found.append(index)
        return found


def _sum(address: int, size: int, crc: int = 0) -> int:
    return crc32c_numpy(_bytes_at(address, size), crc)


def _bytes_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memoryview((ctypes.c_ubyte * size).from_address(address)), dtype=np.uint8)


def _read(handle: int, offset: int, size: int) -> npt.NDArray[np.uint8]:
    data, done = np.empty(size, dtype=np.uint8), 0
    while done < size:
        count = os.preadv(handle, [data[done:].data], offset + done)
        if count == 0:
            raise EOFError(f"{size - done} bytes asked for at its end, byte {offset + done}")
        done += count
    return data


def _blocks(data: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    return [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]


def _each(rows: Sequence[Rows | PlacedRows], total: int) -> list[slice]:
    """Where each row stands in its blocks."""
    parts = [
        slice(at + i * stride, at + i * stride + size) for at, size, stride, count, *_ in rows for i in range(count)
    ]
    ends = [0, *(part.stop for part in parts)]
    if any(end > part.start or part.start == part.stop for end, part in zip(ends, parts, strict=False)):
        raise ValueError("the rows are not in order within the blocks")
    if ends[-1] > total or not all(row[3] for row in rows):
        raise ValueError("the rows are not in order within the blocks")
    return parts


def _check_apart(rows: Sequence[PlacedRows]) -> None:
    if any(count > 1 and spread < size for _, size, _, count, _, spread in rows):
        raise ValueError("rows would be written on top of each other")


def _addresses(rows: Sequence[PlacedRows]) -> list[int]:
    """Where each row belongs."""
    return [address + i * spread for _, _, _, count, address, spread in rows for i in range(count)]


class PythonEngine:
    """The fallback: numpy for checksums, plain stores for publication (enough on x86, which keeps store order)."""

    def Copier(  # noqa: N802
        self, pieces: Sequence[Piece], data_start: int, table_start: int, threads: int = 1
    ) -> Copier:
        del threads
        return PythonCopier(pieces, data_start, table_start)

    def crc32c(self, data: int, size: int, crc: int = 0) -> int:
        return _sum(data, size, crc) if size else crc

    def scatter(self, source: int, segments: Sequence[tuple[int, int]], sums: Sequence[int]) -> int:
        if not source and any(size and not target for target, size in segments):
            raise ValueError("bytes that stand nowhere cannot be checked")
        if len(sums) != -(-sum(size for _, size in segments) // BLOCK):
            raise ValueError("the segments do not fill the blocks")
        at, crcs = 0, [0] * len(sums)
        for target, size in segments:
            if source and target:
                ctypes.memmove(target, source + at, size)
            done = 0
            while done < size:
                n = min(size - done, BLOCK - at % BLOCK)
                crcs[at // BLOCK] = _sum(source + at if source else target + done, n, crcs[at // BLOCK])
                done += n
                at += n
        return next((i for i, (found, known) in enumerate(zip(crcs, sums, strict=True)) if found != known), -1)

    def scatter_file(self, handle: int, offset: int, segments: Sequence[tuple[int, int]], sums: Sequence[int]) -> int:
        blocks = _read(handle, offset, sum(size for _, size in segments))
        return self.scatter(blocks.ctypes.data, segments, sums)

    def gather_rows(self, source: int, total: int, rows: Sequence[Rows], target: int) -> list[int]:
        blocks = _bytes_at(source, total).copy()
        for part in _each(rows, total):
            size = part.stop - part.start
            _bytes_at(target, size)[:] = blocks[part]
            blocks[part] = 0
            target += size
        return [crc32c_numpy(block, 0xFFFFFFFF) ^ 0xFFFFFFFF for block in _blocks(blocks)]

    def scatter_rows(
        self, source: int, total: int, rows: Sequence[PlacedRows], gaps: Sequence[int], sums: Sequence[int]
    ) -> int:
        _check_apart(rows)
        if not len(gaps) == len(sums) == -(-total // BLOCK):
            raise ValueError("the checksums are not those of the blocks")
        blocks = np.zeros(total, dtype=np.uint8)
        for part, target in zip(_each(rows, total), _addresses(rows), strict=True):
            size = part.stop - part.start
            blocks[part] = _bytes_at(source, size)
            _bytes_at(target, size)[:] = blocks[part]
            source += size
        found = [crc32c_numpy(block) ^ gap for block, gap in zip(_blocks(blocks), gaps, strict=True)]
        return next((i for i, pair in enumerate(zip(found, sums, strict=True)) if pair[0] != pair[1]), -1)

    def place_rows(self, source: int, total: int, rows: Sequence[PlacedRows], sums: Sequence[int]) -> int:
        _check_apart(rows)
        if len(sums) != -(-total // BLOCK):
            raise ValueError("the checksums are not those of the blocks")
        blocks = _bytes_at(source, total)
        for part, target in zip(_each(rows, total), _addresses(rows), strict=True):
            _bytes_at(target, part.stop - part.start)[:] = blocks[part]
        found = map(crc32c_numpy, _blocks(blocks))
        return next((i for i, pair in enumerate(zip(found, sums, strict=True)) if pair[0] != pair[1]), -1)

    def place_file_rows(
        self, handle: int, offset: int, total: int, rows: Sequence[PlacedRows], sums: Sequence[int]
    ) -> int:
        blocks = _read(handle, offset, total)
        return self.place_rows(blocks.ctypes.data, total, rows, sums)

    def xor_into(self, target: int, source: int, size: int) -> None:
        to = _bytes_at(target, size)
        np.bitwise_xor(to, _bytes_at(source, size), out=to)

    def publish(self, word: int, value: int) -> None:
        ctypes.c_uint64.from_address(word).value = value

    def retract(self, word: int) -> None:
        ctypes.c_uint64.from_address(word).value = 0

    def observe(self, word: int) -> int:
        return ctypes.c_uint64.from_address(word).value


_POLYNOMIAL = 0x82F63B78
_LANES = 1024


@functools.cache
def _table() -> Words:
    table: Words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = ((table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))).astype(np.uint32)
    return table


def _append_zeros(crc: Words, count: int) -> Words:
    """The registers ``crc`` after ``count`` further zero bytes, by squaring the one-byte operator."""
    columns = _zero_byte_operator()
    while count:
        if count & 1:
            crc = _apply(columns, crc)
        columns = _apply(columns, columns)
        count >>= 1
    return crc


def _zero_byte_operator() -> Words:
    basis = np.uint32(1) << np.arange(32, dtype=np.uint32)
    operator: Words = ((basis >> 8) ^ _table()[basis & 0xFF]).astype(np.uint32)
    return operator


def _apply(columns: Words, vectors: Words) -> Words:
    """A linear operator over GF(2), given by the images of the 32 basis vectors, applied to many vectors."""
    result = np.zeros_like(vectors)
    for bit in range(32):
        result ^= np.where(vectors >> np.uint32(bit) & 1, columns[bit], np.uint32(0)).astype(np.uint32)
    return result


def crc32c_numpy(data: npt.NDArray[np.uint8], crc: int = 0) -> int:
    """CRC32C by running 1,024 equal lanes side by side and joining their registers."""
    register = np.array([crc ^ 0xFFFFFFFF], dtype=np.uint32)
    length = len(data) // _LANES
    if length:
        lanes = data[: length * _LANES].reshape(_LANES, length)
        registers: Words = np.zeros(_LANES, dtype=np.uint32)
        registers[0] = register[0]
        for column in lanes.T:
            registers = (registers >> 8) ^ _table()[(registers ^ column) & 0xFF]
        # Lane i still has (_LANES - 1 - i) lanes of bytes behind it: fold pairs of neighbours until one is left.
        span = length
        while len(registers) > 1:
            registers = _append_zeros(registers[0::2], span) ^ registers[1::2]
            span *= 2
        register = registers
    value = int(register[0])
    for byte in data[length * _LANES :].tolist():
        value = (value >> 8) ^ int(_table()[(value ^ byte) & 0xFF])
    return value ^ 0xFFFFFFFF


def load() -> Engine:
    """The extension if it was built, else the fallback."""
    try:
        from resilient_train import _native
    except ImportError:
        return PythonEngine()
    return cast(Engine, _native)


engine: Engine = load()


class _NoCuda(RuntimeError):
    """What the fallback, which has no `Device`, never raises."""


CudaError: type[Exception] = getattr(engine, "CudaError", _NoCuda)
"""A call of the CUDA driver failed; the text names it and the error."""


def checksum(data: memoryview | bytes | bytearray, crc: int = 0) -> int:
    """CRC32C of a buffer, continuing ``crc``."""
    array = np.frombuffer(data, dtype=np.uint8)
    return engine.crc32c(array.ctypes.data, len(array), crc)
