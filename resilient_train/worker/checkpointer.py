"""``Checkpointer``: the state of a training, kept safe at step boundaries and found again after anything."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Iterator

import torch.distributed as dist

from resilient_train.errors import ConfigError, ResilientError, StorageError
from resilient_train.plan.interval import parse_interval
from resilient_train.spec.messages import Policy, Published
from resilient_train.spec.parity import parse_redundancy
from resilient_train.spec.world import MAX_STEP, Key, Restore, ancestry
from resilient_train.storage.filesystem import open_tier
from resilient_train.worker import host
from resilient_train.worker.restoring import Restoring
from resilient_train.worker.session import LeaveGeneration
from resilient_train.worker.slots import OwnSlot
from resilient_train.worker.snapshots import Snapshots
from resilient_train.worker.sources import MemorySource
from resilient_train.worker.state import State
from resilient_train.worker.world import World

logger = logging.getLogger(__name__)

LAST_SLOT_TIMEOUT = 600.0
"""Seconds to wait for a free slot where a state must be saved: at the end, and before a planned change."""
MOST_REPLICAS = 16
"""More copies than anybody has memory for."""
_writable: set[str] = set()
"""Locations that have been checked."""


class Checkpointer:
    """Snapshots to shared memory at step boundaries, persists them in the background, restores the newest.

    Args:
        state: what to save.
        url: where to make it durable: a path or any URL that fsspec knows. None: memory only.
        world: the elastic function's `World`; None outside of one.
        snapshot_every: steps between snapshots to memory. After a loss the steps in between are found in the survivors'
            own tensors, on CPUs, where replicas cover the state.
        persist_every: steps between durable checkpoints, or seconds (``"300s"``), or ``"auto"``: every 30 s, less
            often where writing takes more than a tenth of the time. The last state is made durable in any case when
            the job ends.
        replicas: other nodes on which the memory of each node's images is copied, in the background: so many nodes can
            be lost at once, with nothing lost that was copied. They stand in other zones, racks or switches as far as
            ``rtrun --label`` says that there are any. Each takes memory for two images of every rank that is copied
            to it. 0: none. The same on all ranks.
        redundancy: ``"xor:N"`` for parities instead of copies: of every N nodes (or fewer, which stand apart as copies
            do) one can be lost, and each takes memory for 1/(N-1) of what copies would take. Sending is as much, and
            making a lost image again reads N-1 times as much. The same on all ranks.
        keep_last: durable checkpoints to keep.
        bandwidth: bytes per second that each node may write to ``url``, and as many that it may send to other nodes as
            copies, so that saving leaves the network to the training. None: no limit.
        lazy: copy parameters and optimizer state during the next forward and backward, up to the next
            ``optimizer.step()``. False: copy everything at the boundary, which is needed where optimizers step without
            their hooks (captured CUDA graphs).

    Raises:
        ConfigError: for a malformed argument.
        StorageError: if nothing can be written at ``url``.

    Example::

        ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), "s3://bucket/run-1", world=world)
        for step in ckpt.steps(10_000):
            ...
    """

    def __init__(
        self,
        state: State,
        url: str | os.PathLike[str] | None = None,
        *,
        world: World | None = None,
        snapshot_every: int = 1,
        persist_every: int | str = "auto",
        replicas: int = 1,
        redundancy: str | None = None,
        keep_last: int = 3,
        bandwidth: float | None = None,
        lazy: bool = True,
    ) -> None:
        if not isinstance(state, State):
            raise ConfigError(f"Checkpointer needs an rt.State, got {type(state).__name__}")
        for name, value in (("snapshot_every", snapshot_every), ("keep_last", keep_last)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number and at least 1, it is {value!r}")
        if type(replicas) is not int or not 0 <= replicas <= MOST_REPLICAS:
            raise ConfigError(f"replicas must be a whole number from 0 to {MOST_REPLICAS}, it is {replicas!r}")
        group = 0
        if redundancy is not None:
            try:
                group = parse_redundancy(redundancy)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            if replicas != 1:
                raise ConfigError(f"redundancy={redundancy!r} takes the place of copies; leave replicas out")
        if bandwidth is not None and not (
            isinstance(bandwidth, (int, float)) and not isinstance(bandwidth, bool) and 0 < bandwidth < float("inf")
        ):
            raise ConfigError(f"bandwidth must be a number of bytes per second, it is {bandwidth!r}")
        if isinstance(url, os.PathLike):
            url = os.fspath(url)
        if url is not None and (not isinstance(url, str) or not url or re.match(r"[a-z0-9]{2,}:/[^/]", url)):
            raise ConfigError(f"url must be a path or a URL such as s3://bucket/run, it is {url!r}")
        if url is not None and url.startswith("memory:"):
            raise ConfigError(f"url {url!r} lasts no longer than one process; without a url states are kept in memory")
        if world is not None and not isinstance(world, World):
            raise ConfigError(f"world must be the World that the elastic function got, it is {world!r}")
        try:
            self._every_steps, self._every_seconds = parse_interval(persist_every)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._state = state
        self._snapshot_every = snapshot_every
        self._host = host.connect(url)
        self._tier = open_tier(url) if url is not None else None
        if self._tier is not None:
            assert url is not None
            if url not in _writable and not self._host.restores():
                # Once per job: a recovery must not wait for storage, nor end with it.
                self._tier.check_writable()
                _writable.add(url)
            self._host.keeper.set_policy(
                Policy(
                    url=url,
                    every_steps=self._every_steps,
                    every_seconds=self._every_seconds,
                    keep_last=keep_last,
                    bytes_per_second=float(bandwidth or 0),
                )
            )
        self._host.claim()
        self._host.board.report_every(self._host.index, snapshot_every)
        self._host.board.report_copies(self._host.index, replicas, math.ceil(min(bandwidth or 0, 1 << 60)), group)
        self._host.board.report_published(self._host.index, None)
        alone = world is None and not dist.is_initialized()
        self._rank = world.rank if world is not None else 0 if alone else dist.get_rank()
        self._size = world.size if world is not None else 1 if alone else dist.get_world_size()
        self._snapshots = Snapshots(state, self._host, self._rank, self._size, lazy=lazy)
        self._to_hand_over: Key | None = None
        self._covered = 0
        """The step up to which whatever had to be persisted was handed over."""
        self._lineage = 0
        self._restores: list[Restore] = []
        self._base: Key | None = None
        self._handed_over: Key | None = None
        self._pending: set[Key] = set()
        self._failed: tuple[Key, str] | None = None
        """The newest state that could not be made durable, if none that is newer was; and why."""
        self._skipped = 0
        self._closed = False
        self._last = False
        """Whether no further step is expected."""
        self._step: int | None = None
        self._host.on_leave(self._detach)
        self._host.before_abort(self._snapshots.abandon)
        self._host.before_end = self._finish

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def steps(self, total: int) -> Iterator[int]:
        """Restore, then count the steps that are left: from the number of finished steps up to ``total - 1``.

        Between two steps the state is snapshotted, and planned changes of the world take place.
        """
        _check_steps("steps", total)
        first = self.restore() if self._step is None else self._step
        if first >= total and self._rank == 0 and len(self._restores) == 1:
            logger.warning("%d steps were asked for and %d are finished: there is nothing left to train", total, first)
        self._host.begin_steps(first, total)
        for step in range(first, total + 1):
            if step > first:
                self._host.stage("first_step")
            try:
                self._boundary(step, total)
            except LeaveGeneration:
                # This step is finished all the same; the one before may have to be handed over still.
                self._finish()
                newest = self._snapshots.newest
                if newest is not None and newest < Key(self._lineage, step):
                    self._snapshots.keep(Key(self._lineage, step))
                raise
            if step < total:
                yield step

    def _boundary(self, step: int, total: int) -> None:
        self._step = step
        stopping = self._host.reach(step)
        if self._to_hand_over is not None:
            self._finish()
        newest = self._snapshots.newest
        due = step % self._snapshot_every == 0 or newest is None or step == total or stopping
        last = step == total or stopping
        self._last = last
        if due and newest != Key(self._lineage, step) and not self.snapshot() and last:
            with self._host.long_operation("waiting for storage"):
                self._snapshot_at_last()
        if not due:
            self._snapshots.keep(Key(self._lineage, step))
        if last:
            self._finish()
        if stopping:
            self._host.leave_at_boundary()
        self._host.wait_for_word()

    def _snapshot_at_last(self) -> None:
        """This state must not be lost, so wait until storage has let go of a slot."""
        deadline = time.monotonic() + LAST_SLOT_TIMEOUT
        said = time.monotonic()
        while not self.snapshot():
            now = time.monotonic()
            if now > deadline:
                raise StorageError(
                    f"step {self._step} cannot be saved: writing earlier states did not end within"
                    f" {LAST_SLOT_TIMEOUT:g} s, and they hold all image slots"
                )
            if now > said + 10:
                logger.warning("waiting for storage to let go of a slot, to save step %s", self._step)
                said = now
            self._hear_keeper(1.0)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def snapshot(self, step: int | None = None) -> bool:
        """Save the state as it is now to shared memory; whether there was a free slot for it.

        Returns at once; the copy is complete before the next optimizer step.

        Must be called by all ranks at the same step, after `restore` or within `steps`.

        Args:
            step: number of finished steps, in loops that do not use `steps`.

        Raises:
            ConfigError: if there was no `restore` before, or ``step`` goes back.
            UnsupportedState: naming what cannot be saved.
            MemoryRefused: if there is no memory for the image.
        """
        self._host.leave_if_over()
        self._check_open()
        if step is not None:
            _check_steps("snapshot", step)
        if self._step is None:
            raise ConfigError("snapshot() needs to know where it is: call restore() or steps() first")
        self._step = self._step if step is None else step
        key = Key(self._lineage, self._step)
        newest = self._snapshots.newest
        if newest is not None and key <= newest:
            raise ConfigError(
                f"there is a snapshot of step {newest.step} already; outside of steps(), say snapshot(step)"
                " with the number of finished steps, which only grows"
            )
        self._finish()
        self._host.report(key.step)
        self._hear_keeper()
        durable = self._to_persist(self._covered, key.step)
        if self._snapshots.take(key, self._safe(), self._past(), durable=durable, last=self._last):
            if durable:
                self._to_hand_over = key
            else:
                self._covered = key.step
            return True
        self._snapshots.keep(key)
        self._skipped += 1
        if self._skipped & (self._skipped - 1) == 0:
            logger.warning(
                "no free slot for the snapshot of %s: %d skipped so far; storage, or a rank that is behind, holds them",
                key,
                self._skipped,
            )
        return False

    def persist(self) -> bool:
        """Make the state of the last snapshot durable in the background; whether there is something to wait for.

        Must be called by all ranks at the same step.

        Raises:
            ConfigError: without a URL.
        """
        self._check_open()
        if self._tier is None:
            raise ConfigError("this Checkpointer has no URL to persist to")
        self._finish()
        self._hear_keeper()
        slot = next((s for s in self._host.slots.all() if s.key is not None and s.key == self._snapshots.newest), None)
        if slot is None or slot.key is None or self._handed_over == slot.key:
            return False
        self._hand_over(slot, slot.key)
        return True

    def wait(self, timeout: float = 600.0) -> None:
        """Wait until everything that was handed over to be persisted is durable.

        Raises:
            StorageError: if it cannot be made durable, or not within ``timeout`` seconds.
        """
        self._check_open()
        self._finish()
        deadline = time.monotonic() + timeout
        with self._host.long_operation("waiting for storage"):
            while True:
                self._hear_keeper(max(0.0, deadline - time.monotonic()) if self._pending else 0.0)
                if not self._pending:
                    break
                if time.monotonic() >= deadline:
                    raise StorageError(f"not everything became durable within {timeout:g} s")
        failed, self._failed = self._failed, None
        if failed is not None:
            raise StorageError(f"{failed[0]} is not durable: {failed[1]}")

    def close(self) -> None:
        """Let go of the keeper. Where no agent runs it, the last state is durable when this returns, on all ranks.

        Raises:
            StorageError: if it could not be made durable.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._finish()
        finally:
            self._snapshots.close()
            self._host.release()
        unsaved = self._host.close()
        if unsaved:
            raise StorageError(unsaved)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this Checkpointer is closed")

    def _finish(self) -> None:
        """Wait for the snapshot that is being copied, and hand it over if it is to be persisted."""
        slot = self._snapshots.settle()
        key, self._to_hand_over = self._to_hand_over, None
        if slot is not None and key is not None and slot.key == key:
            self._hand_over(slot, key)

    def _safe(self) -> Key | None:
        """The newest state that every rank has published: what is older may be overwritten."""
        step = self._host.board.watermark(self._lineage, self._host.local_slots)
        return Key(self._lineage, step) if step >= 0 else self._base

    def _past(self) -> dict[int, int | None]:
        return ancestry(self._restores)

    def _to_persist(self, previous: int, step: int) -> bool:
        """Whether a named step lies between two snapshots: the same on every rank, whatever ``snapshot_every`` is."""
        if self._tier is None:
            return False
        if self._every_steps:
            return step // self._every_steps > previous // self._every_steps
        return previous < self._host.board.persist_at() <= step

    def _hand_over(self, slot: OwnSlot, key: Key) -> None:
        slot.held = True
        self._handed_over = key
        self._covered = key.step
        self._pending.add(key)
        past = [[lineage, bound] for lineage, bound in self._past().items()]
        self._host.keeper.hand_over(
            Published(
                slot=slot.number,
                lineage=key.lineage,
                step=key.step,
                rank=self._rank,
                world=self._size,
                local=len(self._host.local_slots),
                past=past,
            )
        )

    def _hear_keeper(self, timeout: float = 0.0) -> None:
        """Take in what the keeper reports."""
        news = self._host.keeper.news(timeout)
        if self._host.keeper.replaced:
            self._host.keeper.replaced = False
            if self._host.keeper.started_here:
                # The new one knows nothing of the images of the old one.
                self._host.slots.close()
            self._host.slots.release_all()
            if self._pending:
                self._failed = max(self._pending), "the keeper died before it had persisted everything; another goes on"
            self._pending.clear()
            return
        for item in news:
            key = Key(item.lineage, item.step)
            self._host.slots.released(key)
            self._pending.discard(key)
            if not item.error and self._failed is not None and key >= self._failed[0]:
                self._failed = None
            if item.error:
                self._failed = max(self._failed or (key, ""), (key, item.error))
                if self._rank == 0 and self._host.keeper.started_here:  # An agent says it itself.
                    newer = self._handed_over is not None and key < self._handed_over
                    logger.log(logging.INFO if newer else logging.WARNING, "%s is not durable: %s", key, item.error)

    # ---- restoring --------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Fill the state from the newest complete copy left anywhere; the number of finished steps in it.

        Must be called by all ranks. A fresh start leaves the state as it is and returns 0.

        Raises:
            ConfigError: if this Checkpointer has restored before.
            StateMismatch: if the newest state is of another model.
            CheckpointDamaged: if there are states and every one is damaged.
            StorageError: if the location cannot be read.
        """
        if self._step is not None:
            raise ConfigError("this Checkpointer has restored already, and a step is computed once per lineage")
        with self._host.long_operation("restoring"):
            restored = Restoring(self._state, self._host, self._tier, self._rank, self._size).newest()
        self._snapshots.alike = restored.alike
        key, self._lineage = restored.key, restored.lineage
        self._base, self._step = key, key.step if key else 0
        # A state in memory may have been due, and its world lost before all of it had handed it over.
        handed_over = key is None or restored.place != MemorySource.name
        self._covered = self._step if handed_over else self._step - self._snapshot_every
        restore = Restore(generation=self._host.generation, lineage=self._lineage, source=key)
        self._restores = [*self._host.restores(), restore]
        before = bool(self._host.restores())
        text = f"a fresh start{', nothing being left of the generations before' * before}"
        text = f"{key} from {restored.place}, {restored.cost}" if key else text
        if self._rank == 0:
            logger.info("generation %d resumes %s", self._host.generation, text)
            self._host.resumed(restore, text)
        self._host.stage("restored")
        return self._step

    def _detach(self) -> None:
        """The generation is over: let go of the model."""
        try:
            self._finish()
            if self._host.goes_on():
                self._publish_live()
        finally:
            self._snapshots.close()
            del self._state
            self._host.release()

    def _publish_live(self) -> None:
        """Leave behind the last boundary's state, if only the live tensors hold it."""
        try:
            key = self._snapshots.publish_live(self._safe(), self._past())
        except ResilientError as error:
            logger.warning("the steps since the last snapshot are lost on this rank: %s", error)
            return
        if key is not None:
            logger.info("%s is saved as it was left", key)


def _check_steps(name: str, count: object) -> None:
    if type(count) is not int or not 0 <= count <= MAX_STEP:
        raise ConfigError(f"{name}() needs a number of steps from 0 to {MAX_STEP}, it got {count!r:.50}")
