"""Memory for bytes on their way: kept from one use to the next, because fresh pages cost as much as a copy."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt


class Scratch(threading.local):
    """Each thread has its own; what `take` gives is good until the thread's next."""

    def __init__(self) -> None:
        self._held: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """So many bytes of anything."""
        if len(self._held) < size:
            self._held = np.empty(size, dtype=np.uint8)
        return self._held[:size]
