"""Make images durable in the background: the same bytes, written once per job, manifest last."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from resilient_train.errors import CheckpointDamaged, OutsideError, ResilientError, StorageError
from resilient_train.image.arena import Slot
from resilient_train.image.native import checksum, engine
from resilient_train.image.verified import VerifiedImage
from resilient_train.keeper.alike import of_each_rank
from resilient_train.keeper.progress import Progress
from resilient_train.plan.partition import assign
from resilient_train.plan.retention import superseded
from resilient_train.spec.shard import BLOCK, Entry, ImageLayout, Stamp, parse_header, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import commit, listing, read_manifest, sorted_keys
from resilient_train.storage.commit import ImageFile, folder_of, image_name
from resilient_train.storage.filesystem import open_tier
from resilient_train.storage.tier import Tier

logger = logging.getLogger(__name__)

_CHUNK = 8 << 20
_AT_ONCE = 8
"""Files that are written at the same time."""
_OTHERS = 20.0
"""Seconds that other nodes may take longer than four times as long as this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A state to persist."""

    key: Key
    """Which."""
    world: int
    """Of how many ranks."""
    images: Mapping[int, Slot]
    """The images of this node's ranks, locked against their writers by the caller."""
    past: Mapping[int, int | None]
    """The job's ancestry."""
    url: str
    """Where to."""
    keep_last: int
    """How many checkpoints to keep there."""
    progress: Progress
    """Counts, and keeps to the agreed pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a `Job`."""

    job: Job
    """The job."""
    error: str
    """Why it failed; empty if the checkpoint is committed."""
    seconds: float
    """How long it took."""
    nbytes: int
    """Bytes written."""


class Persister:
    """One background thread; jobs one after the other."""

    def __init__(self, done: Callable[[Outcome], None]) -> None:
        """Args:
        done: called from the thread with each outcome.
        """
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done = done
        self._thread = threading.Thread(target=self._run, name="persist", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Persist ``job`` after those before it."""
        self._queue.put(job)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            began = time.monotonic()
            written, error = 0, ""
            try:
                written = persist(open_tier(job.url), job)
            except ResilientError as failure:
                error = str(failure)
            except Exception as failure:  # Whatever it is, it must not end the thread that later states depend on.
                error = f"{type(failure).__name__}: {failure}"
            seconds = time.monotonic() - began
            self._done(Outcome(job=job, error=error, seconds=seconds, nbytes=written))


def persist(tier: Tier, job: Job) -> int:
    """Write a job's images, its part, the manifest if it is complete, and remove what is superseded.

    Where other nodes have images of the state too, this waits until one of them has committed it.

    Returns:
        Bytes written.

    Raises:
        UnsupportedState: if ranks hold different values of what is to be saved once.
        OutsideError: if the checkpoint could not be committed.
    """
    began = time.monotonic()
    folders = tier.folders()
    committed, unfinished = sorted_keys(folders)
    newer = [key for key in committed + unfinished if key.lineage > job.key.lineage]
    if newer:
        raise StorageError(f"{tier.name}: another job writes to the same location: it holds {newer[-1]}")
    headers = {rank: _header(slot, job.key) for rank, slot in job.images.items()}
    own = of_each_rank({rank: (job.images[rank], *header) for rank, header in headers.items()})
    shares = assign({rank: layout.entries for rank, (layout, _) in headers.items()}, own)
    outgoing = [_outgoing(slot, *headers[rank], shares[rank]) for rank, slot in job.images.items()]
    files = [image.file for image in outgoing]
    if job.key in committed:
        _check_same(tier, job.key, files)
        return 0
    there = folders.get(folder_of(job.key), set())
    left = [image for image in outgoing if image.file.name not in there or not _is_there(tier, job.key, image.file)]
    job.progress.expect(sum(image.file.size for image in left))
    try:
        with ThreadPoolExecutor(_AT_ONCE, "persist") as pool:
            paths = [f"{folder_of(job.key)}/{image.file.name}" for image in left]
            list(pool.map(tier.put, paths, [job.progress.paced(image.chunks) for image in left]))
    except BaseException:
        # Without this node's part it will never be complete; what is there only takes the room of the next one.  Where
        # other nodes may be writing to the folder it is left to the next checkpoint that is complete.
        if len(job.images) == job.world:
            with contextlib.suppress(OutsideError):
                tier.delete(folder_of(job.key))
        raise
    # From here on another keeper may have committed what is there, so nothing of it is removed.
    if commit(tier, job.key, job.world, files, job.past):
        _remove_superseded(tier, job.keep_last)
    else:
        _await_others(tier, job, _OTHERS + 3 * (time.monotonic() - began))
    return sum(image.file.size for image in left)


def _await_others(tier: Tier, job: Job, seconds: float) -> None:
    """Wait until the keeper that put the last part has committed the checkpoint."""
    delay, deadline = 0.05, time.monotonic() + seconds
    while True:
        committed, _ = listing(tier)
        if committed and committed[-1] >= job.key:
            return
        if time.monotonic() >= deadline:
            raise StorageError(
                f"{tier.name}/{folder_of(job.key)}: the images of {len(job.images)} of {job.world} ranks are written;"
                f" those of the others were not within {seconds:.0f} s"
            )
        time.sleep(delay)
        delay = min(2 * delay, 2.0)


def _is_there(tier: Tier, key: Key, file: ImageFile) -> bool:
    """Whether a keeper that died had written the file: whole, as files become visible, and of this very content."""
    path = f"{folder_of(key)}/{file.name}"
    try:
        image = VerifiedImage(path, tier.size(path), functools.partial(tier.read, path))
    except CheckpointDamaged:
        return False
    return (image.layout.total, image.header_crc, image.stamp.crc) == (file.size, file.header_crc, file.table_crc)


def _remove_superseded(tier: Tier, keep_last: int) -> None:
    """What cannot be removed costs room; what was just written is durable all the same."""
    try:
        for key in superseded(*listing(tier), keep_last):
            tier.delete(folder_of(key))
    except OutsideError as error:
        logger.warning("superseded checkpoints are left behind: %s", error)


def _check_same(tier: Tier, key: Key, files: Sequence[ImageFile]) -> None:
    """A keeper that died after it had committed was ours; any other content is another job's."""
    there = {file.rank: file for file in read_manifest(tier, key).files}
    if any(there.get(file.rank) != file for file in files):
        raise StorageError(f"{tier.name}/{folder_of(key)} is committed already, by another job at the same location")


def _header(slot: Slot, key: Key) -> tuple[ImageLayout, Stamp]:
    stamp = slot.stamp()
    if stamp is None or stamp.key != key:
        raise OutsideError(f"the image of {key} was overwritten before it was persisted")
    length = 8 + int.from_bytes(slot.map[:8], "little")
    return parse_header(slot.map[:length], slot.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outgoing:
    """One image on its way."""

    file: ImageFile
    chunks: Iterable[memoryview]


def _outgoing(slot: Slot, layout: ImageLayout, stamp: Stamp, share: Sequence[Entry]) -> _Outgoing:
    view = memoryview(slot.map)
    chunks: Iterable[memoryview]
    if len(share) == len(layout.entries):
        size, table_crc = layout.total, stamp.crc
        header_crc = engine.crc32c(slot.address, layout.data_start)
        chunks = [view[at : at + _CHUNK] for at in range(0, layout.total, _CHUNK)]
    else:
        chunks = partial = _PartialImage(view, layout, stamp, share)
        size, header_crc, table_crc = partial.size, partial.header_crc, partial.table_crc
    name = image_name(stamp.rank, stamp.world)
    file = ImageFile(name=name, rank=stamp.rank, size=size, header_crc=header_crc, table_crc=table_crc)
    return _Outgoing(file=file, chunks=chunks)


class _PartialImage:
    """The bytes of an image that holds a share of another image's entries: new header and checksums, same data."""

    def __init__(self, view: memoryview, layout: ImageLayout, stamp: Stamp, share: Sequence[Entry]) -> None:
        self._view = view
        starts = dict(zip(layout.entries, layout.starts, strict=True))
        self._layout = plan_image(share, stamp.json_length)
        ranges = [(starts[entry], entry.nbytes) for entry in self._layout.entries]
        ranges.append((layout.json_start, stamp.json_length))
        padding = b" " * (self._layout.json_capacity - stamp.json_length)
        self._data = [view[at : at + size] for at, size in ranges if size] + [memoryview(padding)]
        table = self._table()
        self.table_crc = checksum(table)
        header = bytearray(self._layout.header)
        fields = Stamp(
            key=stamp.key, rank=stamp.rank, world=stamp.world, json_length=stamp.json_length, crc=self.table_crc
        ).fields()
        for at, value in fields:
            header[at : at + len(value)] = value
        self.header_crc = checksum(header)
        self.size = self._layout.total
        tail = self._layout.total - self._layout.crc_start - len(table)
        self._pieces = [memoryview(header), *self._data, memoryview(table), memoryview(bytes(tail))]

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self._pieces:
            for at in range(0, len(piece), _CHUNK):
                yield piece[at : at + _CHUNK]

    def _table(self) -> bytes:
        sums, crc, filled = [], 0, 0
        for piece in self._data:
            at = 0
            while at < len(piece):
                n = min(BLOCK - filled, len(piece) - at)
                crc = checksum(piece[at : at + n], crc)
                at += n
                filled += n
                if filled == BLOCK:
                    sums.append(crc)
                    crc, filled = 0, 0
        if filled:
            sums.append(crc)
        return b"".join(value.to_bytes(4, "little") for value in sums)
