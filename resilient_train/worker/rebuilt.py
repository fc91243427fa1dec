"""Lost images as if a keeper held them; they are made again from parities, as far as they are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from resilient_train.errors import CheckpointDamaged, LinkLost
from resilient_train.image.native import engine
from resilient_train.image.rebuild import ReadBytes, Remains
from resilient_train.image.verified import Row
from resilient_train.spec.world import Key
from resilient_train.storage.peer import HeldImage
from resilient_train.worker.remote import Holder

logger = logging.getLogger(__name__)


class Rebuilt:
    """Serves the lost images of a state."""

    endpoint = "parities"

    def __init__(self, remains: Remains) -> None:
        """Of what is left of it."""
        self._remains = remains

    def read(self, image: HeldImage, offset: int, length: int) -> bytearray:
        """Exactly these bytes of an image.

        Raises:
            LinkLost: if a keeper that is needed for them is gone or silent.
            CheckpointDamaged: if it does not hold its part any more, or no parity has them.
        """
        return self._remains.rebuild(image.rank, offset, length)

    def read_into(self, image: HeldImage, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with an image's bytes from ``offset`` on; raises what `read` does."""
        made = memoryview(self.read(image, offset, sum(map(len, buffers))))
        at = 0
        for buffer in buffers:
            buffer[:] = made[at : at + len(buffer)]
            at += len(buffer)

    def gather(self, image: HeldImage, offset: int, size: int, rows: Sequence[Row], buffer: memoryview) -> list[int]:
        """As `resilient_train.storage.peer.Peer.gather`."""
        made = np.frombuffer(self.read(image, offset, size), dtype=np.uint8)
        target = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
        return engine.gather_rows(made.ctypes.data, size, rows, target)


def reading(holders: Sequence[tuple[Holder, HeldImage]], begin: int = 0) -> ReadBytes:
    """Reads from the first holder of an image that has it, from ``begin`` on."""

    def read(offset: int, length: int) -> bytearray:
        for holder, image in holders[:-1]:
            try:
                return holder.read(image, begin + offset, length)
            except (LinkLost, CheckpointDamaged) as error:
                logger.warning("%s; reading rank %d's image elsewhere", error, image.rank)
        holder, image = holders[-1]
        return holder.read(image, begin + offset, length)

    return read


def rebuilt_images(key: Key, world: int, remains: Remains) -> dict[int, list[tuple[Holder, HeldImage]]]:
    """The images of a state that are gone and can be made again: by rank, who serves them."""
    rebuilt = Rebuilt(remains)
    return {
        rank: [(rebuilt, HeldImage(slot=0, key=key, rank=rank, world=world, size=size, replica=True))]
        for rank, size in remains.lost().items()
    }
