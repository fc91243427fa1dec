"""One image after the other, copied while training goes on.

Theory of operation.  Parameters and optimizer state do not change between one optimizer step and the next.  So a
snapshot begins at a step boundary and its large parts are copied by native threads during the next forward and
backward; a *fence*, run before any optimizer steps and at the next boundary, waits for them.  As soon as the copy is
complete a thread publishes the image, so that a loss in the middle of a step still finds it.

A boundary without a snapshot is kept in mind (`resilient_train.worker.live`): if the world ends before an optimizer
steps, its image is made of the tensors as they stand there.

A CUDA device copies by itself, and computes behind its host: the fence has its computing stream wait, the host goes on.
Where the engine cannot work with the device, torch copies at the boundary, and the training waits for it.

What does not keep to this is found out (`resilient_train.image.snapshot` says how) and copied at the boundary from then
on: its image is dropped, and its name is said once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from resilient_train.errors import UnsupportedState
from resilient_train.image.device import give_up
from resilient_train.image.native import CudaError
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.spec.shard import plan_image
from resilient_train.spec.world import Key
from resilient_train.worker.host import Host
from resilient_train.worker.live import LiveState
from resilient_train.worker.slots import OwnSlot
from resilient_train.worker.state import Frame, State

logger = logging.getLogger(__name__)

AT_ONCE = 4 << 20
"""Images up to this many bytes are waited for at the boundary: they take less than a millisecond."""
FIRST_AUDITS = 3
"""The first snapshots of a generation are audited, and every `AUDIT_EVERY`th."""
AUDIT_AFTER = 20.0
"""Seconds after an audit from which on a snapshot that is to be made durable is audited."""
AUDIT_EVERY = 100


@dataclass(kw_only=True)
class _Running:
    """A snapshot that has begun."""

    writer: ImageWriter
    slot: OwnSlot
    key: Key
    host: Host
    audit: bool
    lock: threading.Lock = field(default_factory=threading.Lock)
    concluded: bool = False
    torn: list[str] = field(default_factory=list)
    failure: str = ""
    """Why the device did not copy, if so."""
    abandoned: bool = False
    """The device has not got there, and what it computes now means nothing."""

    def fence(self) -> None:
        """Let the device's later work change what is being copied."""
        with self.lock:
            if not self.failure and (self.audit or not self.concluded):
                try:
                    self.writer.fence()
                except CudaError as error:
                    self.failure = str(error)

    def conclude(self) -> None:
        """Publish the image once its copy is complete; by whoever comes first, this thread or the publisher's."""
        with contextlib.suppress(CudaError):
            self.writer.wait()
        with self.lock:
            if self.concluded:
                return
            self.concluded = True
            dropped = self.abandoned
            try:
                self.torn = self.writer.conclude(drop=dropped)
            except CudaError as error:
                self.failure = str(error)
                return
            if not self.torn and not dropped:
                self.slot.key = self.key
                self.host.board.report_published(self.host.index, self.key)


class Snapshots:
    """The snapshots of one generation."""

    def __init__(self, state: State, host: Host, rank: int, size: int, *, lazy: bool) -> None:
        """Args:
        state: what to save.
        host: this process's slots and board.
        rank: this rank.
        size: the world size.
        lazy: copy while training goes on.
        """
        self._state = state
        self._host = host
        self._rank = rank
        self._size = size
        self._lazy = lazy
        self._frame: Frame | None = None
        self._writer: ImageWriter | None = None
        self._order: list[int] = []
        self._eager: set[str] = set()
        self._process = os.getpid()
        self._taken = 0
        self._audited_at = 0.0
        self._running: _Running | None = None
        self.alike = False
        """Whether all ranks' states have the same names, shapes and layouts."""
        self.newest: Key | None = None
        """The newest state that was begun and not dropped."""
        self._live: LiveState | None = None
        self._keeps = lazy
        """Whether boundaries without a snapshot are kept in mind."""
        self._kept = 0
        """How many there were; those whose number is a power of 2 are audited."""
        self._queue: queue.SimpleQueue[_Running | None] = queue.SimpleQueue()
        self._aborted = False
        self._hook: RemovableHandle | None = None
        self._undisturbed = False
        if lazy:
            self._publisher = threading.Thread(target=self._publish, name="publish", daemon=True)
            self._publisher.start()

    def take(
        self, key: Key, safe: Key | None, past: Mapping[int, int | None], *, durable: bool = False, last: bool = False
    ) -> bool:
        """Begin an image of the state as it is now; False if there is no slot for it.

        Args:
            key: the state's identity.
            safe: the newest state that every rank has published.
            past: the job's ancestry.
            durable: whether it is to be made durable.
            last: whether it is waited for before anything else happens, so that nothing can tear it.

        Raises:
            UnsupportedState: naming what cannot be saved.
            MemoryRefused: if there is no memory for the image.
        """
        self.settle()
        if self._lazy:
            self._guard()
        now = time.monotonic()
        number = self._taken + 1
        regular = number <= FIRST_AUDITS or number % AUDIT_EVERY == 0
        due = regular or (durable and now >= self._audited_at + AUDIT_AFTER)
        audit = self._lazy and due and not last
        try:
            begun = self._begin(key, safe, past, audit)
        except CudaError as error:
            self._without_device(str(error))
            begun = self._begin(key, safe, past, audit)
        if begun and audit:
            self._audited_at = now
        return begun

    def _begin(self, key: Key, safe: Key | None, past: Mapping[int, int | None], audit: bool) -> bool:
        frame = self._state.capture(self._rank, self._frame)
        writer = self._planned(frame)
        parts = [frame.parts[index] for index in self._order]
        for slot in self._host.slots.writable(writer.layout.total, safe, past):
            slot.key = None
            if writer.begin(slot.memory, key, parts, frame.document, audit=audit):
                self._taken += 1
                self._forget_live()
                self.newest = key
                self._running = _Running(writer=writer, slot=slot, key=key, host=self._host, audit=audit)
                if self._lazy and (writer.on_device or writer.layout.total > AT_ONCE):
                    self._queue.put(self._running)
                else:
                    self._running.conclude()
                return True
        return False

    def keep(self, key: Key) -> None:
        """Keep in mind the state as it is now, which gets no image unless `publish_live` makes one."""
        self._forget_live()
        self.settle()
        if not self._keeps:
            return
        self._guard()
        try:
            frame = self._state.capture(self._rank, self._frame, glance=True)
            writer = self._planned(frame)
        except (UnsupportedState, CudaError):
            return  # The next snapshot says so.
        self._kept += 1
        try:
            why_not = self._put_aside(writer, frame, key)
        except CudaError as error:
            why_not = str(error)
        if why_not:
            self._keep_no_more(why_not)

    def _keep_no_more(self, why: str) -> None:
        logger.info("a loss costs the steps since the last snapshot, not only the unfinished one: %s", why)
        self._keeps, self._live = False, None

    def _put_aside(self, writer: ImageWriter, frame: Frame, key: Key) -> str:
        """Why not, if so."""
        if self._live is None or self._live.layout is not writer.layout:
            parts = [self._lazily(frame.parts[index]) for index in self._order]
            why_not = LiveState.why_not(parts, frame.known)
            if why_not:
                return why_not
            self._live = LiveState(writer.layout, parts, self._order, frame.known, self._rank, self._size)
        if self._aborted:
            self._live.abandon()
        self._live.keep(key, frame.parts, frame.document, audit=self._kept & (self._kept - 1) == 0)
        return ""

    def publish_live(self, safe: Key | None, past: Mapping[int, int | None]) -> Key | None:
        """Make an image of the last boundary, if it has none and the live tensors still hold its state; its key.

        Args:
            safe: the newest state that every rank has published.
            past: the job's ancestry.

        Raises:
            MemoryRefused: if there is no memory for it.
        """
        try:
            return self._write_live(safe, past)
        except CudaError as error:
            self._without_device(str(error))
        try:
            return self._write_live(safe, past)  # By torch.
        except CudaError:
            return None

    def _write_live(self, safe: Key | None, past: Mapping[int, int | None]) -> Key | None:
        live = self._live
        if live is None or live.key is None or not live.is_clean():
            return None
        size = live.layout.total
        more = map(self._host.slots.one_more, [size])
        for slot in itertools.chain(self._host.slots.writable(size, safe, past), more):
            if slot is None:
                break
            slot.key = None
            try:
                if live.write(slot.memory):
                    slot.key = live.key
                    return live.key
            finally:
                slot.memory.unlock()
            if not live.is_clean():
                break
        return None

    def _forget_live(self) -> None:
        live = self._live
        if live is not None and live.key is not None:
            live.forget()
            try:
                changed = live.changed()
            except CudaError as error:
                self._keep_no_more(str(error))
            else:
                self._copy_at_once(changed)

    def settle(self) -> OwnSlot | None:
        """Wait until no copy is running; the slot of the newest image, if it was published."""
        running = self._running
        if running is None:
            return None
        if running.writer.on_device:
            running.fence()
        running.conclude()
        self._running = None
        if running.failure:
            logger.warning("the snapshot of %s is dropped", running.key)
            self.newest = None
            self._without_device(running.failure)
            return None
        if running.abandoned and running.slot.key != running.key:
            logger.info("the snapshot of %s is dropped: the world ended before its state was computed", running.key)
            self.newest = None
            return None
        if running.audit:
            self._copy_at_once(running.writer.changed())
        if not running.torn:
            return running.slot
        self._copy_at_once(running.torn)
        logger.warning("the snapshot of %s is dropped", running.key)
        self.newest = None
        return None

    def abandon(self) -> None:
        """Publish no state that a device has not computed yet: the collectives behind it are to be aborted.

        From any thread; waits for nothing, because without the abort the device may never get there.
        """
        running = self._running
        if running is not None and running.writer.on_device:
            running.abandoned = True
        self._aborted = True
        live = self._live
        if live is not None:
            live.abandon()

    def close(self) -> None:
        """Finish what is running and let go of the state."""
        self.settle()
        if self._hook is not None:
            self._hook.remove()
        if self._lazy:
            self._queue.put(None)
            self._publisher.join()
        self._frame = self._writer = self._live = None
        with contextlib.suppress(AttributeError):
            del self._state

    def _guard(self) -> None:
        """Have every optimizer fence before it steps; outside of what `torch.compile` looks at, once it is in use."""
        compiler = "torch._dynamo" in sys.modules
        if self._hook is None or compiler != self._undisturbed:
            if self._hook is not None:
                self._hook.remove()
            # To ask for it unasked would import the compiler, which takes 2 s.
            fence = torch.compiler.disable(self._fence) if compiler else self._fence
            self._hook, self._undisturbed = register_optimizer_step_pre_hook(fence), compiler

    def _fence(self, *_: object) -> None:
        """Before any optimizer changes anything."""
        if os.getpid() != self._process:
            return  # A forked process has copies of the tensors, and none of the threads.
        self._forget_live()
        running = self._running
        if running is None:
            return
        if running.writer.on_device:
            running.fence()
        else:
            running.conclude()
            if running.audit:
                running.audit = False
                self._copy_at_once(running.writer.changed())

    def _publish(self) -> None:
        while (running := self._queue.get()) is not None:
            running.conclude()

    def _without_device(self, why: str) -> None:
        """From now on, have torch copy what stands on devices."""
        give_up(why)
        self._writer = None

    def _copy_at_once(self, names: list[str]) -> None:
        """From now on, copy these entries at the boundary."""
        new = set(names) - self._eager
        if new:
            some = ", ".join(sorted(new)[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
            logger.warning(
                "changed outside of an optimizer step, and so copied at step boundaries from now on: %s", some
            )
            self._eager |= new
            self._writer = None

    def _planned(self, frame: Frame) -> ImageWriter:
        """The writer for this frame, planned again when anything but the contents has changed."""
        writer, before = self._writer, self._frame
        if (
            writer is not None
            and before is not None
            and frame.known is before.known
            and len(frame.document) <= writer.layout.json_capacity
            and [p.entry for p in frame.parts[len(frame.known.capture.parts) :]]
            == [p.entry for p in before.parts[len(before.known.capture.parts) :]]
        ):
            self._frame = frame
            return writer
        entries = [part.entry for part in frame.parts]
        twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
        if twice:
            raise UnsupportedState(f"several parts of the state have the same name: {', '.join(sorted(twice)[:10])}")
        same = writer is not None and len(frame.document) <= writer.layout.json_capacity
        capacity = writer.layout.json_capacity if same and writer is not None else _roomy(len(frame.document))
        layout = plan_image(entries, capacity, alike=self.alike)
        index = {entry.name: i for i, entry in enumerate(entries)}
        order = [index[entry.name] for entry in layout.entries]
        writer = ImageWriter(layout, [self._lazily(frame.parts[i]) for i in order], self._rank, self._size)
        # Together and last: after an error here the next frame must not pass for the one that this writer was made for.
        self._writer, self._frame, self._order = writer, frame, order
        return writer

    def _lazily(self, part: Part) -> Part:
        lazy = part.lazy and self._lazy and part.entry.name not in self._eager
        return part if lazy == part.lazy else replace(part, lazy=lazy)


def _roomy(size: int) -> int:
    return size + max(4096, size // 4)
