"""A `Tier` that tries again: for storage behind a network, where a refusal is often gone a moment later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

from resilient_train.errors import CheckpointDamaged, StorageError, StorageUnusable
from resilient_train.storage.tier import Chunk, Tier

logger = logging.getLogger(__name__)

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt."""
_T = TypeVar("_T")


class RetryingTier:
    """Every operation of another tier, tried again when storage refuses it.

    What is damaged, missing or not set up is not tried again, and neither is a write whose source can be read only
    once.
    """

    def __init__(self, tier: Tier, sleep: Callable[[float], None] = time.sleep) -> None:
        """Args:
        tier: the tier.
        sleep: waits for a number of seconds.
        """
        self.name = tier.name
        self.local = tier.local
        self._tier = tier
        self._sleep = sleep

    def folders(self) -> dict[str, set[str]]:
        return self._again(self._tier.folders)

    def begun(self) -> set[str]:
        return self._again(self._tier.begun)

    def size(self, path: str) -> int:
        return self._again(lambda: self._tier.size(path))

    def read(self, path: str, offset: int, length: int) -> bytes:
        return self._again(lambda: self._tier.read(path, offset, length))

    def handle(self, path: str) -> AbstractContextManager[int | None]:
        return self._tier.handle(path)

    def put(self, path: str, chunks: Iterable[Chunk], size: int = 0) -> int:
        if iter(chunks) is chunks:
            return self._tier.put(path, chunks, size)
        return self._again(lambda: self._tier.put(path, chunks, size))

    def delete(self, folder: str) -> None:
        self._again(lambda: self._tier.delete(folder))

    def check_writable(self) -> None:
        self._tier.check_writable()  # A wrong URL should be said at once.

    def _again(self, operation: Callable[[], _T]) -> _T:
        for delay in DELAYS:
            try:
                return operation()
            except (CheckpointDamaged, StorageUnusable):
                raise
            except StorageError as error:
                logger.warning("%s; trying again in %g s", error, delay)
                self._sleep(delay)
        return operation()
