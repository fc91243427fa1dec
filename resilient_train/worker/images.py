"""The images of one state, wherever they stand, and how the bytes that are wanted of them are brought."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from resilient_train.errors import CheckpointDamaged, ResilientError
from resilient_train.image.fetch import Range
from resilient_train.image.reader import ImageReader
from resilient_train.image.verified import ReadRange
from resilient_train.plan.recovery import Holders
from resilient_train.storage.commit import ImageFile, Manifest, folder_of
from resilient_train.storage.tier import Tier

LOOKING = 16
"""Images whose headers a rank reads side by side."""


class Images:
    """The images of one state, each opened when it is first asked for."""

    def __init__(
        self, held: Holders, open_image: Callable[[int], ImageReader], *, whole: bool = False, divided: int = 0
    ) -> None:
        """Args:
        held: whose images there are.
        open_image: opens a rank's.
        whole: whether each has all that its rank held, and not only what the others' do not have.
        divided: if the ranks have divided what they held alike as `resilient_train.plan.division` says: its ``LEAST``.
        """
        self.held = held
        self.whole = whole
        self.divided = divided
        self.brought = 0
        """Bytes that `bring` has put in place."""
        self.moved = 0
        """Those of them that came from the memory of other nodes by connections of keepers."""
        self.passed = 0
        """Those of them that came from there by the process group."""
        self.rates: tuple[float, float] | None = None
        """Bytes per second by these two ways, of all ranks together, if they were measured."""
        self.adrift = False
        """Whether other ranks are in the middle of a transfer with this one: after an error they wait for its end."""
        self._open = open_image
        self._readers: dict[int, ImageReader] = {}

    @classmethod
    def committed(cls, tier: Tier, manifest: Manifest) -> Images:
        """The images of a checkpoint, as this rank alone reads them."""

        def opened(rank: int) -> ImageReader:
            return open_image(tier, manifest, manifest.files[rank])

        held = Holders(world=manifest.world, ranks=range(manifest.world))
        return cls(held, opened, divided=manifest.divided)

    def reader(self, rank: int) -> ImageReader:
        """A rank's image.

        Raises:
            CheckpointDamaged: if it is gone, or its header or table fail their checksums.
        """
        if rank not in self._readers:
            self._readers[rank] = self._open(rank)
        return self._readers[rank]

    def document(self, rank: int) -> Any:
        """The non-tensor state of a rank's image.

        Raises:
            CheckpointDamaged: if it fails its checksum or is no JSON.
        """
        return self.reader(rank).json()

    def all(self) -> list[ImageReader]:
        """The images that there are, by rank."""
        return [self.reader(rank) for rank in sorted(self.held.ranks)]

    def prepare(self, ranks: Collection[int]) -> None:
        """Open these images, side by side, as something of each is about to be read.

        Raises:
            CheckpointDamaged: if one is gone, or its header or table fail their checksums.
        """
        with pool(LOOKING) as readers:
            for opened in [readers.submit(self.reader, rank) for rank in sorted(set(ranks) - self._readers.keys())]:
                opened.result()

    def bring(self, ranges: Mapping[int, Sequence[Range]], threads: int) -> None:
        """Read ranges of images to their addresses, verified.

        Args:
            ranges: by rank, what is wanted of its image.
            threads: that read and verify.

        Raises:
            CheckpointDamaged: if a block fails its checksum.
        """
        with pool(threads) as readers:
            tasks = [task for rank, wanted in ranges.items() for task in self.reader(rank).fetching(wanted)]
            for done in [readers.submit(task) for task in tasks]:
                done.result()
        self._count(ranges)

    def _count(self, ranges: Mapping[int, Sequence[Range]]) -> None:
        sizes = {rank: sum(wanted.wanted for wanted in of_rank) for rank, of_rank in ranges.items()}
        self.brought += sum(sizes.values())
        if self.whole:
            self.moved += sum(size for rank, size in sizes.items() if rank not in self.held.near)

    def give_up(self, error: ResilientError) -> None:
        """Tell the other ranks, if they wait to hear what this one wants, that it failed before it knew."""

    def release(self) -> None:
        """Let go of everything that was opened."""
        for reader in self._readers.values():
            reader.release()


@contextmanager
def pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that read; after an error nothing further is begun, and what has begun is waited for."""
    executor = ThreadPoolExecutor(threads, "restore")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def open_image(tier: Tier, manifest: Manifest, file: ImageFile) -> ImageReader:
    """A verified reader of one image of a checkpoint.

    Raises:
        CheckpointDamaged: if the file is missing, has another length, or another header than the manifest says.
    """
    path = f"{folder_of(manifest.key)}/{file.name}"
    size = tier.size(path)
    if size != file.size:
        raise CheckpointDamaged(f"{tier.name}/{path}: has {size} bytes, the manifest says {file.size}")
    return read_image(tier, manifest, file, functools.partial(tier.read, path))


def read_image(tier: Tier, manifest: Manifest, file: ImageFile, read: ReadRange) -> ImageReader:
    """The same of a file whose length is known to be right.

    Header, table and document are read by ``read``, and so are blocks of a file that is behind a network.
    """
    path = f"{folder_of(manifest.key)}/{file.name}"
    handle = functools.partial(tier.handle, path)
    reader = ImageReader(f"{tier.name}/{path}", file.size, read, handle=handle, header_crc=file.header_crc)
    reader.check(
        key=manifest.key, rank=file.rank, world=manifest.world, header_crc=file.header_crc, table_crc=file.table_crc
    )
    return reader
