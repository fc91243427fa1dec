"""What one rank does at this moment, as it says itself or, where it does not answer, as its agent sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from resilient_train.errors import FormatError
from resilient_train.spec.fields import known_fields


class Where(StrEnum):
    """Where the training thread is."""

    COMMUNICATION = "communication"
    """In a call that waits for other ranks."""
    UNCLEAR = "unclear"
    """In native code that computes, and may wait for other ranks too: backward, compiled code."""
    COMPILING = "compiling"
    """In torch's compiler."""
    ELSEWHERE = "elsewhere"
    """Anywhere else: it waits for no rank."""
    SILENT = "silent"
    """Nobody knows: the process does not answer."""
    STOPPED = "stopped"
    """The process is stopped (SIGSTOP)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank at one moment."""

    member: str
    """The rank's member."""
    generation: int = 0
    """The generation that it works in; 0 if it is unknown."""
    step: int = -1
    """The step that it is in; -1 before its first boundary of the generation."""
    where: Where
    """Where its training thread is."""
    frame: str = ""
    """The innermost line of the user's code and what it calls, or what the agent sees of a process without answer."""
    counts: tuple[tuple[str, int], ...] = ()
    """For every process group the number of operations that this rank has entered."""
    device: bool = False
    """It computes on a device, which works behind its thread, so a thread waits for others in any line."""
    finished: bool = False
    """It has passed its last boundary."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From what `to_json` made.

        Raises:
            FormatError: if a field is missing or malformed.
        """
        try:
            fields = known_fields(cls, data)
            fields["where"] = Where(fields["where"])
            fields["counts"] = tuple((str(name), int(count)) for name, count in fields["counts"])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a rank's report: {error}") from error
