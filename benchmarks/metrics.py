"""The finished steps that the benchmarked scripts write down."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One finished step of one rank."""

    step: int
    size: int
    generation: int
    pid: int
    at: float


class Metrics:
    """The finished steps that ranks write down, read as they grow: the observer must not cost the observed a core."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._offsets: dict[Path, int] = {}
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """Every finished step of every rank so far."""
        for path in self.folder.iterdir():
            with path.open() as file:
                file.seek(self._offsets.get(path, 0))
                text = file.read()
            whole, _, _ = text.rpartition("\n")
            self._offsets[path] = self._offsets.get(path, 0) + len(whole) + bool(whole)
            for line in whole.splitlines():
                step, size, generation, pid, at = line.split()
                self._rows.append(Row(int(step), int(size), int(generation), int(pid), float(at)))
        return self._rows


def last_first_step(rows: list[Row], after: float) -> float:
    """When the last of the ranks in ``rows`` had finished its first step."""
    return max(min(r.at for r in rows if r.pid == pid) for pid in {r.pid for r in rows}) - after
