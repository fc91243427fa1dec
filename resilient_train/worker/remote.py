"""An image in the memory of another node, read from whichever of its holders is left."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from resilient_train.errors import CheckpointDamaged, LinkLost
from resilient_train.image.reader import ImageReader
from resilient_train.image.verified import Row
from resilient_train.storage.peer import HeldImage

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Holder(Protocol):
    """Serves an image: a keeper, or what makes it again."""

    endpoint: str
    """What errors call it."""

    def read(self, image: HeldImage, offset: int, length: int) -> bytearray:
        """Exactly these bytes."""
        ...

    def read_into(self, image: HeldImage, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the bytes from ``offset`` on."""
        ...

    def gather(self, image: HeldImage, offset: int, size: int, rows: Sequence[Row], buffer: memoryview) -> list[int]:
        """See `resilient_train.storage.peer.Peer.gather`."""
        ...


class RemoteImage:
    """One rank's image and the keepers that hold it; a keeper that is gone, or serves damaged bytes, is left for the
    next one."""

    def __init__(self, rank: int, holders: Sequence[tuple[Holder, HeldImage]]) -> None:
        """Opens it.

        Args:
            rank: whose it is.
            holders: where it is, best first.

        Raises:
            CheckpointDamaged: if nobody has it, or it is damaged everywhere.
        """
        self._rank = rank
        self._holders = list(holders)
        self._moving = threading.Lock()
        self._served = threading.local()
        """where this thread has read last"""
        self.reader = self._opened()

    def _opened(self) -> ImageReader:
        while True:
            peer, image = self._holder()
            name = f"memory of rank {self._rank} at {peer.endpoint}"
            try:
                return ImageReader(
                    name,
                    image.size,
                    self._read,
                    read_into=self._read_into,
                    gather=self._gather,
                    elsewhere=self._elsewhere,
                )
            except CheckpointDamaged as error:
                # The header or the table; another holder may have them whole.
                if not self._leave(self._served.peer, error):
                    raise

    def _elsewhere(self) -> bool:
        peer: Holder | None = getattr(self._served, "peer", None)
        if peer is None:
            return True  # What this thread has found damaged came from somewhere else.
        return self._leave(peer, CheckpointDamaged(f"{peer.endpoint} serves damaged bytes"))

    def _holder(self) -> tuple[Holder, HeldImage]:
        with self._moving:
            if not self._holders:
                raise CheckpointDamaged(f"memory of rank {self._rank}: nobody has the image any more")
            return self._holders[0]

    def _leave(self, peer: Holder, why: Exception) -> bool:
        """Do not read from ``peer`` any more; whether another is left."""
        with self._moving:
            if self._holders and self._holders[0][0] is peer:
                logger.warning("%s; reading rank %d's image elsewhere", why, self._rank)
                del self._holders[0]
            return bool(self._holders)

    def _tried(self, action: Callable[[Holder, HeldImage], _T]) -> _T:
        while True:
            peer, image = self._holder()
            self._served.peer = peer
            try:
                return action(peer, image)
            except (LinkLost, CheckpointDamaged) as error:
                if not self._leave(peer, error):
                    raise CheckpointDamaged(f"memory of rank {self._rank}: {error}") from error

    def _read(self, offset: int, length: int) -> memoryview:
        return memoryview(self._tried(lambda peer, image: peer.read(image, offset, length)))

    def _read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._tried(lambda peer, image: peer.read_into(image, offset, buffers))

    def _gather(self, offset: int, size: int, rows: Sequence[Row], buffer: memoryview) -> list[int]:
        return self._tried(lambda peer, image: peer.gather(image, offset, size, rows, buffer))
