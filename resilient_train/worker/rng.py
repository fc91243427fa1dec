"""The random generators of a process as state."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from resilient_train.errors import FormatError
from resilient_train.plan.partition import PRIVATE
from resilient_train.spec.jsontree import integer
from resilient_train.worker.capture import Capture


def seed_generators(value: int, device: torch.device) -> None:
    """Seed torch's generators for work on ``device``; ``value`` may be any integer."""
    value &= (1 << 63) - 1
    if device.type == "cpu":
        # What torch.manual_seed does besides, formatting a stack for generators that nobody has yet, is no use here.
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)


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


def rng_setters(document: Any, tensors: Mapping[str, torch.Tensor]) -> list[Callable[[], Any]]:
    """What puts the generators of this process back; all has been tried on other generators.

    Args:
        document: the ``rng`` part of this rank's own image.
        tensors: ``torch`` and, if there was one, ``cuda`` generator states.

    Raises:
        FormatError: if they are no states of generators.
    """
    try:
        version, words, gauss = document["python"]
        keys, position, has_gauss, cached = document["numpy"]
        python = (integer(version, 3, 3), tuple(_words(words).tolist()), None if gauss is None else _real(gauss))
        # Beyond its end numpy would go on with the memory behind.
        numpy = ("MT19937", _words(keys), integer(position, 0, 624), integer(has_gauss, 0, 1), _real(cached))
        states = {which: tensor.clone() for which, tensor in tensors.items()}
        torch.Generator().set_state(states["torch"])
        random.Random().setstate(python)
        np.random.RandomState(0).set_state(numpy)
        setters = [partial(torch.set_rng_state, states["torch"])]
        if "cuda" in states and torch.cuda.is_available():
            torch.Generator("cuda").set_state(states["cuda"])
            setters.append(partial(torch.cuda.set_rng_state, states["cuda"]))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:  # numpy takes an element of no words.
        raise FormatError(f"malformed states of random generators: {error!r:.500}") from error
    return [*setters, partial(random.setstate, python), partial(np.random.set_state, numpy)]


def _words(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(bytes.fromhex(text), dtype=np.uint32)


def _real(value: Any) -> float:
    if type(value) is not float:
        raise ValueError(f"{value!r:.50} is no real number")
    return value
