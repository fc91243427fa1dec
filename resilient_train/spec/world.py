"""The agreed world: who takes part, and which state each generation resumed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, Self

from resilient_train.errors import FormatError
from resilient_train.spec.fields import known_fields

_STEP_BITS = 40
MAX_STEP = (1 << _STEP_BITS) - 1
"""No training has more steps."""


class Key(NamedTuple):
    """The identity of a state: a step number alone is none, since a lost step is computed again and differs."""

    lineage: int
    """The number of the generation that computed the state (offset by what older runs left at the same URL)."""
    step: int
    """Number of finished steps."""

    def pack(self) -> int:
        """As one unsigned 64-bit word that orders like the key (24 bits of lineage, 40 bits of step), never 0."""
        return (self.lineage << _STEP_BITS) | self.step

    @classmethod
    def unpack(cls, word: int) -> Self:
        """The inverse of `pack`."""
        return cls(word >> _STEP_BITS, word & ((1 << _STEP_BITS) - 1))

    def __str__(self) -> str:
        return f"step {self.step} (lineage {self.lineage})"


class Phase(StrEnum):
    """What the job as a whole is doing."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """A line of the job's log of restores."""

    generation: int
    """The generation that resumed."""
    lineage: int
    """The lineage of the states it computes from then on."""
    source: Key | None
    """The state it resumed from; None for a fresh start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A change that is proposed for a step boundary and that every member must promise."""

    number: int
    """The revision that proposed it; promises name it."""
    boundary: int
    """Number of finished steps at which the members would leave."""
    members: tuple[str, ...]
    """The world that would follow."""
    reason: str
    """Why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Former:
    """A world before this one of which nobody has said that it has stopped."""

    generation: int
    """Its generation."""
    nodes: tuple[str, ...]
    """The nodes that it is on."""
    fence: float = 0.0
    """`WorldRecord.fence` of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldRecord:
    """The one record of a job, changed only by compare-and-swap on its revision."""

    revision: int
    """Number of swaps so far; identifies this version of the record."""
    generation: int
    """Grows by one whenever the members change or must start over."""
    members: tuple[str, ...]
    """Ids of the workers; a worker's rank is its index."""
    bootstrap: str
    """host:port of the TCPStore through which the members of this generation meet."""
    reason: str
    """Why this generation began."""
    phase: Phase = Phase.RUNNING
    """Running, finished or failed."""
    boundary: int | None = None
    """Where members of the generation before leave it; None: at once."""
    planned: Planned | None = None
    """A change under way."""
    restores: tuple[Restore, ...] = ()
    """Which state each generation resumed from, oldest first."""
    elastic: bool = False
    """The script was seen to be elastic; who knew that may be gone."""
    restarts: int = 0
    """How often the whole group of a script that is not elastic was restarted."""
    stalls: int = 0
    """How many losses in a row hit generations that had resumed no later a step than the one before."""
    stalled_at: int = -1
    """The step that the last lost generation had resumed; -1 before the first loss."""
    best_step: int = -1
    """The most finished steps that any loss has found."""
    error: str = ""
    """Why the job failed, for people."""
    culprit: str = ""
    """The member whose error ended the job."""
    exit_code: int = 0
    """How the agents of a failed job end."""
    leave: tuple[str, ...] = ()
    """Nodes that were asked to leave."""
    room: int = 0
    """The most nodes that may take part, if that was changed since the start; 0: as the command line says."""
    fence: float = 0.0
    """Seconds after which this world has stopped for sure if the store vouches for it no more, by its own nodes'
    ``--detect-within``; 0: not said."""
    former: tuple[Former, ...] = ()
    """Worlds that may still train, unheard of; until this generation has formed."""
    proposer: str = ""
    """The node that wrote this version."""

    @property
    def size(self) -> int:
        """The world size."""
        return len(self.members)

    def successor(self, **changes: Any) -> WorldRecord:
        """The next version of the record."""
        return replace(self, revision=self.revision + 1, **changes)

    def resumed(self) -> Restore | None:
        """This generation's line in the log of restores, once it is there."""
        last = self.restores[-1] if self.restores else None
        return last if last is not None and last.generation == self.generation else None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From what `to_json` made, perhaps that of a newer version, whose further fields are left out.

        Raises:
            FormatError: if a field is missing or malformed.
        """
        try:
            fields = known_fields(cls, data)
            planned = fields.pop("planned")
            restores = tuple(restore_from_json(item) for item in fields.pop("restores"))
            fields.update({name: tuple(fields[name]) for name in ("members", "leave")})
            fields["phase"] = Phase(fields["phase"])
            former = fields.pop("former", ())
            fields["former"] = tuple(
                Former(generation=one["generation"], nodes=tuple(one["nodes"]), fence=one.get("fence", 0.0))
                for one in former
            )
            if planned is not None:
                planned = Planned(**{**known_fields(Planned, planned), "members": tuple(planned["members"])})
            return cls(planned=planned, restores=restores, **fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a world record: {error}") from error


def restore_from_json(data: Mapping[str, Any]) -> Restore:
    """A line of the restore log from its JSON object."""
    source = data["source"]
    return Restore(
        generation=data["generation"], lineage=data["lineage"], source=None if source is None else Key(*source)
    )


def ancestry(restores: Sequence[Restore]) -> dict[int, int | None]:
    """The lineages whose states belong to the job's past, with the last step of each that does.

    The current lineage has no last step (None).  States of other lineages, or beyond the last step of an ancestor,
    were computed by a world that the job has abandoned, and must not be combined with anything.
    """
    last: dict[int, int | None] = {}
    if not restores:
        return last
    by_lineage = {restore.lineage: restore for restore in restores}
    lineage: int | None = restores[-1].lineage
    bound: int | None = None
    while lineage is not None and lineage not in last:
        last[lineage] = bound
        restore = by_lineage.get(lineage)
        source = restore.source if restore else None
        lineage, bound = (source.lineage, source.step) if source else (None, None)
    return last


def in_ancestry(key: Key, past: Mapping[int, int | None]) -> bool:
    """Whether ``key`` belongs to the past that `ancestry` computed; an empty past (a new job) admits every key."""
    if not past:
        return True
    if key.lineage not in past:
        return False
    bound = past[key.lineage]
    return bound is None or key.step <= bound


def member_id(node: str, slot: int, incarnation: int) -> str:
    """The id of the ``incarnation``-th process in a slot of a node."""
    return f"{node}/{slot}.{incarnation}"


def node_of(member: str) -> str:
    """The node part of a member's id."""
    return member.rpartition("/")[0]


def slot_of(member: str) -> int:
    """The slot of a member on its node, which is also the index of its device."""
    return int(member.rpartition("/")[2].partition(".")[0])


def incarnation_of(member: str) -> int:
    """How many processes the slot had before this one."""
    return int(member.rpartition(".")[2])
