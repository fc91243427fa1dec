"""Where a state can be restored from: images in this node's memory, images in a durable tier."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.reader import ImageReader, memory_reader
from resilient_train.plan.recovery import complete_keys
from resilient_train.spec.world import Key, in_ancestry
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.commit import ImageFile, Manifest, folder_of
from resilient_train.storage.tier import Tier
from resilient_train.worker.keeper_link import KeeperLink


class MemorySource:
    """The images that the keeper of this node holds."""

    name = "memory"
    waits = False

    def __init__(self, keeper: KeeperLink) -> None:
        self._keeper = keeper

    def keys(self, past: Mapping[int, int | None]) -> list[Key]:
        """States of the job's past that are complete here, newest first."""
        return complete_keys((image for _, image in self._keeper.images()), past)

    def newest_lineage(self) -> int:
        """The highest lineage that any image here, of a complete state or not, was computed by; 0 if there is none."""
        return max((image.key.lineage for _, image in self._keeper.images()), default=0)

    @contextmanager
    def open(self, key: Key) -> Iterator[list[ImageReader]]:
        """Readers of all images of ``key``, by rank; the images stay as they are meanwhile.

        Raises:
            CheckpointDamaged: if one is gone or fails its checksum.
        """
        images = [(image.rank, slot) for slot, image in self._keeper.images() if image.key == key]
        slots = dict(images)
        if len(slots) != len(images):
            raise CheckpointDamaged(f"memory: several images of the same rank claim to be {key}")
        opened = self._keeper.open(list(slots.values()))
        with ExitStack() as stack:
            for memory in opened.values():
                stack.callback(memory.close)
            readers = []
            for rank, slot in sorted(slots.items()):
                view = stack.enter_context(opened[slot].reading(key)) if slot in opened else None
                if view is None:
                    raise CheckpointDamaged(f"memory of rank {rank}: the image of {key} is gone")
                stack.callback(view.release)
                readers.append(memory_reader(f"memory of rank {rank}", view))
            yield readers
            for reader in readers:
                reader.release()


class TierSource:
    """The committed checkpoints of a durable tier."""

    def __init__(self, tier: Tier) -> None:
        self.name = tier.name
        self.waits = not tier.local
        self._tier = tier

    def keys(self, past: Mapping[int, int | None]) -> list[Key]:
        """Committed states of the job's past, newest first."""
        committed, _ = listing(self._tier)
        return [key for key in reversed(committed) if in_ancestry(key, past)]

    def newest_lineage(self) -> int:
        """The highest lineage that any checkpoint here, committed or not, was computed by; 0 if there is none."""
        committed, unfinished = listing(self._tier)
        return max((key.lineage for key in committed + unfinished), default=0)

    @contextmanager
    def open(self, key: Key) -> Iterator[list[ImageReader]]:
        """Readers of all images of ``key``, by rank.

        Raises:
            CheckpointDamaged: if the checkpoint is not what was committed.
        """
        manifest = read_manifest(self._tier, key)
        yield [open_image(self._tier, manifest, file) for file in manifest.files]


def open_image(tier: Tier, manifest: Manifest, file: ImageFile) -> ImageReader:
    """A verified reader of one image of a checkpoint.

    Raises:
        CheckpointDamaged: if the file is missing, has another length, or another header than the manifest says.
    """
    path = f"{folder_of(manifest.key)}/{file.name}"
    name = f"{tier.name}/{path}"
    size = tier.size(path)
    if size != file.size:
        raise CheckpointDamaged(f"{name}: has {size} bytes, the manifest says {file.size}")
    read_into = functools.partial(tier.read_into, path)
    reader = ImageReader(
        name, size, functools.partial(tier.read, path), read_into=read_into, header_crc=file.header_crc
    )
    reader.check(
        key=manifest.key, rank=file.rank, world=manifest.world, header_crc=file.header_crc, table_crc=file.table_crc
    )
    return reader
