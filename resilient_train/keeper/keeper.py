"""The keeper's event loop: slots, clients, what to persist and what to let go.

Every method runs on one thread, which never waits for storage.  Writing happens in `resilient_train.keeper.persist`.
"""

from __future__ import annotations

import dataclasses
import os
import selectors
import shutil
from dataclasses import dataclass, field

from resilient_train.clock import Clock
from resilient_train.errors import FormatError, LinkLost
from resilient_train.image.arena import Board, Slot
from resilient_train.ipc.channel import Channel, Listener
from resilient_train.keeper.backing import Backed, Backing
from resilient_train.keeper.boxes import read_boxes
from resilient_train.keeper.persist import Job, Outcome, Persister
from resilient_train.keeper.progress import Progress
from resilient_train.plan.interval import due
from resilient_train.plan.recovery import Found, complete_keys
from resilient_train.spec.messages import (
    Adopt,
    Allocate,
    Allocated,
    Attach,
    Attached,
    Deposit,
    Discard,
    Flush,
    Flushed,
    Gone,
    Goodbye,
    Images,
    ListImages,
    Message,
    Notice,
    Opened,
    OpenImages,
    Persisted,
    Policy,
    Published,
    ReadBoxes,
    Refused,
    Standing,
    Withdraw,
)
from resilient_train.spec.world import Key

_TICK = 0.25
_SAY_EVERY = 10.0
"""Seconds between two words on how far a state is that is being written."""
_FIRST_TIMEOUT = 60.0
"""Seconds to wait for whoever started this keeper."""
_NOBODY = "nobody"
"""The owner of a slot that its worker gave back while it was still being read."""


@dataclass
class Kept:
    """A slot this keeper holds."""

    memory: Slot
    owner: str


@dataclass
class Client:
    """A connected worker."""

    channel: Channel
    member: str = ""
    index: int = -1
    """Its line on the board."""
    polite: bool = False
    """It said goodbye."""


@dataclass
class Handover:
    """A state that ranks are handing over to be persisted."""

    world: int
    local: int
    past: dict[int, int | None]
    slots: dict[int, int] = field(default_factory=dict)
    """rank -> slot"""
    givers: dict[int, Client] = field(default_factory=dict)
    """rank -> who waits for the answer"""


class Keeper:
    """Owns the images of a node."""

    def __init__(
        self, listener: Listener, lines: int, linger: float | None, clock: Clock, starter: int | None = None
    ) -> None:
        """Args:
        listener: where workers and the agent connect.
        lines: number of worker slots of the node.
        linger: seconds to live on without workers; None: an agent will come first, and this keeper ends after it.
        clock: the node's clock.
        starter: process id of the agent that will come.
        """
        self._listener = listener
        self._starter = starter
        self._linger = 0.0 if linger is None else linger
        self._had_client = False
        self._scratch = ""
        self._early: list[tuple[Client, Message, list[int]]] | None = [] if linger is None else None
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._board_fd = Board.create(lines)
        self.board = Board(self._board_fd)
        self.slots: dict[int, Kept] = {}
        self._next_slot = 1
        self._inherited: set[str] = set()
        self._clients: list[Client] = []
        self._agent: Client | None = None
        self._had_agent = False
        self._policy: Policy | None = None
        self._handovers: dict[Key, Handover] = {}
        self._passed: set[Key] = set()
        """States that lacked a rank at the last look, although all ranks had published newer ones."""
        self._running: Progress | None = None
        self._said_at = clock.now()
        self._finished: list[Outcome] = []
        self._persister = Persister(self._finish)
        self._backing = Backing(self._wake)
        self._persisted: Key | None = None
        self._attempted_at = clock.now()
        self._last_duration = 0.0
        self._past: dict[int, int | None] = {}
        self._flushing: list[Client] = []
        self._alone_since = clock.now()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until nobody needs this keeper any more."""
        while not self._over():
            for key, _ in self._selector.select(_TICK):
                key.data()
            self._tick()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _over(self) -> bool:
        if self._clients or self._agent or self._running:
            return False
        if self._had_agent:
            return True  # The agent's end is the job's end; its Flush was answered or it is dead.
        if self._starter is not None and os.getppid() != self._starter:
            return True  # It died before it came.
        linger = self._linger if self._had_client else _FIRST_TIMEOUT
        return self._clock.now() >= self._alone_since + linger

    def _tick(self) -> None:
        for client in (*self._clients, *([self._agent] if self._agent is not None else [])):
            client.channel.push()
        self._schedule()
        self._say_progress()
        self._drop_superseded()

    def _accept(self) -> None:
        channel = self._listener.accept()
        if channel is None:
            return
        client = Client(channel)
        self._had_client = True
        self._clients.append(client)
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._read(client))

    def _read(self, client: Client) -> None:
        try:
            for message, descriptors in client.channel.pending():
                self._handle(client, message, descriptors)
        except (LinkLost, FormatError):
            self._forget(client)

    def _forget(self, client: Client) -> None:
        if client is self._agent:
            self._agent = None
            # Nobody is left to ask for it, so make the last state durable unasked.
            self._persist_newest()
        elif client in self._clients:
            self._clients.remove(client)
            self._backing.forget(client.member)
        else:
            return
        self._selector.unregister(client.channel)
        client.channel.close()
        self._flushing = [waiting for waiting in self._flushing if waiting is not client]
        self._flush()
        if not self._clients:
            self._alone_since = self._clock.now()
            if self._agent is None:
                # Workers live on for a moment after their agent; what they finished in it counts too.
                self._persist_newest()
            if not self._had_agent:
                self._linger = 0.0 if client.polite else self._linger

    def _answer(self, client: Client, message: Message, descriptors: list[int] | None = None) -> None:
        try:
            if client is self._agent and not descriptors:
                # An agent that is stopped (Ctrl-Z) must not stop the workers too.
                client.channel.post(message)
            else:
                client.channel.send(message, descriptors or [])
        except LinkLost:
            self._forget(client)

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _handle(self, client: Client, message: Message, descriptors: list[int]) -> None:
        if self._early is not None and not isinstance(message, Adopt):
            # The agent may still hand over an earlier keeper's memory; nobody is served before that.
            self._early.append((client, message, descriptors))
            return
        match message:
            case Attach(member=member, slot=index):
                client.member = member
                self._inherited.discard(member)
                if index >= self.board.lines:
                    self._answer(client, Refused(reason=f"slot {index} of {self.board.lines}"))
                    return
                client.index = index
                self._answer(client, Attached(index=index), [self._board_fd])
            case Allocate(size=size, ahead=ahead):
                self._backing.order(client.member, size, ahead)
            case Discard(slot=slot):
                if self._busy(slot):
                    self.slots[slot].owner = _NOBODY
                else:
                    self._drop(slot)
            case Policy():
                if message != self._policy:
                    self._policy = message
                    self._tell_standing()
            case Published():
                self._published(client, message)
            case ListImages():
                self._answer(client, Images(images=self._list()))
            case OpenImages(slots=wanted):
                there = [slot for slot in wanted if slot in self.slots][:60]
                self._answer(client, Opened(slots=there), [self.slots[slot].memory.fd for slot in there])
            case ReadBoxes(slot=slot, lineage=lineage, step=step, boxes=boxes):
                kept = self.slots.get(slot)
                self._answer(client, read_boxes(kept.memory.fd if kept else -1, Key(lineage, step), boxes))
            case Goodbye():
                client.polite = True
            case Adopt():
                self._adopt(client, message, descriptors)
            case Gone(member=member):
                self._inherited.discard(member)
            case Flush():
                self._flushing.append(client)
                self._flush()
            case _:
                pass

    def _flush(self) -> None:
        """Persist the newest state: at once for an agent; without one, when every worker has nothing more to give."""
        if self._everything_is_here():
            self._persist_newest()
            self._answer_flushes()

    def _everything_is_here(self) -> bool:
        """Whether somebody waits for the last state, and it cannot become a newer one."""
        waiting = [client for client in self._clients if client.index >= 0 and client not in self._flushing]
        return bool(self._flushing) and (self._agent in self._flushing or not waiting)

    def _allocated(self, backed: Backed) -> None:
        """Memory that was ordered is there, or is not to be had."""
        client = next((client for client in self._clients if client.member == backed.member), None)
        if backed.descriptor < 0:
            if client is not None:
                self._answer(client, Refused(reason=backed.error))
            return
        slot = self._next_slot
        try:
            self.slots[slot] = Kept(Slot(backed.descriptor), backed.member)
        except OSError as error:
            if client is not None:
                self._answer(client, Refused(reason=f"no shared memory: {error}"))
            return
        finally:
            os.close(backed.descriptor)
        self._next_slot += 1
        if self._agent is not None:
            self._deposit(slot)
        if client is not None:
            self._answer(client, Allocated(slot=slot, size=self.slots[slot].memory.size), [self.slots[slot].memory.fd])
        if client not in self._clients:
            self._drop(slot)  # The asker never heard of it.

    def _deposit(self, slot: int) -> None:
        kept = self.slots[slot]
        if self._agent is not None:
            message = Deposit(slot=slot, size=kept.memory.size, owner=kept.owner)
            self._answer(self._agent, message, [kept.memory.fd])

    def _adopt(self, client: Client, message: Adopt, descriptors: list[int]) -> None:
        """The agent introduces itself, with whatever an earlier keeper had left with it."""
        self._clients.remove(client)
        self._agent = client
        self._had_agent = True
        self._scratch = message.scratch
        if descriptors:
            self.board.close()
            os.close(self._board_fd)
            self._board_fd = descriptors[0]
            self.board = Board(self._board_fd)
            # Their owners may live and be in the middle of a step; they attach at their next boundary.
            self._inherited = {owner for _, owner in message.slots}
            for (slot, owner), fd in zip(message.slots, descriptors[1:], strict=True):
                self.slots[slot] = Kept(Slot(fd), owner)
                os.close(fd)
                self._next_slot = max(self._next_slot, slot + 1)
        else:
            self._answer(client, Deposit(slot=-1, size=self.board.size, owner=""), [self._board_fd])
        if message.standing is not None:
            self._inherit(Standing(**message.standing))
        early, self._early = self._early or [], None
        for item in early:
            self._handle(*item)
        if descriptors:
            # Whatever the keeper before was writing is not written, and the workers will not hand it over again.
            running = None if message.standing is None else message.standing["running"]
            if running is None or not self._persist_kept(Key(*running)):
                self._persist_newest()

    def _inherit(self, standing: Standing) -> None:
        """Go on where the keeper before was."""
        self._policy = None if standing.policy is None else Policy(**standing.policy)
        self._persisted = None if standing.persisted is None else Key(*standing.persisted)
        self._past = {int(one or 0): bound for one, bound in standing.past}

    def _tell_standing(self) -> None:
        if self._agent is not None:
            standing = Standing(
                policy=None if self._policy is None else dataclasses.asdict(self._policy),
                persisted=None if self._persisted is None else list(self._persisted),
                running=None if self._running is None else list(self._running.key),
                past=[[lineage, bound] for lineage, bound in self._past.items()],
            )
            self._answer(self._agent, standing)

    def _drop(self, slot: int) -> None:
        kept = self.slots.pop(slot, None)
        if kept is not None:
            kept.memory.close()
            if self._agent is not None:
                self._answer(self._agent, Withdraw(slot=slot))

    def _list(self) -> list[list[int]]:
        found = []
        for slot, kept in self.slots.items():
            stamp = kept.memory.stamp()
            if stamp is not None:
                found.append([slot, stamp.key.lineage, stamp.key.step, stamp.rank, stamp.world])
        return found

    def _drop_superseded(self) -> None:
        """Images of workers that are gone live until a newer state is complete."""
        living = {client.member for client in self._clients} | self._inherited
        orphans = [slot for slot, kept in self.slots.items() if kept.owner not in living]
        if not orphans:
            return
        newest = self._newest_complete()
        for slot in orphans:
            stamp = self.slots[slot].memory.stamp()
            if not self._busy(slot) and newest is not None and (stamp is None or stamp.key < newest):
                self._drop(slot)

    def _busy(self, slot: int) -> bool:
        """Whether a slot's image is being made durable, or is to be."""
        return any(slot in handover.slots.values() for handover in self._handovers.values())

    def _newest_complete(self) -> Key | None:
        found = [
            Found(key=Key(lineage, step), rank=rank, world=world, place="memory")
            for _, lineage, step, rank, world in self._list()
        ]
        keys = complete_keys(found, {})
        return keys[0] if keys else None

    # ---- persisting -------------------------------------------------------------------------------------------------

    def _published(self, client: Client, message: Published) -> None:
        key = Key(message.lineage, message.step)
        past = {int(one or 0): bound for one, bound in message.past}
        if past != self._past:
            self._past = past
            self._tell_standing()
        if message.slot not in self.slots or not self._lock(message.slot, key):
            self._answer(client, Persisted(lineage=key.lineage, step=key.step, error="the image is gone"))
            return
        handover = self._handovers.setdefault(key, Handover(message.world, message.local, past))
        handover.slots[message.rank] = message.slot
        handover.givers[message.rank] = client
        if len(handover.slots) == handover.local:
            # Whatever older state some rank never handed over (it died) will not be completed any more.
            running = self._running.key if self._running is not None else None
            for other in [k for k in self._handovers if k < key and k != running]:
                self._give_back(other, f"{key} is newer")
            self._start(key)

    def _start(self, key: Key) -> None:
        if self._running is not None or self._policy is None:
            if self._policy is None:
                self._give_back(key, "no location to persist to")
            return
        handover = self._handovers[key]
        self._running = progress = Progress(key, self._policy.bytes_per_second)
        self._attempted_at = self._said_at = self._clock.now()
        self._tell_standing()
        self._persister.submit(
            Job(
                key=key,
                world=handover.world,
                images={rank: self.slots[slot].memory for rank, slot in handover.slots.items()},
                past=handover.past,
                url=self._policy.url,
                keep_last=self._policy.keep_last,
                progress=progress,
            )
        )

    def _finish(self, outcome: Outcome) -> None:
        """On the persister's thread."""
        self._finished.append(outcome)
        self._wake()

    def _wake(self) -> None:
        """From any thread: have the loop look at what is finished."""
        os.write(self._wake_write, b"x")

    def _woken(self) -> None:
        os.read(self._wake_read, 4096)
        for backed in self._backing.finished():
            self._allocated(backed)
        self._outcomes()

    def _outcomes(self) -> None:
        tried = None
        while self._finished:
            outcome = self._finished.pop(0)
            tried = key = outcome.job.key
            self._running = None
            self._last_duration = outcome.seconds
            if not outcome.error:
                self._persisted = max(key, self._persisted or key)
                text = f"{key} is durable in {outcome.job.url}: {outcome.nbytes:,} bytes in {outcome.seconds:.2f} s"
                self._notice("persisted", text)
            else:
                self._notice("persist_failed", f"{key} is not durable: {outcome.error}")
            self._tell_standing()
            self._give_back(key, outcome.error)
        waiting = [key for key, handover in self._handovers.items() if len(handover.slots) == handover.local]
        if waiting:
            self._start(max(waiting))
        if tried is not None and self._everything_is_here():
            newest = self._newest_complete()
            if newest is not None and newest > tried:
                self._persist_newest()
            self._answer_flushes()

    def _give_back(self, key: Key, error: str) -> None:
        handover = self._handovers.pop(key)
        for rank, slot in handover.slots.items():
            if slot in self.slots:
                self.slots[slot].memory.unlock()
            giver = handover.givers.get(rank)
            if giver is not None and giver in self._clients:
                self._answer(giver, Persisted(lineage=key.lineage, step=key.step, error=error))

    def _schedule(self) -> None:
        """When persisting goes by time, name a step shortly ahead at which all workers hand over their images."""
        self._give_up_incomplete()
        policy = self._policy
        if policy is None or policy.every_steps or self._running or self._handovers:
            return
        since = self._clock.now() - self._attempted_at
        auto = policy.every_seconds < 0
        if due(auto=auto, seconds=policy.every_seconds, since_last=since, last_duration=self._last_duration):
            furthest = max((step for _, step in self._positions()), default=0)
            asked = self.board.persist_at()
            # A step that was passed just now may still be on its way here: its copy ends during the step behind it.
            if asked + 3 < furthest or asked > furthest + 2:
                self.board.ask_to_persist(furthest + 2)

    def _positions(self) -> list[tuple[int, int]]:
        """(generation, finished steps) of the workers that are attached."""
        lines = {client.index for client in self._clients if client.index >= 0}
        return [self.board.progress(line) for line in lines]

    def _give_up_incomplete(self) -> None:
        """A rank that died or skipped its snapshot will never hand it over: do not hold the others' slots for it."""
        incomplete = {key for key, handover in self._handovers.items() if len(handover.slots) < handover.local}
        published = [self.board.published(client.index) for client in self._clients if client.index >= 0]
        passed = {key for key in incomplete if all(newest is not None and newest > key for newest in published)}
        for key in incomplete:
            givers = self._handovers[key].givers.values()
            # A rank hands over before it publishes anything newer, so by the next look its message has been read.
            if key in passed & self._passed or any(giver not in self._clients for giver in givers):
                self._give_back(key, "not every rank handed it over")
        self._passed = passed

    def _persist_newest(self) -> None:
        """Persist the newest complete state unless that is already durable."""
        newest = self._newest_complete()
        if self._policy is None or newest is None or (self._persisted is not None and newest <= self._persisted):
            return
        if self._running is None or self._running.key != newest:
            self._persist_kept(newest)

    def _persist_kept(self, key: Key) -> bool:
        """Persist a state that nobody hands over; False if its images are not all here any more."""
        handover = self._handovers.get(key) or Handover(0, 0, self._past)
        found = [(rank, slot, world) for slot, lineage, step, rank, world in self._list() if Key(lineage, step) == key]
        images = {rank: slot for rank, slot, _ in found}
        locked = [slot for slot in images.values() if slot not in handover.slots.values() and self._lock(slot, key)]
        whole = bool(found) and all(set(images) == set(range(world)) for _, _, world in found)
        if not whole or set(images.values()) != {*locked, *handover.slots.values()}:
            # A worker that lives is overwriting it, so a newer one is complete and will be handed over.
            for slot in locked:
                self.slots[slot].memory.unlock()
            return False
        handover.slots, handover.world, handover.local = images, len(images), len(images)
        self._handovers[key] = handover
        self._start(key)
        return True

    def _lock(self, slot: int, key: Key) -> bool:
        """Keep a slot's image from being overwritten, if it is (still) that of ``key``."""
        memory = self.slots[slot].memory
        if not memory.try_lock(exclusive=False):
            return False
        stamp = memory.stamp()
        if stamp is None or stamp.key != key:
            memory.unlock()
            return False
        return True

    def _answer_flushes(self) -> None:
        if self._running is not None:
            return
        newest = self._newest_complete()
        behind = newest is not None and (self._persisted is None or self._persisted < newest)
        text = ""
        if self._policy is not None and behind:
            durable = f"the newest durable one is {self._persisted}" if self._persisted else "none of this job is"
            text = f"the last state ({newest}) could not be made durable in {self._policy.url}; {durable}"
        images = self._list()
        if self._policy is not None and newest is None and len({(image[1], image[2]) for image in images}) > 1:
            ranks = sorted({image[3] for image in images})
            text = f"nothing is durable: of {images[0][4]} ranks only {ranks} have given images to this keeper"
        for client in self._flushing:
            self._answer(client, Flushed(text=text))
        self._flushing = []

    def _notice(self, kind: str, text: str) -> None:
        if self._agent is not None:
            self._answer(self._agent, Notice(kind=kind, text=text, at=self._clock.now()))

    def _say_progress(self) -> None:
        """Saving that takes long says how far it is."""
        now = self._clock.now()
        if self._running is None or now < self._said_at + _SAY_EVERY:
            return
        self._said_at = now
        self._notice("persisting", str(self._running))
        if self._agent is None:
            for client in list(self._clients):
                try:
                    # A worker that is busy with something else for long must not stop the keeper.
                    client.channel.post(Notice(kind="persisting", text=str(self._running), at=now))
                except LinkLost:
                    self._forget(client)
