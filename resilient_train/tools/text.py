"""Sizes and tables for people, stable enough for scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from resilient_train.errors import ConfigError

_UNITS = {"": 1, **{f"{prefix}B": 1000**n for n, prefix in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{prefix}iB": 1024**n for n, prefix in enumerate(("K", "M", "G", "T"), 1)}


def human(nbytes: int | None) -> str:
    """A size such as ``1.5 GiB``; ``-`` if it is not known."""
    if nbytes is None:
        return "-"
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def parse_size(text: str) -> int:
    """Bytes in ``5GB`` (powers of 1000), ``5GiB`` (powers of 1024) or a plain number.

    Raises:
        ConfigError: for anything else, and for nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None or (size := int(float(match[1]) * factor)) < 1:
        raise ConfigError(f"a size is a number with B, KB, MB, GB, KiB, MiB or GiB, such as 5GB; it is {text!r}")
    return size


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> list[str]:
    """Lines of aligned columns, two spaces apart.

    Args:
        head: titles.
        rows: cells, as many as titles.
        right: titles of the columns that are aligned to the right, separated by spaces.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    to_right = [title in right.split() for title in head]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]
