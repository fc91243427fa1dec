"""Make images durable in the background: the same bytes, written once per job, manifest last."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from resilient_train.errors import CheckpointDamaged, OutsideError, StorageError
from resilient_train.image.arena import Slot
from resilient_train.image.native import checksum, engine
from resilient_train.image.verified import VerifiedImage
from resilient_train.keeper.progress import Progress
from resilient_train.keeper.shares import Shares, shares_of
from resilient_train.keeper.word import Word
from resilient_train.plan.division import Part
from resilient_train.plan.retention import superseded
from resilient_train.spec.shard import BLOCK, Entry, ImageLayout, Stamp, parse_header, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import commit, complete, put_part, read_manifest, sorted_keys, with_begun
from resilient_train.storage.commit import ImageFile, Manifest, folder_of, image_name
from resilient_train.storage.tier import Tier

logger = logging.getLogger(__name__)

_CHUNK = 8 << 20
_AT_ONCE = 8
"""Files that are written at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A state to persist."""

    key: Key
    """Which."""
    world: int
    """Of how many ranks."""
    images: Mapping[int, Slot]
    """The images of this node's ranks, locked against their writers by the caller."""
    origins: Mapping[int, str]
    """rank -> the node whose image it is, which may be another that is lost."""
    past: Mapping[int, int | None]
    """The job's ancestry."""
    url: str
    """Where to."""
    keep_last: int
    """How many checkpoints to keep there."""
    progress: Progress
    """Counts, and keeps to the agreed pace."""
    word: Word = field(default_factory=Word)
    """Whether this world is the job's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `persist` has done."""

    part: Manifest
    """What this node has written of the checkpoint."""
    committed: bool
    """Whether the checkpoint is complete; if not, other nodes have images of the state too."""
    nbytes: int
    """Bytes written."""


def persist(tier: Tier, job: Job, *, divide: bool = True) -> Written:
    """Write a job's images, its part, the manifest if it is complete, and remove what is superseded.

    Args:
        tier: where to.
        job: what.
        divide: whether each node writes a part only of what all nodes hold alike; not where they were found to differ.

    Raises:
        UnsupportedState: if ranks of this node hold different values of what is to be saved once.
        ReplicasDiffer: if this node and another hold different values of what they have divided.
        OutsideError: if anything could not be written.
    """
    folders = tier.folders()
    committed, unfinished = sorted_keys(folders)
    newer = [key for key in committed + unfinished if key.lineage > job.key.lineage]
    if newer:
        raise StorageError(f"{tier.name}: another job writes to the same location: it holds {newer[-1]}")
    headers = {rank: _header(slot, job.key) for rank, slot in job.images.items()}
    shares = shares_of(job.images, headers, job.origins, job.world, divide=divide)
    outgoing = [_outgoing(slot, *headers[rank], shares) for rank, slot in job.images.items()]
    files = [image.file for image in outgoing]
    part = Manifest(
        key=job.key,
        world=job.world,
        files=tuple(files),
        past=job.past,
        divided=shares.divided,
        differed=not divide,
        sums=shares.sums,
    )
    if job.key in committed:
        _check_same(tier, job.key, files)
        return Written(part=part, committed=True, nbytes=0)
    there = folders.get(folder_of(job.key), set())
    left = [image for image in outgoing if image.file.name not in there or not _is_there(tier, job.key, image.file)]
    job.progress.expect(sum(image.file.size for image in left))
    try:
        with ThreadPoolExecutor(_AT_ONCE, "persist") as pool:
            paths = [f"{folder_of(job.key)}/{image.file.name}" for image in left]
            chunks = [job.progress.paced(image.chunks) for image in left]
            list(pool.map(tier.put, paths, chunks, [image.file.size for image in left]))
    except BaseException:
        # Without this node's part it will never be complete; what is there only takes the room of the next one.  Where
        # other nodes may have written to the folder it is left to the next checkpoint that is complete.
        if len(job.images) == job.world and len(set(job.origins.values())) == 1:
            with contextlib.suppress(OutsideError):
                tier.delete(folder_of(job.key))
        raise
    # From here on another keeper may have committed what is there, so nothing of it is removed.
    if job.word.may_commit():
        done = commit(tier, part)
    else:
        put_part(tier, part)
        done = False
    if done:
        _remove_superseded(tier, part, job.keep_last, job.word)
    return Written(part=part, committed=done, nbytes=sum(image.file.size for image in left))


def look(tier: Tier, folders: Mapping[str, Collection[str]], part: Manifest, keep_last: int, word: Word) -> Key | None:
    """The newest durable state, if that of ``part`` is durable by now or will not be any more.

    Whoever commits it may have died over that, so where everything is written it is committed from here.

    Args:
        tier: the location.
        folders: what is in it.
        part: what this node has written.
        keep_last: how many checkpoints to keep there.
        word: whether this world is the job's.

    Raises:
        OutsideError: if it cannot be committed now.
        ReplicasDiffer: if it never can.
    """
    committed, _ = sorted_keys(folders)
    if part.key in committed:
        return part.key
    if committed and committed[-1] > part.key:
        return committed[-1]
    names = folders.get(folder_of(part.key), set())
    if not {image_name(rank, part.world) for rank in range(part.world)} <= set(names):
        return None
    if not word.may_commit() or not complete(tier, part, names):
        return None
    _remove_superseded(tier, part, keep_last, word)
    return part.key


def _is_there(tier: Tier, key: Key, file: ImageFile) -> bool:
    """Whether a keeper that died had written the file: whole, as files become visible, and of this very content."""
    path = f"{folder_of(key)}/{file.name}"
    try:
        image = VerifiedImage(path, tier.size(path), functools.partial(tier.read, path))
    except CheckpointDamaged:
        return False
    return (image.layout.total, image.header_crc, image.stamp.crc) == (file.size, file.header_crc, file.table_crc)


def _remove_superseded(tier: Tier, part: Manifest, keep_last: int, word: Word) -> None:
    """What cannot be removed costs room; what was just written is durable all the same."""
    try:
        gone = superseded(*sorted_keys(with_begun(tier)), keep_last, part.past)
    except OutsideError as error:
        logger.warning("superseded checkpoints are left behind: %s", error)
        return
    for key in gone:
        if not word.holds():
            # Another world may have resumed from it; whoever is current removes it later.
            return
        try:
            tier.delete(folder_of(key))
        except OutsideError as error:
            logger.warning("a superseded checkpoint is left behind: %s", error)


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


def _outgoing(slot: Slot, layout: ImageLayout, stamp: Stamp, shares: Shares) -> _Outgoing:
    view = memoryview(slot.map)
    chunks: Iterable[memoryview]
    share = shares.of[stamp.rank]
    if {part.entry for part in share} == set(layout.entries):
        size, table_crc = layout.total, stamp.crc
        header_crc = engine.crc32c(slot.address, layout.data_start)
        chunks = [view[at : at + _CHUNK] for at in range(0, layout.total, _CHUNK)]
    else:
        # Whose image tells of all is the one that every reader opens first.
        common = [] if stamp.rank else [entry for entry in layout.entries if entry.name in shares.common]
        rest = shares.rest.get(stamp.rank, -1)
        chunks = partial = _PartialImage(view, layout, stamp, share, common, rest)
        size, header_crc, table_crc = partial.size, partial.header_crc, partial.table_crc
    name = image_name(stamp.rank, stamp.world)
    file = ImageFile(name=name, rank=stamp.rank, size=size, header_crc=header_crc, table_crc=table_crc)
    return _Outgoing(file=file, chunks=chunks)


class _PartialImage:
    """The bytes of an image that holds a share of another image's entries: new header and checksums, same data."""

    def __init__(
        self,
        view: memoryview,
        layout: ImageLayout,
        stamp: Stamp,
        share: Sequence[Part],
        common: Sequence[Entry],
        rest: int,
    ) -> None:
        starts = dict(zip(layout.entries, layout.starts, strict=True))
        begins = {part.entry: starts[part.of] + part.begin for part in share}
        self._layout = plan_image(list(begins), stamp.json_length, alike=layout.alike, common=common, rest=rest)
        ranges = [(begins[entry], entry.nbytes) for entry in self._layout.entries]
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
