"""Find the newest state that is left anywhere and fill a training's state from it, all ranks together.

Rank 0 chooses for all; every rank fills its part; all agree whether it was sound before anybody goes on.  Where it was
not, all take the state before.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from resilient_train.errors import (
    CheckpointDamaged,
    ConfigError,
    PeerFailed,
    ResilientError,
    StateMismatch,
    StorageError,
)
from resilient_train.image.native import checksum
from resilient_train.spec.world import Key, ancestry
from resilient_train.storage.commit import folder_of
from resilient_train.storage.tier import Tier
from resilient_train.worker.exchange import Exchange
from resilient_train.worker.fill import fill
from resilient_train.worker.host import Host
from resilient_train.worker.images import Images
from resilient_train.worker.sources import Candidate, MemorySource, TierSource
from resilient_train.worker.state import State

logger = logging.getLogger(__name__)

NETWORK_READS = 16
"""Requests that a rank has on their way to a server while it restores."""
NEAR = 20
"""Steps that a state in memory may be behind the last finished one before storage is asked for something newer."""
MOST_RESTORE_THREADS = 8
"""Threads of a rank beyond which memory, and no processor, is what limits."""
_PAGE = 1 << 15
"""Bytes in which what rank 0 has to say fits: an escaped URL, which no system takes longer than 4 KiB."""


class Source(Protocol):
    """Where states can be restored from."""

    name: str
    """What it is called."""
    waits: bool
    """Whether reading from it is mostly waiting, for a network."""

    def candidates(self, past: dict[int, int | None]) -> list[Candidate]:
        """Whole states of the past, newest first."""
        ...

    def newest_lineage(self) -> int:
        """The highest lineage of any state there, complete or not; 0 if there is none."""
        ...

    def open(self, state: Candidate, rank: int | None = None) -> AbstractContextManager[Images]:
        """The images of a state, the nearest those of ``rank``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What the state was filled from."""

    key: Key | None
    """Which state; None for a fresh start."""
    place: str
    """Where it was."""
    lineage: int
    """The number under which this generation goes on."""
    alike: bool
    """Whether all ranks' states have the same names, shapes and layouts."""
    cost: str = ""
    """How much was read, by all ranks together, and how long this rank was at it, for people."""


class Restoring:
    """One restore, by all ranks at once."""

    def __init__(self, state: State, host: Host, tier: Tier | None, rank: int, size: int) -> None:
        """Args:
        state: what to fill.
        host: this process's surroundings.
        tier: where states are durable, if anywhere.
        rank: this rank.
        size: number of ranks.
        """
        self._state = state
        self._host = host
        self._tier = tier
        self._rank = rank
        self._size = size
        self._restores = host.restores()
        self._alike = size == 1
        self._volume = 0, 0, 0
        """Bytes read, those of them over connections of keepers, and over the process group."""
        self._rates: tuple[float, float] | None = None
        """Bytes per second by these two ways, of all ranks together, if they were measured."""

    def newest(self) -> Restored:
        """Fill the state from the newest whole state; a fresh start leaves it as it is.

        Raises:
            StateMismatch: if the newest state is of another model.
            CheckpointDamaged: if there are states and every one is damaged, or finished steps are lost altogether.
            StorageError: if the location cannot be read.
            PeerFailed: if another rank could not restore.
        """
        past = ancestry(self._restores)
        damaged: list[tuple[str, Key]] = []
        while True:
            choice = self._choose(past, damaged)
            key = None if choice["key"] is None else Key(*choice["key"])
            if key is None:
                self._check_fresh_start(damaged)
            problem, left = None, dict[str, bool]()
            began = time.monotonic()
            if key is not None:
                problem, left = self._try(choice["place"], Candidate(key=key, without=tuple(choice["without"])))
            trouble = 0 if problem is None else 1 if isinstance(problem, CheckpointDamaged) else 2
            well, first = self._all_well(trouble, choice)
            if well == 0:
                self._check_all_wanted(left)
                cost = "" if key is None else self._cost(time.monotonic() - began)
                return Restored(key=key, place=choice["place"], lineage=choice["lineage"], alike=self._alike, cost=cost)
            assert key is not None
            if well == 2 and problem is not None and not isinstance(problem, CheckpointDamaged):
                if isinstance(problem, StorageError):
                    folder = f"{choice['place']}/{folder_of(key)}"
                    logger.error("%s cannot be read now; once it is moved away, the state before it is taken", folder)
                raise problem
            if well == 2:
                raise PeerFailed(f"{key} from {choice['place']}: another rank could not restore it, and says why")
            if problem is not None:
                level = logging.WARNING if self._rank == first else logging.INFO
                logger.log(level, "%s from %s is damaged, trying the one before it: %s", key, choice["place"], problem)
            damaged.append((choice["place"], key))

    def _check_fresh_start(self, damaged: list[tuple[str, Key]]) -> None:
        if damaged:
            named = ", ".join(f"{key} in {place}" for place, key in damaged)
            raise CheckpointDamaged(f"every state that is left is damaged ({named}); not starting over on top of it")
        finished = self._host.finished_steps()
        if finished > 0:
            raise CheckpointDamaged(
                f"no complete copy of the state is left in memory or at the location, and {finished} steps were"
                " finished: more was lost than there were copies of (replicas=2 makes more of them, a URL keeps states"
                " that no loss ends); not starting over in silence; start the job again to do so"
            )

    def _sources(self) -> list[Source]:
        exchange = Exchange(self._rank, self._size) if self._size > 1 else None
        # All ranks agree on this: either every node has them all, or none has.
        several = len(self._host.local_slots) < self._size
        sources: list[Source] = [MemorySource(self._host.keeper, exchange if several else None)]
        if self._tier is not None:
            sources.append(TierSource(self._tier, exchange))
        return sources

    def _choose(self, past: dict[int, int | None], damaged: list[tuple[str, Key]]) -> dict[str, Any]:
        """Rank 0 decides for all, so that a tier that changes meanwhile cannot split them."""
        if self._rank == 0:
            try:
                return self._exchange(self._chosen(past, damaged))
            except ResilientError as error:
                self._exchange({"error": str(error)[: _PAGE // 16]})
                raise
        choice = self._exchange(None)
        if "error" in choice:
            raise PeerFailed(f"rank 0 found nothing out about states to restore: {choice['error']}")
        return choice

    def _chosen(self, past: dict[int, int | None], damaged: list[tuple[str, Key]]) -> dict[str, Any]:
        place, key, without = "", None, tuple[int, ...]()
        for source in self._sources():
            whole = [state for state in source.candidates(past) if (source.name, state.key) not in damaged]
            if whole and (key is None or whole[0].key > key):
                place, key, without = source.name, whole[0].key, whole[0].without
            if key is not None and self._restores and key.step >= self._host.finished_steps() - NEAR:
                # Within a job, what is durable was in memory before; and of lost nodes' memory copies are kept, which
                # are hardly older, if there is room for them.
                break
        return {"place": place, "key": key, "without": without, "lineage": self._next_lineage(key)}

    def _next_lineage(self, key: Key | None) -> int:
        """A number that no state at the URL and none of this job was computed under."""
        generation = self._host.generation
        if self._restores:
            last = self._restores[-1]
            return generation + last.lineage - last.generation
        older = max(source.newest_lineage() for source in self._sources())
        return generation + max(older, key.lineage if key else 0)

    def _exchange(self, value: dict[str, Any] | None) -> dict[str, Any]:
        """What rank 0 passes, on every rank."""
        if self._size == 1:
            assert value is not None
            return value
        # Not through the store, which launchers keep from one attempt to the next with all that was said in it.
        device = self._host.device
        text = json.dumps(value).encode() if value is not None else b""
        page = torch.frombuffer(bytearray(text.ljust(_PAGE)), dtype=torch.uint8).to(device)
        dist.broadcast(page, 0)
        received: dict[str, Any] = json.loads(page.cpu().numpy().tobytes())
        return received

    def _try(self, place: str, state: Candidate) -> tuple[Exception | None, dict[str, bool]]:
        """Fill the state: (the error, if there is one: the other ranks must hear of it before it is raised, which
        tensors were left to other ranks)."""
        source = next(source for source in self._sources() if source.name == place)
        images: Images | None = None
        try:
            with source.open(state, self._rank) as images:
                left = fill(self._state, images, self._rank, self._size, self._restore_threads(source))
                self._volume = images.brought, images.moved, images.passed
                self._rates = images.rates
                return None, left
        except Exception as error:
            if images is not None and images.adrift:
                raise
            # Whatever it is, memory that is not to be had for instance: the others wait to hear how it went.
            return error, {}

    def _cost(self, seconds: float) -> str:
        volume = torch.tensor(self._volume, dtype=torch.int64, device=self._host.device)
        if self._size > 1:
            dist.all_reduce(volume)
        brought, moved, passed = (f"{count / (1 << 20):,.1f} MiB" for count in volume.tolist())
        between = f", {moved} of it over connections of keepers" if volume[1] else ""
        between += f", {passed} over the process group" if volume[2] else ""
        if self._rates is not None:
            between += " (measured: {:.2f} and {:.2f} GiB/s)".format(*(rate / (1 << 30) for rate in self._rates))
        return f"{brought} in {seconds:.2f} s{between}"

    def _check_all_wanted(self, left: dict[str, bool]) -> None:
        """Where ranks have parts of their own, nothing of the checkpoint may have been left to others by all of them.

        Raises:
            StateMismatch: naming it.
        """
        if not left:
            return
        by_all = torch.tensor(list(left.values()), dtype=torch.uint8, device=self._host.device)
        if self._size > 1:
            dist.all_reduce(by_all, op=dist.ReduceOp.MIN)
        names = [name for name, nobodys in zip(left, by_all.tolist(), strict=True) if nobodys]
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise StateMismatch(f"the checkpoint holds {names[0]}{more}, which no rank's state has")

    def _restore_threads(self, source: Source) -> int:
        """This rank's share of the processor's cores; more where they would only wait."""
        share = len(os.sched_getaffinity(0)) // len(self._host.local_slots)
        return NETWORK_READS if source.waits else max(1, min(share, MOST_RESTORE_THREADS))

    def _all_well(self, trouble: int, choice: dict[str, Any]) -> tuple[int, int]:
        """(the worst trouble of any rank, the first rank that has damage), all having made the same choice.

        0 is no trouble, 1 damage, 2 any other error.

        Here the ranks learn, too, whether their states are of the same make, so that any rank's image tells of all.
        """
        if self._size == 1:
            return trouble, self._rank
        made = self._state.make()
        chosen, make = checksum(json.dumps(choice).encode()), self._rank if made is None else checksum(made)
        told = [trouble, chosen, -chosen, make, -make, -self._rank if trouble == 1 else -self._size]
        flags = torch.tensor(told, dtype=torch.int64, device=self._host.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        worst, highest, lowest, one, other, first = flags.tolist()
        if -lowest != highest:
            raise ConfigError("the ranks were about to restore different states: restore() must be called by all alike")
        self._alike = one == -other
        return int(worst), int(-first)
