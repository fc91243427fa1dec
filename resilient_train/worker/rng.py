"""The random generators of a process as state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from resilient_train.plan.partition import PRIVATE
from resilient_train.worker.capture import Capture


def rng_name(rank: int, which: str) -> str:
    """Entry name of a rank's own generator state."""
    return f"{PRIVATE}{rank}/{which}"


def capture_rng(rank: int, capture: Capture) -> dict[str, Any]:
    """Add this process's generators to ``capture``; their document."""
    capture.add(rng_name(rank, "torch"), torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        capture.add(rng_name(rank, "cuda"), torch.cuda.get_rng_state())
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, np.array(words, dtype=np.uint32).tobytes().hex(), gauss],
        "numpy": [np.asarray(keys, dtype=np.uint32).tobytes().hex(), int(position), int(has_gauss), float(cached)],
    }


def restore_rng(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the generators of this process back.

    Args:
        document: the ``rng`` part of this rank's own image.
        tensors: ``torch`` and, if there was one, ``cuda`` generator states.
    """
    torch.set_rng_state(tensors["torch"].clone())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].clone())
    version, words, gauss = document["python"]
    random.setstate((version, tuple(np.frombuffer(bytes.fromhex(words), dtype=np.uint32).tolist()), gauss))
    keys, position, has_gauss, cached = document["numpy"]
    state = np.frombuffer(bytes.fromhex(keys), dtype=np.uint32)
    np.random.set_state(("MT19937", state, position, has_gauss, cached))
