"""Where a state can be restored from: images in the memory of this node and of others, images in a durable tier."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.reader import ImageReader, memory_reader
from resilient_train.plan.recovery import Found, complete_keys
from resilient_train.spec.world import Key, in_ancestry
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.commit import ImageFile, Manifest, folder_of
from resilient_train.storage.peer import HeldImage, Peer
from resilient_train.storage.tier import Tier
from resilient_train.worker.keeper_link import KeeperLink
from resilient_train.worker.remote import RemoteImage


class MemorySource:
    """The images that the keepers of this job hold, this node's and the others'."""

    name = "memory"

    def __init__(self, keeper: KeeperLink) -> None:
        self._keeper = keeper
        self.waits = False

    def keys(self, past: Mapping[int, int | None]) -> list[Key]:
        """States of the job's past that are complete, newest first."""
        return complete_keys(self._found(), past)

    def newest_lineage(self) -> int:
        """The highest lineage that any image, of a complete state or not, was computed by; 0 if there is none."""
        return max((image.key.lineage for image in self._found()), default=0)

    def _found(self) -> list[Found]:
        here, peers, _ = self._keeper.everywhere()
        images = [*here, *(image for held in peers.values() for image in held)]
        return [Found(key=image.key, rank=image.rank, world=image.world) for image in images]

    @contextmanager
    def open(self, key: Key) -> Iterator[list[ImageReader]]:
        """Readers of all images of ``key``, by rank; the images stay as they are meanwhile.

        Raises:
            CheckpointDamaged: if one is gone or fails its checksum.
        """
        here, endpoints, secret = self._keeper.everywhere()
        local = {image.rank: image for image in sorted(_of(key, here), key=lambda image: not image.replica)}
        originals = [image.rank for held in (here, *endpoints.values()) for image in _of(key, held, replicas=False)]
        if len(set(originals)) != len(originals):
            raise CheckpointDamaged(f"memory: several images of the same rank claim to be {key}")
        opened = self._keeper.open([image.slot for image in local.values()])
        with ExitStack() as stack:
            for memory in opened.values():
                stack.callback(memory.close)
            peers = {endpoint: Peer(endpoint, secret) for endpoint in endpoints}
            for peer in peers.values():
                stack.callback(peer.close)
            readers = {}
            for rank, image in local.items():
                view = stack.enter_context(opened[image.slot].reading(key)) if image.slot in opened else None
                if view is not None:
                    stack.callback(view.release)
                    readers[rank] = memory_reader(f"memory of rank {rank}", view)
            for rank, holders in _remote(key, endpoints).items():
                if rank not in readers:
                    self.waits = True
                    readers[rank] = RemoteImage(rank, [(peers[endpoint], image) for endpoint, image in holders]).reader
            world = max((reader.stamp.world for reader in readers.values()), default=0)
            for rank in range(world):
                if rank not in readers:
                    raise CheckpointDamaged(f"memory of rank {rank}: the image of {key} is gone")
            yield [readers[rank] for rank in range(world)]
            for reader in readers.values():
                reader.release()


def _of(key: Key, images: list[HeldImage], *, replicas: bool = True) -> list[HeldImage]:
    return [image for image in images if image.key == key and (replicas or not image.replica)]


def _remote(key: Key, endpoints: Mapping[str, list[HeldImage]]) -> dict[int, list[tuple[str, HeldImage]]]:
    """By rank, the keepers on other nodes that hold its image, the one that has the original first."""
    holders: dict[int, list[tuple[str, HeldImage]]] = {}
    for endpoint, images in endpoints.items():
        for image in _of(key, images):
            holders.setdefault(image.rank, []).append((endpoint, image))
    for places in holders.values():
        places.sort(key=lambda place: (place[1].replica, place[0]))
    return holders


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
