"""Restoring from storage by all ranks together: each byte of remote storage is read once and passed on.

What several ranks need goes over the job's process group: the manifest from rank 0; header and checksum table of the
first image, if it tells whose images a rank needs, and then of those that many need, else of all; then the blocks that
several want, as `plan.fanout` says.  Whoever gets blocks checks them against the table, which the manifest vouches for,
so that a rank that passes on something else is named, and what it should have been is read from storage.

Files of a disk, or of a file system that nodes share, are faster read than passed on: of those only the headers are, so
that a rank opens no more files than it reads.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch

from resilient_train.errors import CheckpointDamaged, ResilientError
from resilient_train.image.fetch import RUN, Range, Run, bounds, plan_runs, split, wanted_blocks
from resilient_train.image.reader import ImageReader
from resilient_train.plan.fanout import Piece, Span, shared_pieces
from resilient_train.plan.partition import PRIVATE
from resilient_train.plan.recovery import Holders
from resilient_train.spec.shard import BLOCK, ImageLayout, header_size
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import read_manifest
from resilient_train.storage.commit import ImageFile, Manifest, decode_part, encode_part, folder_of
from resilient_train.storage.tier import Tier
from resilient_train.worker.exchange import MOST_TEXT, Exchange, retold, told
from resilient_train.worker.images import LOOKING, Images, open_image, pool, read_image

logger = logging.getLogger(__name__)

AHEAD = 8
"""Pieces, of at most `RUN` blocks, that a rank reads before their turn; as many may be on their way to others."""
FEW_FILES = 16
"""Images on a disk that each rank opens for itself."""
FEW_READERS = 3
"""Ranks that each read the header of an image that no others want."""
_PREFIX = 64 << 10
"""Bytes read at once in which most headers fit."""
_END = 4
"""The blocks at the end of an image in which a rank's generators are looked for."""
_NOTE = 4 + MOST_TEXT
"""Bytes behind a piece that say why it is not what it should be; zero if it is."""


class KnownFile:
    """A file of a tier, of which some bytes are known already and not read again."""

    def __init__(self, tier: Tier, path: str) -> None:
        self._tier = tier
        self._path = path
        self._parts: list[tuple[int, memoryview]] = []

    def keep(self, offset: int, data: bytes) -> bytes:
        """From now on these bytes are known."""
        self._parts.append((offset, memoryview(data)))
        return data

    def load(self, offset: int, length: int) -> bytes:
        """Read bytes and keep them."""
        return self.keep(offset, bytes(self.read(offset, length)))

    def read(self, offset: int, length: int) -> memoryview | bytes:
        """Exactly these bytes; storage is asked for those before what is known.

        Raises:
            StorageError: if it does not give them.
        """
        end = offset + length
        ends = [(begin, data) for begin, data in self._parts if begin < end <= begin + len(data)]
        if not ends:
            return self._tier.read(self._path, offset, length)
        begin, data = min(ends, key=lambda part: part[0])
        if begin <= offset:
            return data[offset - begin : end - begin]
        return self._tier.read(self._path, offset, begin - offset) + data[: end - begin]


class SharedImages(Images):
    """The images of a checkpoint, opened and read by all ranks together."""

    def __init__(self, tier: Tier, manifest: Manifest, exchange: Exchange) -> None:
        """Called by all ranks.

        Raises:
            ResilientError: on all of them, if one of them cannot read what the others need.
        """
        held = Holders(world=manifest.world, ranks=range(manifest.world))
        super().__init__(held, self._opened, divided=manifest.divided)
        self._tier = tier
        self._manifest = manifest
        self._exchange = exchange
        self._passing = not tier.local
        """Whether what several want is read once and passed on."""
        self._awaited: bool = True
        """Whether the others wait to hear what this rank wants."""
        self._known: dict[int, tuple[int, list[tuple[int, bytes]]]] = {}
        """By rank, of its image the header and the checksum table: who told, from which byte on, and the bytes."""
        self._documents: dict[int, bytes] = {}
        """Those that others have read and verified."""
        if manifest.divided:
            # The first tells what there is, and then everybody knows whose he wants.
            self._hear([exchange.from_first(lambda: self._looked_after(manifest.files[:1]))])
        else:
            mine = manifest.files[exchange.rank :: exchange.size]
            self._hear(exchange.from_all(lambda: self._looked_after(mine)))
        self._awaited = self._passing or bool(manifest.divided)

    def prepare(self, ranks: Collection[int]) -> None:
        """The same; of images that many ranks are about to read one of them reads the header for all.

        Raises:
            ResilientError: on all ranks, if one of them cannot read what others need.
        """
        if self.divided:
            self._awaited = False
            mine = np.array(sorted(set(ranks) - self._readers.keys()), dtype="<i4").tobytes()
            wanting: dict[int, list[int]] = {}
            for rank, said in enumerate(self._exchange.from_all(lambda: mine)):
                for image in np.frombuffer(said, "<i4").tolist():
                    wanting.setdefault(image, []).append(rank)
            many = [(image, by) for image, by in sorted(wanting.items()) if len(by) > FEW_READERS]
            reader = {image: by[turn % len(by)] for turn, (image, by) in enumerate(many)}
            if many:
                files = [self._manifest.files[image] for image, by in reader.items() if by == self._exchange.rank]
                self._hear(self._exchange.from_all(lambda: self._looked_after(files)))
            self._awaited = self._passing
        super().prepare(ranks)

    def _hear(self, told: Iterable[bytes]) -> None:
        for rank, said in enumerate(told):
            for image, start, header, table, text in _unpacked(said):
                self._known[image] = rank, [(0, header), (start, table)]
                self._documents[image] = text

    def _looked_after(self, files: Sequence[ImageFile]) -> bytes:
        """What others need to know of the images that this rank opens for all."""
        with pool(LOOKING) as readers:
            opened = list(readers.map(self._looked_into, files))
        packed = b""
        for file, reader in zip(files, opened, strict=True):
            self._readers[file.rank] = reader
            # Where ranks do not hold alike, everybody needs all documents; else one tells of all, and one's own.
            text = reader.document() if file.rank == 0 or not reader.layout.alike else b""
            packed += _packed(file.rank, reader.layout.crc_start, reader.layout.header, reader.table(), text)
        return packed

    def _looked_into(self, file: ImageFile) -> ImageReader:
        path = f"{folder_of(self._manifest.key)}/{file.name}"
        size = self._tier.size(path)
        if size != file.size:
            raise CheckpointDamaged(f"{self._tier.name}/{path}: has {size} bytes, the manifest says {file.size}")
        known = KnownFile(self._tier, path)
        prefix = known.load(0, min(size, _PREFIX))
        if len(prefix) < header_size(prefix) <= size:
            known.keep(0, prefix + bytes(known.read(len(prefix), header_size(prefix) - len(prefix))))
        reader = read_image(self._tier, self._manifest, file, known.read)
        layout = reader.layout
        # Who reads another rank's image for all reads what that rank will want of it along.
        for_its_rank = self._manifest.world == self._exchange.size and file.rank in (
            (self._exchange.rank,) if self.divided else range(self._exchange.size)
        )
        if file.rank == 0 or for_its_rank or not layout.alike:
            begin, _ = bounds(_end(layout), 0, layout)
            known.load(begin, layout.crc_start - begin)
        return reader

    def document(self, rank: int) -> Any:
        text = self._documents.get(rank)
        return self.reader(rank).parsed(text) if text else super().document(rank)

    def _opened(self, rank: int) -> ImageReader:
        file = self._manifest.files[rank]
        if rank not in self._known:
            return self._looked_into(file)
        path = f"{folder_of(self._manifest.key)}/{file.name}"
        known = KnownFile(self._tier, path)
        teller, parts = self._known[rank]
        for offset, data in parts:
            known.keep(offset, data)
        try:
            return read_image(self._tier, self._manifest, file, known.read)
        except CheckpointDamaged as error:
            logger.warning("%s, as rank %d has passed it on; reading it", error, teller)
            return open_image(self._tier, self._manifest, file)

    def give_up(self, error: ResilientError) -> None:
        if not self._awaited:
            return
        self._awaited = False

        def fail() -> bytes:
            raise error

        self._exchange.from_all(fail)

    def bring(self, ranges: Mapping[int, Sequence[Range]], threads: int) -> None:
        """Read ranges of images to their addresses, verified; of remote ones what several ranks want is read once.

        Raises:
            CheckpointDamaged: if a block fails its checksum, wherever it was read.
            PeerFailed: if another rank could not read what this one needs.
        """
        if not self._passing:
            super().bring(ranges, threads)
            return
        layouts = {image: self.reader(image).layout for image in sorted(ranges)}
        spans = [(image, *row) for image, layout in layouts.items() for row in wanted_blocks(ranges[image], layout)]
        self._awaited = False
        said = self._exchange.from_all(lambda: np.array(spans, dtype="<i8").tobytes())
        requests = [[Span(*row) for row in np.frombuffer(data, "<i8").reshape(-1, 3).tolist()] for data in said]
        pieces = [piece for piece in shared_pieces(requests, RUN) if self._exchange.rank in piece.ranks]
        runs: dict[Span, list[Run]] = {}
        alone: list[Callable[[], None]] = []
        for image, layout in layouts.items():
            shared = sorted(piece.span for piece in pieces if piece.span.image == image)
            within, others = split(ranges[image], [bounds(span.first, span.last, layout) for span in shared])
            runs.update((span, plan_runs(part, layout)) for span, part in zip(shared, within, strict=True))
            alone += self.reader(image).fetching(others)
        with pool(threads) as readers, pool(AHEAD) as ahead:
            pending = [readers.submit(task) for task in alone]
            passing = _Passing(self, self._exchange, pieces, runs, ahead)
            pending += [readers.submit(task) for task in passing.run()]
            for done in pending:
                done.result()
        self._count(ranges)


class _Passing:
    """This rank's part in the passing on of pieces; each is used once."""

    def __init__(
        self,
        images: Images,
        exchange: Exchange,
        pieces: Sequence[Piece],
        runs: Mapping[Span, list[Run]],
        readers: Executor,
    ) -> None:
        """Args:
        images: what they are pieces of.
        exchange: to the other ranks.
        pieces: those that this rank wants, in the order of all.
        runs: where it wants their bytes.
        readers: threads for what it reads itself.
        """
        self._images = images
        self._exchange = exchange
        self._pieces = pieces
        self._runs = runs
        self._readers = readers
        self._own = iter([piece for piece in pieces if piece.reader == exchange.rank])
        self._read: deque[Future[torch.Tensor]] = deque()
        self._again: list[Callable[[], None]] = []
        self._failed: ResilientError | None = None

    def run(self) -> list[Callable[[], None]]:
        """Pass on everything; what is left to be read from storage, because somebody has passed on something else.

        All pieces go round even if some could not be read, because others wait for them.

        Raises:
            ResilientError: if this rank could not read one, or got one that another could not read.
        """
        for _ in range(AHEAD):
            self._begin()
        leaving: deque[Callable[[], object]] = deque()
        for piece in self._pieces:
            buffer = self._next(piece)
            behind = piece.behind(self._exchange.rank)
            if behind is not None:
                leaving.append(self._exchange.send(buffer, behind))
                if len(leaving) > AHEAD:
                    leaving.popleft()()
            if self._failed is None:
                self._take(piece, buffer)
        for finish in leaving:
            finish()
        if self._failed is not None:
            raise self._failed
        return self._again

    def _begin(self) -> None:
        piece = next(self._own, None)
        if piece is not None:
            self._read.append(self._readers.submit(self._fetched, piece))

    def _next(self, piece: Piece) -> torch.Tensor:
        """The bytes of a piece and the note on it, read or received."""
        before = piece.before(self._exchange.rank)
        if before is None:
            buffer = self._read.popleft().result()
            self._begin()
        else:
            buffer = self._empty(piece)
            self._exchange.receive(buffer, before)
        return buffer

    def _empty(self, piece: Piece) -> torch.Tensor:
        begin, end = bounds(piece.span.first, piece.span.last, self._images.reader(piece.span.image).layout)
        return torch.empty(end - begin + _NOTE, dtype=torch.uint8)

    def _fetched(self, piece: Piece) -> torch.Tensor:
        """Read a piece; if that fails, the note says so.  Where something failed, nothing further is read."""
        buffer = self._empty(piece)
        note = b""
        try:
            if self._failed is not None:
                raise self._failed
            size = len(buffer) - _NOTE
            run = Run(first=piece.span.first, last=piece.span.last, size=size, segments=[(buffer.data_ptr(), size)])
            self._images.reader(piece.span.image).fetch(run)
        except ResilientError as error:
            self._failed = self._failed or error
            note = told(error)
        buffer[-_NOTE:] = torch.frombuffer(bytearray(note.ljust(_NOTE, b"\0")), dtype=torch.uint8)
        return buffer

    def _take(self, piece: Piece, buffer: torch.Tensor) -> None:
        """Put the bytes where they are wanted, if they are what they should be."""
        note = buffer[-_NOTE:].numpy().tobytes().rstrip(b"\0")
        if note:
            self._failed = self._failed or retold(piece.reader, note)
            return
        reader, span = self._images.reader(piece.span.image), piece.span
        for run in self._runs[span]:
            if not reader.deliver(run, buffer.data_ptr() + (run.first - span.first) * BLOCK):
                before = piece.before(self._exchange.rank)
                logger.warning(
                    "%s: blocks %d to %d came damaged from rank %s, rank %d having read them; reading them anew",
                    *(reader.name, run.first, run.last, before, piece.reader),
                )
                self._again.append(lambda run=run: reader.fetch(run))  # type: ignore[misc]


def open_together(tier: Tier, key: Key, exchange: Exchange) -> Images:
    """The images of a checkpoint; called by all ranks.

    Raises:
        CheckpointDamaged: if it is not what was committed, on all of them.
        StorageError: where it cannot be read.
        PeerFailed: on the other ranks.
    """
    said = exchange.from_first(lambda: encode_part(read_manifest(tier, key)))
    manifest = decode_part(said, f"the manifest of {key} from rank 0")
    if exchange.rank == 0:
        say_differed(manifest)
    if tier.local and len(manifest.files) <= FEW_FILES:
        return Images.committed(tier, manifest)
    return SharedImages(tier, manifest, exchange)


def say_differed(manifest: Manifest) -> None:
    """Say so where a checkpoint's replicas are not one state."""
    if manifest.differed:
        logger.warning(
            "%s: its nodes held different values of what they should have held alike; where a rank does not find its"
            " own image, it takes the first one's",
            manifest.key,
        )


def _end(layout: ImageLayout) -> int:
    """From which block on an image is read at once: the document stands there, and generators, if they are near."""
    near = layout.data_start + (layout.blocks - _END) * BLOCK
    places = zip(layout.entries, layout.starts, strict=True)
    private = [start for entry, start in places if entry.name.startswith(PRIVATE) and start >= near]
    return (min([layout.json_start, *private]) - layout.data_start) // BLOCK


_NUMBERS = struct.Struct("<5Q")


def _packed(rank: int, start: int, header: bytes, table: bytes, text: bytes) -> bytes:
    return _NUMBERS.pack(rank, start, len(header), len(table), len(text)) + header + table + text


def _unpacked(data: bytes) -> Iterator[tuple[int, int, bytes, bytes, bytes]]:
    at = 0
    while at < len(data):
        rank, start, *lengths = _NUMBERS.unpack_from(data, at)
        at += _NUMBERS.size
        parts = []
        for length in lengths:
            parts.append(data[at : at + length])
            at += length
        yield rank, start, parts[0], parts[1], parts[2]
