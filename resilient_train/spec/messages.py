"""What agent, worker and keeper say to each other on one node, and their encoding: one JSON object a message.

A message is a frozen dataclass; its class name travels as ``type``.  Descriptors (shared-memory images) travel beside
a message, never inside it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

from resilient_train.errors import FormatError

STACKS_SIGNAL = 60
"""The signal at which a worker writes the stacks of its threads to its stderr: a real-time one that nobody is known to
use, as the schedulers' and the users' own signals are among the named ones."""
MAX_MESSAGE = 64 << 20
"""Longest message in bytes; a longer one is a malfunction, not a message."""


class Message:
    """Base of all messages."""

    __slots__ = ()


_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(cls: type[_Class]) -> type[_Class]:
    """Make a class a message."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


# ---- worker -> agent ------------------------------------------------------------------------------------------------


@message
class Hello(Message):
    """The worker runs an elastic function, is warm, its main thread is free, and it can be named in a world."""

    member: str
    multiple: int = 1
    """The world size must be a multiple of this, for the mesh to fit."""
    most: int = 0
    """The most ranks that the mesh takes; 0 for any number."""


@message
class Acknowledge(Message):
    """The main thread is free and begins to form this generation."""

    generation: int
    at: float


@message
class Stage(Message):
    """A stage of recovery is behind this rank (``aborted``, ``formed``, ``restored``, ``first_step``)."""

    generation: int
    stage: str
    at: float


@message
class Resumed(Message):
    """Rank 0: which state the generation resumes from; logged when the record has it."""

    generation: int
    lineage: int
    source: tuple[int, int] | None
    text: str


@message
class Promise(Message):
    """Answer to a planned change in the record: whether this rank will stop at its boundary."""

    number: int
    accepted: bool


@message
class Done(Message):
    """The elastic function returned in this generation."""

    generation: int


@message
class UserFailed(Message):
    """The elastic function raised an error of its own; sent before any socket closes."""

    generation: int
    text: str


@message
class Troubled(Message):
    """Communication failed in this generation, and nobody has told this worker why."""

    generation: int
    text: str


@message
class Boundaries(Message):
    """The script steps through ``Checkpointer.steps``, so planned changes can wait for a boundary."""

    generation: int


@message
class Busy(Message):
    """The rank is in a long operation that may take as long as it takes, or is out of it (no name)."""

    name: str
    seconds: float = 0.0
    """What the operation may take at most; 0 for any time."""


@message
class Position(Message):
    """Answer to `Ask`: the fields of a `resilient_train.spec.rank.RankReport`."""

    number: int
    report: dict[str, Any]


# ---- agent -> worker ------------------------------------------------------------------------------------------------


@message
class Welcome(Message):
    """Answer to `Hello`."""

    keeper: str
    verdict: float = 30.0
    """Seconds that a failed collective waits for the agents to say who was lost."""


@message
class WorldIs(Message):
    """The agreed world and the receiver's place in it."""

    record: dict[str, Any]
    hosts: list[str] = dataclasses.field(default_factory=list)
    """Addresses that connections between the members may have; empty: those of the bootstrap's host."""
    device: int = -1
    """Index of the accelerator on which the receiver computes; -1: it is no member."""


# ---- rtctl <-> agent ------------------------------------------------------------------------------------------------


@message
class AskStatus(Message):
    """Answered by `Status`."""


@message
class Status(Message):
    """The job as this agent knows it.

    ``record`` and ``nodes`` are as the store has them; ``incidents`` are [seconds ago, text] pairs, oldest first.
    """

    job: str
    node: str
    record: dict[str, Any] | None
    nodes: list[dict[str, Any]]
    step: int
    incidents: list[list[Any]]
    store: str
    """Why the store does not answer; empty if it does."""


@message
class Wish(Message):
    """These nodes are to leave the job; and ``room``, if not 0, is the most nodes that may take part.

    Answered by `Wished`.
    """

    leave: list[str]
    room: int = 0


@message
class Wished(Message):
    """The wish will be agreed on; or an ``error`` why not."""

    error: str


@message
class Ask(Message):
    """Where is your training thread?"""

    number: int


# ---- worker -> keeper -----------------------------------------------------------------------------------------------


@message
class Attach(Message):
    """First message of a worker; answered by `Attached` with the board's descriptor."""

    member: str
    slot: int


@message
class Allocate(Message):
    """Asks for one image slot; answered by `Allocated` with its descriptor, or by `Refused`.

    ``ahead`` more of the same will be asked for.
    """

    size: int
    ahead: int = 0


@message
class Discard(Message):
    """The worker will not use this slot any more and what it holds is superseded."""

    slot: int


@message
class Policy(Message):
    """Where and when images are persisted; every local worker says the same."""

    url: str
    every_steps: int
    every_seconds: float
    keep_last: int
    bytes_per_second: float = 0.0
    """0: as fast as possible."""


@message
class Published(Message):
    """A complete image that the keeper is to persist; the worker leaves the slot alone until `Persisted`.

    ``local`` is the number of ranks on this node; ``past`` the job's ancestry as [lineage, last step or None] pairs.
    """

    slot: int
    lineage: int
    step: int
    rank: int
    world: int
    local: int
    past: list[list[int | None]]


@message
class ListImages(Message):
    """Answered by `Images`; with ``everywhere``, of all nodes."""

    everywhere: bool = False


@message
class OpenImages(Message):
    """Answered by `Opened` with one descriptor for each slot still there, in order."""

    slots: list[int]


@message
class Goodbye(Message):
    """The worker ends in good order."""


# ---- keeper -> worker -----------------------------------------------------------------------------------------------


@message
class Attached(Message):
    """The board's descriptor comes with it."""


@message
class Allocated(Message):
    """The slot's descriptor comes with it."""

    slot: int


@message
class Refused(Message):
    """What was asked for cannot be had."""

    reason: str


@message
class Persisted(Message):
    """An image is durable, or, with an ``error``, will not be; either way the slot is free again."""

    lineage: int
    step: int
    error: str


@message
class Images(Message):
    """Every complete image in memory: rows of [slot, lineage, step, rank, world size, bytes, replica or not].

    ``peers`` has the same of other nodes, as [host:port, rows] of keepers that serve them to who knows ``secret``.
    ``parities`` has those of all nodes, as [host:port, rows of `resilient_train.spec.peers.Held`], this one's without
    an address.
    """

    images: list[list[Any]]
    peers: list[list[Any]]
    secret: str
    parities: list[list[Any]] = field(default_factory=list)


@message
class Opened(Message):
    """Descriptors come with it, for these slots."""

    slots: list[int]


# ---- agent <-> keeper -----------------------------------------------------------------------------------------------


@message
class Adopt(Message):
    """Agent: take over these slots of a keeper that died; descriptors come with it, the board's first."""

    slots: list[list[Any]]
    scratch: str = ""
    """A folder to remove at the end."""
    leaves: list[str] = field(default_factory=list)
    """Folders to remove at the end of an agent that was killed."""
    standing: dict[str, Any] | None = None
    """The fields of the last `Standing`."""
    more: bool = False
    """Another `Adopt` follows with more slots."""


@message
class Serve(Message):
    """Agent: serve images to other nodes on an address of ``host``, to who knows ``secret`` (hexadecimal)."""

    host: str
    secret: str


@message
class Serving(Message):
    """Keeper: where it serves, host:port; empty if it cannot, because of ``error``."""

    endpoint: str
    error: str = ""


@message
class Peers(Message):
    """Agent: the keepers of the job, whenever they or the world change.

    ``keepers`` are [node, host:port] of the nodes that have members; the first of them names the states that are
    copied.  ``others`` have no member, and may hold images.
    """

    node: str
    """The receiver's node."""
    generation: int
    slots: list[int]
    """Slots of this node's members."""
    keepers: list[list[str]]
    others: list[list[str]]
    labels: dict[str, list[str]] = field(default_factory=dict)
    """Node -> where it stands, of those with members that say so."""


@message
class Standing(Message):
    """Keeper: what another in my place would have to know: where to persist, what is durable, what is being written."""

    policy: dict[str, Any] | None
    persisted: list[int] | None
    running: list[int] | None
    past: list[list[int | None]]
    ranks: list[int] = field(default_factory=list)
    """Whose images are being written."""


@message
class Deposit(Message):
    """Keeper: hold this slot's descriptor as well, so that the image outlives me (slot -1 is the board)."""

    slot: int
    owner: str


@message
class Withdraw(Message):
    """Keeper: the slot is gone, drop its descriptor."""

    slot: int


@message
class Gone(Message):
    """Agent: this worker's process has ended."""

    member: str


@message
class Save(Message):
    """Agent: make the newest state durable now; the job goes on later, if it does, and nobody waits for this."""


@message
class Ping(Message):
    """Agent: are you there?  Answered by `Pong`."""


@message
class Pong(Message):
    """Keeper: I am."""


@message
class Flush(Message):
    """Agent, or every worker where there is none: persist the last complete state and say so with `Flushed`."""


@message
class Flushed(Message):
    """Everything that can be durable is."""

    text: str


@message
class Notice(Message):
    """Keeper, to the agent or where there is none to the workers: something worth an event."""

    kind: str
    text: str
    at: float


def _registry() -> dict[str, type[Message]]:
    return {cls.__name__: cls for cls in Message.__subclasses__()}


_TYPES = _registry()


def encode(message: Message) -> bytes:
    """A message as UTF-8 JSON."""
    body = dataclasses.asdict(message)  # type: ignore[call-overload]
    return json.dumps({"type": type(message).__name__, **body}).encode()


def decode(data: bytes | memoryview, known: Mapping[str, type[Message]] = _TYPES) -> Message:
    """The inverse of `encode`.

    Args:
        data: what arrived.
        known: the messages that may arrive, by name.

    Raises:
        FormatError: if ``data`` is none of them.
    """
    try:
        body = json.loads(bytes(data))
        if not isinstance(body, Mapping):
            raise TypeError("not an object")
        fields = dict(body)
        return known[fields.pop("type")](**fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"not a message: {error!r}") from error
