"""What the agent's state machine is told, and what it answers: events and effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from resilient_train.errors import ExitCode
from resilient_train.spec.messages import Message
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.rank import RankReport
from resilient_train.spec.world import WorldRecord

# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordSeen:
    """The record, as read, swapped or heard of; ``None`` says that no record exists."""

    record: WorldRecord | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesSeen:
    """What is known of the other nodes."""

    nodes: tuple[NodeInfo, ...]
    """Those that are alive."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Those that are not, and why."""
    suspects: frozenset[str] = frozenset()
    """Those that this node cannot reach."""
    doubted: bool = False
    """This node itself is the one that the others cannot reach."""
    fading: frozenset[str] = frozenset()
    """Those that are alive, and of which nothing is heard."""


@dataclass(frozen=True, slots=True)
class StoreSilent:
    """The control store did not answer; ``lasting``: it may come back; ``gone``: the record has ended with it."""

    text: str
    lasting: bool
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another job has begun under this one's id: whatever this world does, nobody will go on from it."""

    text: str


@dataclass(frozen=True, slots=True)
class Vouched:
    """The store has said that ``revision`` is the record's newest; it was asked at ``asked_at``."""

    revision: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class KeeperServes:
    """This node's keeper serves images to other nodes at host:port."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class LeaveAsked:
    """This node is to leave the job, which goes on without it if it can."""

    text: str


@dataclass(frozen=True, slots=True)
class WorkerSpawned:
    """A worker process runs."""

    member: str


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    """A worker sent a message."""

    member: str
    message: Message


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker process ended; ``code`` is minus the signal's number if a signal ended it."""

    member: str
    code: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The furthest local worker, as the board shows it: (generation, finished steps)."""

    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class Hung:
    """A local worker hangs and is about to be ended."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Deadlocked:
    """The ranks of a generation wait for each other."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """Where the local workers are, while the job stands still; empty once it goes on."""

    reports: tuple[RankReport, ...]


@dataclass(frozen=True, slots=True)
class EndpointReady:
    """This agent serves a fresh TCPStore for the next generation at host:port."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class Wished:
    """Somebody wants these nodes to leave and, if ``room`` is not 0, at most so many to take part."""

    leave: tuple[str, ...]
    room: int


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Something on this node asks for the end of the job."""

    text: str
    exit_code: ExitCode = ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    RecordSeen
    | NodesSeen
    | StoreSilent
    | Superseded
    | Vouched
    | KeeperServes
    | WorkerSpawned
    | WorkerSaid
    | WorkerExited
    | Progress
    | Hung
    | Deadlocked
    | Stuck
    | EndpointReady
    | LeaveAsked
    | Wished
    | StopAsked
    | Tick
)


# ---- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Swap:
    """Try to make this the next version of the record; then report the record as it is."""

    record: WorldRecord


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the other nodes."""

    info: NodeInfo


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a worker process."""

    member: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End a worker process: SIGTERM, then SIGKILL."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Save:
    """Have the newest state made durable."""


@dataclass(frozen=True, slots=True)
class Vouch:
    """The local workers may step, in the world that they were told of, until this time of the node's clock; infinity
    where nobody can ever replace it."""

    until: float


@dataclass(frozen=True, slots=True)
class Say:
    """Print a line for people."""

    text: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to a worker."""

    member: str
    message: Message


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a `Tick` at this time."""

    at: float


@dataclass(frozen=True, slots=True)
class End:
    """Nothing is left to do."""

    code: ExitCode
    text: str


Effect = Swap | Announce | Spawn | Stop | Save | Vouch | Say | Tell | Wake | End
