"""What an agent announces about its node; together with the record, all that decisions are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from resilient_train.errors import FormatError
from resilient_train.spec.fields import known_fields
from resilient_train.spec.rank import RankReport


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A living worker process."""

    member: str
    """Its id."""
    elastic: bool = False
    """It runs an elastic function (it has said hello)."""
    multiple: int = 1
    """The world size must be a multiple of this, for its mesh to fit."""
    most: int = 0
    """The most ranks that its mesh takes; 0 for any number."""
    idle: bool = False
    """It waits to be named in a world: it is warm and its main thread is free."""
    acknowledged: int = 0
    """The newest generation that its main thread began to form."""
    formed: int = 0
    """The newest generation that it formed."""
    stepping: int = 0
    """The newest generation in which it steps through boundaries."""
    promised: int = 0
    """The newest planned change that it promised."""
    declined: int = 0
    """The newest planned change that it declined."""
    done: int = 0
    """The generation in which its function returned."""
    busy: str = ""
    """The long operation that it announced and is in."""
    hung: str = ""
    """Why it is taken for hanging and about to be ended; empty if it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitInfo:
    """A worker process that ended."""

    member: str
    """Its id."""
    code: int
    """Exit code; minus the signal's number if a signal ended it."""
    elastic: bool
    """Whether it had said hello."""
    acknowledged: int
    """The newest generation that it took part in."""
    done: int
    """The generation in which its function returned, 0 if it had not."""
    hung: str = ""
    """Why it was ended as hanging; empty if it was not."""

    @property
    def killed(self) -> bool:
        """Ended from outside (SIGKILL, SIGTERM), rather than by what the process itself did."""
        return bool(self.hung) or self.code in (-9, -15)

    def describe(self) -> str:
        """How it ended, for people."""
        if self.hung:
            return self.hung
        return f"was ended by signal {-self.code}" if self.code < 0 else f"exited with code {self.code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all nodes of a job have to be started with alike: each of them decides by it for all, and relies on the
    others' doing so."""

    min_nodes: int
    """Fewer nodes than this cannot form a world."""
    max_nodes: int
    """More are not used, unless the record says otherwise."""
    within: float
    """Seconds in which a loss is to be noticed; how long a world may go on without the store follows from it."""

    def __str__(self) -> str:
        span = str(self.min_nodes) if self.min_nodes == self.max_nodes else f"{self.min_nodes}:{self.max_nodes}"
        return f"--nnodes={span} --detect-within={self.within:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """A node as its agent announces it."""

    node: str
    """The node's id."""
    order: int
    """Its place among the nodes; ranks follow it."""
    endpoint: str
    """host:port of the TCPStore that this agent serves."""
    slots: int
    """Number of ranks it has room for."""
    standby: int = 0
    """Number of further workers that it keeps ready to take a lost one's place."""
    workers: tuple[WorkerInfo, ...] = ()
    """Its living workers."""
    exits: tuple[ExitInfo, ...] = ()
    """Its workers that ended."""
    generation: int = 0
    """The newest generation that its agent knows of."""
    progress: tuple[int, int] = (0, 0)
    """(generation, finished steps) of its furthest worker."""
    failed: str = ""
    """The error that a worker's own code raised, if one did."""
    culprit: str = ""
    """That worker."""
    failed_in: int | None = None
    """The generation in which that worker was; None if the error is nobody's, and concerns the job as it is now."""
    exit_code: int = 1
    """How the job is to end because of it."""
    link: str = ""
    """host:port at which this agent answers other agents; empty on a job's only node."""
    keeper: str = ""
    """host:port at which this node's keeper serves images to other nodes; empty where it serves none."""
    suspects: tuple[str, ...] = ()
    """Nodes that this one finds unreachable."""
    addresses: tuple[str, ...] = ()
    """This machine's network addresses: where connections between its ranks and others' come from."""
    labels: tuple[str, ...] = ()
    """Where this machine stands, as `resilient_train.spec.topology` has it."""
    leaving: str = ""
    """Why this node wants to leave at the next boundary; empty if it does not."""
    terms: Terms | None = None
    """How it was started; None if it does not say."""
    stuck: tuple[RankReport, ...] = ()
    """Where its members are, while the job stands still; empty while it goes on."""

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
            workers = tuple(WorkerInfo(**known_fields(WorkerInfo, item)) for item in fields.pop("workers"))
            exits = tuple(ExitInfo(**known_fields(ExitInfo, item)) for item in fields.pop("exits"))
            generation, step = fields.pop("progress")
            fields.update({name: tuple(fields[name]) for name in ("suspects", "addresses", "labels")})
            fields["stuck"] = tuple(RankReport.from_json(item) for item in fields["stuck"])
            if fields.get("terms") is not None:
                fields["terms"] = Terms(**known_fields(Terms, fields["terms"]))
            return cls(workers=workers, exits=exits, progress=(generation, step), **fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a node's announcement: {error}") from error
