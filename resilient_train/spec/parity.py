"""Parity: the exclusive or of pieces of several nodes' images, from which any one of these nodes' can be made again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resilient_train.errors import FormatError

NAME = "parity"
"""The name of its only tensor."""
MOST_NODES = 64
"""The largest group."""
_MOST_BYTES = 1 << 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Bytes of a rank's image."""

    rank: int
    """Whose."""
    image: int
    """Bytes of the whole image."""
    begin: int
    """First byte."""
    end: int
    """Behind the last byte."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    def row(self) -> list[int]:
        """As messages have it."""
        return [self.rank, self.image, self.begin, self.end]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What went into the bytes of a parity."""

    pieces: Mapping[str, tuple[Part, ...]]
    """Node -> the parts of its images, which one behind the other are its piece.  All pieces begin at byte 0."""

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {node: [part.row() for part in parts] for node, parts in self.pieces.items()}

    @classmethod
    def from_json(cls, value: Any) -> Parity:
        """The inverse of `to_json`.

        Raises:
            FormatError: if it is anything else.
        """
        if not isinstance(value, dict) or not 1 <= len(value) < MOST_NODES:
            raise FormatError(f"{value!r:.100} are no pieces of at most {MOST_NODES - 1} nodes")
        return cls(pieces={str(node): parts_from(rows) for node, rows in value.items()})


def parts_from(rows: Any) -> tuple[Part, ...]:
    """Parts from their rows.

    Raises:
        FormatError: if they are anything else.
    """
    if not isinstance(rows, list):
        raise FormatError(f"{rows!r:.100} are no parts")
    found = []
    for row in rows:
        if not (isinstance(row, list) and len(row) == 4 and all(type(n) is int and n >= 0 for n in row)):
            raise FormatError(f"{row!r:.100} is no part of an image")
        rank, image, begin, end = row
        if not begin <= end <= image <= _MOST_BYTES:
            raise FormatError(f"{row!r:.100} is no part of an image")
        found.append(Part(rank=rank, image=image, begin=begin, end=end))
    return tuple(found)


def parse_redundancy(text: object) -> int:
    """The most nodes of a group, from ``xor:4``.

    Raises:
        ValueError: if it is malformed.
    """
    found = re.fullmatch(r"xor:([0-9]{1,4})", text) if isinstance(text, str) else None
    most = int(found[1]) if found else 0
    if not 2 <= most <= MOST_NODES:
        raise ValueError(f"redundancy must be 'xor:N', with N from 2 to {MOST_NODES} nodes, it is {text!r:.50}")
    return most
