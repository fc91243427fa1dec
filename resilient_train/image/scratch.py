"""Memory for bytes on their way: kept from one use to the next, because fresh pages cost as much as a copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt


class Scratch:
    """Lends buffers to any thread, and keeps a few of those that come back."""

    def __init__(self, most: int = 2) -> None:
        """Args:
        most: buffers that are kept.
        """
        self._most = most
        self._idle: deque[npt.NDArray[np.uint8]] = deque()

    @contextmanager
    def lend(self, size: int) -> Iterator[npt.NDArray[np.uint8]]:
        """So many bytes of anything."""
        try:
            buffer = self._idle.pop()
        except IndexError:
            buffer = np.empty(size, dtype=np.uint8)
        if len(buffer) < size:
            buffer = np.empty(size, dtype=np.uint8)
        try:
            yield buffer[:size]
        finally:
            if len(self._idle) < self._most:
                self._idle.append(buffer)
