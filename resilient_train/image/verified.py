"""A shard image as verified bytes: whatever is handed out belongs to a block whose checksum matched.  Without torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from resilient_train.errors import CheckpointDamaged, FormatError
from resilient_train.image.fetch import Range, Run, plan_runs
from resilient_train.image.native import PlacedRows, checksum, engine
from resilient_train.image.scratch import Scratch
from resilient_train.spec import jsontree
from resilient_train.spec.shard import BLOCK, Entry, header_size, parse_header
from resilient_train.spec.world import Key

ReadRange = Callable[[int, int], "memoryview | bytes"]
"""(offset, length) -> exactly those bytes of the file, or an error."""
ReadInto = Callable[[int, Sequence[memoryview]], None]
"""(offset, buffers): fills the buffers with the bytes from ``offset`` on, or an error."""
Handle = Callable[[], "AbstractContextManager[int | None]"]
"""Opens the file, if it is one of this machine's; errors of what is done with the handle are its place's."""
Row = tuple[int, int, int, int]
"""(first byte from an offset on, size, stride, count): see `resilient_train.image.fetch.Rows`."""
Gather = Callable[[int, int, Sequence[Row], memoryview], "list[int]"]
"""(offset, size, rows of these bytes, buffer): fills the buffer with the rows, one behind the other, and returns what
the other bytes add to the checksums of the blocks that begin at ``offset``; or an error."""
Elsewhere = Callable[[], bool]
"""After a block failed its checksum: whether there is another place to read from, which is used from then on."""

_SCRATCH = Scratch()


class VerifiedImage:
    """One image behind a function that reads byte ranges: shared memory, a file, an object."""

    def __init__(
        self,
        name: str,
        size: int,
        read: ReadRange,
        *,
        read_into: ReadInto | None = None,
        handle: Handle = nullcontext,
        gather: Gather | None = None,
        address: int = 0,
        elsewhere: Elsewhere = lambda: False,
        header_crc: int | None = None,
    ) -> None:
        """Reads and checks the header.

        Args:
            name: what errors call the image, a path or ``memory of rank 2``.
            size: length of the image in bytes.
            read: how to get byte ranges.
            read_into: the same, straight into buffers; default: by way of ``read``.
            handle: opens the file, which is then read straight to where its bytes belong.
            gather: how to get no more than rows of blocks, if that can be had and spares something.
            address: where the bytes stand, if they are mapped; two reads of a range then give the same bytes, so that
                one check of a block is enough.
            elsewhere: finds another holder of the same image.
            header_crc: what was committed, if it is known: a header that is another is not looked into.

        Raises:
            CheckpointDamaged: if it is no image, or header or checksum table are damaged.
        """
        self.name = name
        self._read = read
        self._read_into = read_into or self._copied
        self._handle = handle
        self._gather = gather
        self._address = address
        self._elsewhere = elsewhere
        try:
            header = read(0, min(size, header_size(read(0, min(size, 8)))))
            self.header_crc = checksum(header)
            if header_crc not in (None, self.header_crc):
                raise CheckpointDamaged(f"{name}: the header is not the one that was committed")
            self.layout, self.stamp = parse_header(header, size)
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
        self._read_into = self._copied
        self._handle = nullcontext
        self._gather = None
        self._elsewhere = lambda: False
        self._address = 0

    def follow(self, other: VerifiedImage) -> bool:
        """Read from where ``other`` reads, from now on; False if that is not the same image."""
        if other.layout != self.layout or not np.array_equal(other._sums, self._sums):
            return False
        self._read, self._read_into, self._gather = other._read, other._read_into, other._gather
        self._handle, self._elsewhere = other._handle, other._elsewhere
        self._address = 0
        return True

    def check(self, *, key: Key, rank: int, world: int, header_crc: int, table_crc: int) -> None:
        """Hold the image against what was committed.

        Raises:
            CheckpointDamaged: if it has another header, or is an image of another state or rank.
        """
        if (self.header_crc, self.stamp.crc) != (header_crc, table_crc):
            raise CheckpointDamaged(f"{self.name}: the header is not the one that was committed")
        if (self.stamp.key, self.stamp.rank, self.stamp.world) != (key, rank, world):
            raise CheckpointDamaged(f"{self.name}: is an image of another state or rank")

    def entries(self) -> tuple[Entry, ...]:
        """What the image holds."""
        return self.layout.entries

    def table(self) -> bytes:
        """The checksums of all blocks, as they stand in the image."""
        return self._sums.tobytes()

    def start(self, entry: Entry) -> int:
        """First byte of an entry, from the beginning of the image.

        Raises:
            CheckpointDamaged: if the image does not have it, exactly as described.
        """
        if entry not in self._starts:
            raise CheckpointDamaged(f"{self.name} does not hold {entry.box} of {entry.name}")
        return self._starts[entry]

    def data(self, entry: Entry, begin: int = 0, size: int | None = None) -> memoryview | bytes:
        """``size`` bytes (default: all) of an entry from its byte ``begin`` on.

        Raises:
            CheckpointDamaged: if a block they stand in fails its checksum.
        """
        return self._verified(self._starts[entry] + begin, entry.nbytes - begin if size is None else size)

    def fetching(self, ranges: Iterable[Range]) -> list[Callable[[], None]]:
        """What to do, in any order and side by side, for ranges of the image to be at their addresses.

        Every block is verified after its bytes have arrived: if one fails, its bytes stand at their addresses.  The
        memory at the addresses must stay until everything is done.

        Each raises:
            CheckpointDamaged: if a block fails its checksum.
        """
        runs = plan_runs(ranges, self.layout)
        return [functools.partial(self.fetch, run) for run in runs if run.rows]

    def fetch(self, run: Run) -> None:
        """Read a run to its addresses, verified.

        Raises:
            CheckpointDamaged: if a block fails its checksum.
        """
        bad = self._fetched(run)
        while bad >= 0 and self._elsewhere():
            bad = self._fetched(run)
        if bad >= 0:
            raise self._failed(run.first + bad)

    def deliver(self, run: Run, source: int, gaps: Sequence[int] | None = None) -> bool:
        """Put a run where it belongs; whether all blocks are sound.

        Args:
            run: which.
            source: address of its blocks, or of its rows alone, one behind the other.
            gaps: with rows alone, what the other bytes add to the blocks' checksums.
        """
        sums = self._sums[run.first : run.last + 1].tolist()
        if gaps is None:
            return self._placed(source, run, sums) < 0
        return engine.scatter_rows(source, run.size, _places(run), gaps, sums) < 0

    def mapped(self, offset: int) -> int:
        """Address of a byte of the image.

        Raises:
            CheckpointDamaged: if it is not in mapped memory.
        """
        if not self._address:
            raise CheckpointDamaged(f"{self.name} is not in this node's memory any more")
        return self._address + offset

    def _fetched(self, run: Run) -> int:
        begin = self.layout.data_start + run.first * BLOCK
        sums = self._sums[run.first : run.last + 1].tolist()
        if self._address:
            return self._placed(self._address + begin, run, sums)
        if self._gather is not None and run.sparse:
            return self._gathered(self._gather, run, begin, sums)
        with self._handle() as handle:
            if handle is not None and run.segments:
                return engine.scatter_file(handle, begin, run.segments, sums)
            if handle is not None:
                return engine.place_file_rows(handle, begin, run.size, _places(run), sums)
        return self._brought(run, begin, sums)

    def _brought(self, run: Run, begin: int, sums: list[int]) -> int:
        if not run.segments:
            with _SCRATCH.lend(run.size) as blocks:
                self._read_into(begin, [blocks.data])
                return self._placed(blocks.ctypes.data, run, sums)
        with _SCRATCH.lend(sum(size for address, size in run.segments if not address)) as nobodys:
            segments, at = [], nobodys.ctypes.data
            for address, size in run.segments:
                segments.append((address or at, size))
                at += 0 if address else size
            self._read_into(begin, [_buffer(*segment) for segment in segments])
            return engine.scatter(0, segments, sums)

    def _gathered(self, gather: Gather, run: Run, begin: int, sums: list[int]) -> int:
        rows = [(some.at, some.size, some.stride, some.count) for some in run.rows]
        with _SCRATCH.lend(run.wanted) as buffer:
            gaps = gather(begin, run.size, rows, buffer.data)
            return engine.scatter_rows(buffer.ctypes.data, run.size, _places(run), gaps, sums)

    def _placed(self, source: int, run: Run, sums: list[int]) -> int:
        if run.segments:
            return engine.scatter(source, run.segments, sums)
        return engine.place_rows(source, run.size, _places(run), sums)

    def _copied(self, offset: int, buffers: Sequence[memoryview]) -> None:
        data = memoryview(self._read(offset, sum(len(buffer) for buffer in buffers)))
        for buffer in buffers:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def _failed(self, block: int) -> CheckpointDamaged:
        at = self.layout.data_start + block * BLOCK
        return CheckpointDamaged(f"{self.name}: block {block} (from byte {at}) fails its checksum")

    def json(self) -> Any:
        """The non-tensor state as the JSON value it was stored as.

        Raises:
            CheckpointDamaged: if it fails its checksum or is no JSON.
        """
        return self.parsed(self.document())

    def document(self) -> bytes:
        """The non-tensor state as it is stored.

        Raises:
            CheckpointDamaged: if it fails its checksum.
        """
        return bytes(self._verified(self.layout.json_start, self.stamp.json_length))

    def parsed(self, document: bytes) -> Any:
        """The JSON value of what `document` gave.

        Raises:
            CheckpointDamaged: if it is no JSON.
        """
        try:
            return jsontree.parse(document)
        except FormatError as error:
            raise CheckpointDamaged(f"{self.name}: non-tensor state: {error}") from error

    def bad_blocks(self, first: int, last: int) -> list[int]:
        """Which of the blocks ``first`` to ``last`` (included) fail their checksums, read anew."""
        return self._failing(self._blocks(first, last), first, last)

    def padding(self) -> memoryview | bytes:
        """What stands behind the checksum table; no checksum covers it, and all of it is zero."""
        end = self.layout.crc_start + 4 * self.layout.blocks
        return self._read(end, self.layout.total - end)

    def _verified(self, start: int, size: int) -> memoryview | bytes:
        """Bytes of the data area, read in whole blocks, each checked once."""
        layout = self.layout
        first, last = (start - layout.data_start) // BLOCK, (start + size - 1 - layout.data_start) // BLOCK
        if size < 0 or start < layout.data_start or start + size > layout.crc_start:
            raise CheckpointDamaged(f"{self.name}: bytes {start} to {start + size} are outside of the data")
        if size == 0:
            return b""
        begin = layout.data_start + first * BLOCK
        if self._gather is not None:
            wanted = np.empty(size, dtype=np.uint8)
            for fetch in self.fetching([Range(start, size, wanted.ctypes.data)]):
                fetch()
            return wanted.data
        data = self._blocks(first, last)
        while bad := self._failing(data, first, last, known=self._address != 0):
            if not self._elsewhere():
                raise self._failed(bad[0])
            data = self._blocks(first, last)
        return data[start - begin : start - begin + size]

    def _blocks(self, first: int, last: int) -> memoryview:
        begin = self.layout.data_start + first * BLOCK
        end = min(self.layout.data_start + (last + 1) * BLOCK, self.layout.crc_start)
        return memoryview(self._read(begin, end - begin))

    def _failing(self, data: memoryview, first: int, last: int, *, known: bool = False) -> list[int]:
        """Blocks that fail; with ``known``, those that were found sound before are not summed again."""
        bad = []
        for block in range(first, last + 1):
            if known and self._checked[block]:
                continue
            piece = data[(block - first) * BLOCK : (block - first + 1) * BLOCK]
            self._checked[block] = sound = checksum(piece) == self._sums[block]
            if not sound:
                bad.append(block)
        return bad


def _places(run: Run) -> list[PlacedRows]:
    return [(some.at, some.size, some.stride, some.count, some.address, some.spread) for some in run.rows]


def _buffer(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
