"""Bytes of lost images, made again from parities and from what they were folded with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.native import engine
from resilient_train.plan.parity import restorable, terms
from resilient_train.spec.parity import Parity

ReadBytes = Callable[[int, int], "memoryview | bytearray"]
"""(offset, length) -> exactly those bytes, or an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is left of a state.

    Nothing that is made of it is verified here: whoever uses it finds in the image's own checksums whether anything
    that it was made of was damaged.
    """

    images: Mapping[int, ReadBytes]
    """Reads the images that are left, by rank."""
    parities: Sequence[tuple[Parity, ReadBytes]]
    """What was folded into each parity that is left, and what reads its bytes."""

    def lost(self) -> dict[int, int]:
        """The lost images that can be made again: rank -> bytes."""
        return restorable([parity for parity, _ in self.parities], self.images.keys())

    def rebuild(self, rank: int, offset: int, length: int) -> bytearray:
        """Bytes of a lost rank's image.

        Raises:
            CheckpointDamaged: if no parity has them; whatever a reader raises, too.
        """
        try:
            parities = [parity for parity, _ in self.parities]
            needed = terms(parities, self.images.keys(), rank, offset, offset + length)
        except ValueError as error:
            raise CheckpointDamaged(f"{error}") from error
        made = bytearray(length)
        address = np.frombuffer(made, dtype=np.uint8).ctypes.data
        for term in needed:
            _xor(address + term.target, self.parities[term.parity][1](term.begin, term.size))
            for at, part in term.others:
                _xor(address + term.target + at, self.images[part.rank](part.begin, part.size))
        return made


def slices(view: memoryview, begin: int = 0) -> ReadBytes:
    """Reads memory from ``begin`` on."""
    return lambda offset, length: view[begin + offset : begin + offset + length]


def _xor(target: int, data: memoryview | bytearray) -> None:
    engine.xor_into(target, np.frombuffer(data, dtype=np.uint8).ctypes.data, len(data))
