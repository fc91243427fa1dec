"""Making states durable: which images, when, and who hears of it.  Runs on the keeper's loop; `Persister` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from resilient_train.clock import Clock
from resilient_train.keeper.clients import Client
from resilient_train.keeper.persist import Job
from resilient_train.keeper.persister import Outcome, Persister
from resilient_train.keeper.progress import Progress
from resilient_train.keeper.shelf import Shelf, origin_of
from resilient_train.keeper.word import Word
from resilient_train.plan.interval import due
from resilient_train.spec.messages import Persisted, Policy, Published, Standing
from resilient_train.spec.world import Key

_SAY_EVERY = 10.0
"""Seconds between two words on how far a state is that is being written."""


class Surroundings(Protocol):
    """What saving needs of the keeper."""

    def answer(self, client: Client, message: Persisted) -> None:
        """Tell a worker."""
        ...

    def notice(self, kind: str, text: str, *, workers: bool = False) -> None:
        """Say something worth an event; with ``workers``, to them where there is no agent."""
        ...

    def standing_changed(self) -> None:
        """Tell the agent what another keeper would have to know."""
        ...

    def attached(self, client: Client) -> bool:
        """Whether a worker is still connected."""
        ...

    def published(self) -> list[Key | None]:
        """The newest state that each attached worker has published."""
        ...

    def time_to_persist(self) -> None:
        """Name a step shortly ahead at which all workers hand over their images."""
        ...


@dataclass
class Handover:
    """A state that ranks are handing over to be persisted."""

    world: int
    local: int
    past: Mapping[int, int | None]
    slots: dict[int, int] = field(default_factory=dict)
    """rank -> slot"""
    givers: dict[int, Client] = field(default_factory=dict)
    """rank -> who waits for the answer"""


class Saving:
    """What is handed over, what is being written, what is durable."""

    def __init__(self, shelf: Shelf, clock: Clock, wake: Callable[[], None], keeper: Surroundings, word: Word) -> None:
        """Args:
        shelf: the images.
        clock: the node's clock.
        wake: called from another thread when `outcomes` has something to do.
        keeper: whom to tell.
        word: whether this world is the job's.
        """
        self._word = word
        self._shelf = shelf
        self._clock = clock
        self._wake = wake
        self._keeper = keeper
        self.policy: Policy | None = None
        self.persisted: Key | None = None
        """The newest durable state."""
        self._past: dict[int, int | None] = {}
        self._handovers: dict[Key, Handover] = {}
        self._passed: set[Key] = set()
        """States that lacked a rank at the last look, although all ranks had published newer ones."""
        self._awaited: dict[Key, dict[int, Client]] = {}
        self.why_not = ""
        """Why the last state that could not be made durable could not."""
        self._running: Progress | None = None
        self._finished: list[Outcome] = []
        self._persister = Persister(self._finish)
        self._attempted_at = self._said_at = clock.now()
        self._last_duration = 0.0

    @property
    def running(self) -> Key | None:
        """The state that is being written."""
        return self._running.key if self._running is not None else None

    @property
    def busy(self) -> bool:
        """Whether a state is being written, or handed over to be."""
        return self._running is not None or bool(self._handovers)

    @property
    def awaited(self) -> Collection[Key]:
        """States that are written as far as this node has them, and not committed yet; not for long."""
        return self._awaited.keys()

    def holds(self, slot: int) -> bool:
        """Whether a slot's image is being made durable, or is to be."""
        return any(slot in handover.slots.values() for handover in self._handovers.values())

    def set_policy(self, policy: Policy) -> None:
        """Where and when, from now on."""
        if policy != self.policy:
            self.policy = policy
            self._keeper.standing_changed()

    def standing(self) -> Standing:
        """What another keeper would have to know."""
        return Standing(
            policy=None if self.policy is None else dataclasses.asdict(self.policy),
            persisted=None if self.persisted is None else list(self.persisted),
            running=None if self._running is None else list(self._running.key),
            ranks=[] if self._running is None else sorted(self._handovers[self._running.key].slots),
            past=[[lineage, bound] for lineage, bound in self._past.items()],
        )

    def inherit(self, standing: Standing) -> None:
        """Go on where the keeper before was."""
        self.policy = None if standing.policy is None else Policy(**standing.policy)
        self.persisted = None if standing.persisted is None else Key(*standing.persisted)
        self._past = {int(one or 0): bound for one, bound in standing.past}

    # ---- what is handed over ----------------------------------------------------------------------------------------

    def published(self, client: Client, message: Published) -> None:
        """A worker hands an image over."""
        key = Key(message.lineage, message.step)
        past = {int(one or 0): bound for one, bound in message.past}
        if past != self._past:
            self._past = past
            self._keeper.standing_changed()
        if message.slot not in self._shelf or not self._lock(message.slot, key):
            self._keeper.answer(client, Persisted(lineage=key.lineage, step=key.step, error="the image is gone"))
            return
        handover = self._handovers.setdefault(key, Handover(message.world, message.local, past))
        handover.slots[message.rank] = message.slot
        handover.givers[message.rank] = client
        if len(handover.slots) == handover.local:
            # Whatever older state some rank never handed over (it died) will not be completed any more.
            for other in [k for k in self._handovers if k < key and k != self.running]:
                self._give_back(other, f"{key} is being made durable instead")
            self._start(key)

    def take(self, key: Key, images: Mapping[int, int], world: int) -> bool:
        """Persist a state that nobody hands over; False if its images are not all here any more.

        Args:
            key: the state.
            images: rank -> slot, of the images that this node writes.
            world: the number of ranks that it is the state of.
        """
        handover = self._handovers.get(key) or Handover(0, 0, self._past)
        locked = [slot for slot in images.values() if slot not in handover.slots.values() and self._lock(slot, key)]
        if not images or set(images.values()) != {*locked, *handover.slots.values()}:
            # A worker that lives is overwriting it, so a newer one is complete and will be handed over.
            for slot in locked:
                self._shelf[slot].memory.unlock()
            return False
        handover.slots, handover.world, handover.local = dict(images), world, len(images)
        self._handovers[key] = handover
        self._start(key)
        return True

    def _lock(self, slot: int, key: Key) -> bool:
        """Keep a slot's image from being overwritten, if it is (still) that of ``key``."""
        memory = self._shelf[slot].memory
        if not memory.try_lock(exclusive=False):
            return False
        stamp = memory.stamp()
        if stamp is None or stamp.key != key:
            memory.unlock()
            return False
        return True

    def _give_back(self, key: Key, error: str) -> None:
        self._tell(self._release(key), key, error)

    def _release(self, key: Key) -> dict[int, Client]:
        """Let the images of a state be overwritten; rank -> who waits to hear of it."""
        handover = self._handovers.pop(key)
        for slot in handover.slots.values():
            if slot in self._shelf:
                self._shelf[slot].memory.unlock()
        return handover.givers

    def _tell(self, givers: Mapping[int, Client], key: Key, error: str) -> None:
        for giver in givers.values():
            if self._keeper.attached(giver):
                self._keeper.answer(giver, Persisted(lineage=key.lineage, step=key.step, error=error))

    def _give_up_incomplete(self) -> None:
        """A rank that died or skipped its snapshot will never hand it over: do not hold the others' slots for it."""
        incomplete = {key for key, handover in self._handovers.items() if len(handover.slots) < handover.local}
        published = self._keeper.published()
        passed = {key for key in incomplete if all(newest is not None and newest > key for newest in published)}
        for key in incomplete:
            givers = self._handovers[key].givers.values()
            # A rank hands over before it publishes anything newer, so by the next look its message has been read.
            if key in passed & self._passed or not all(self._keeper.attached(giver) for giver in givers):
                self._give_back(key, "not every rank handed it over")
        self._passed = passed

    # ---- what is written --------------------------------------------------------------------------------------------

    def _start(self, key: Key) -> None:
        if self._running is not None or self.policy is None:
            if self.policy is None:
                self._give_back(key, "no location to persist to")
            return
        handover = self._handovers[key]
        self._running = progress = Progress(key, self.policy.bytes_per_second)
        self._attempted_at = self._said_at = self._clock.now()
        self._keeper.standing_changed()
        self._persister.submit(
            Job(
                key=key,
                world=handover.world,
                images={rank: self._shelf[slot].memory for rank, slot in handover.slots.items()},
                origins={rank: origin_of(self._shelf[slot].owner) for rank, slot in handover.slots.items()},
                past=handover.past,
                url=self.policy.url,
                keep_last=self.policy.keep_last,
                progress=progress,
                word=self._word,
            )
        )

    def _finish(self, outcome: Outcome) -> None:
        """On the persister's thread."""
        self._finished.append(outcome)
        self._wake()

    def outcomes(self) -> Key | None:
        """Take in what was written, and begin with what waits; the state that was tried last, if one was."""
        tried = None
        while self._finished:
            outcome = self._finished.pop(0)
            tried = key = outcome.job.key
            givers = self._awaited.pop(key, {})
            if not outcome.late:
                self._running = None
                self._last_duration = outcome.seconds
                givers |= self._release(key)
            if outcome.awaited:
                # Its images are not needed any more, so training goes on with the slots.
                self._awaited[key] = givers
                self._keeper.notice("persisting", f"this node's part of {key} is written: {outcome.cost}")
            elif not outcome.error:
                self.persisted = max(key, self.persisted or key)
                alone = len(outcome.job.images) == outcome.job.world
                cost = outcome.cost if alone else f"this node wrote {outcome.cost}"
                self._keeper.notice("persisted", f"{key} is durable in {outcome.job.url}: {cost}")
                self._tell(givers, key, "")
            else:
                self.why_not = outcome.error
                self._keeper.notice("persist_failed", f"{key} is not durable: {outcome.error}")
                self._tell(givers, key, outcome.error)
            self._keeper.standing_changed()
        waiting = [key for key, handover in self._handovers.items() if len(handover.slots) == handover.local]
        if waiting:
            self._start(max(waiting))
        return tried

    # ---- when -------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """When persisting goes by time, see whether it is time; say how far a state is that takes long."""
        self._give_up_incomplete()
        self._say_progress()
        policy = self.policy
        if policy is None or policy.every_steps or self.busy:
            return
        since = self._clock.now() - self._attempted_at
        auto = policy.every_seconds < 0
        if due(auto=auto, seconds=policy.every_seconds, since_last=since, last_duration=self._last_duration):
            self._keeper.time_to_persist()

    def _say_progress(self) -> None:
        """Saving that takes long says how far it is."""
        now = self._clock.now()
        if self._running is not None and now >= self._said_at + _SAY_EVERY:
            self._said_at = now
            self._keeper.notice("persisting", str(self._running), workers=True)
