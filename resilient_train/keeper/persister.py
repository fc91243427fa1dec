"""The thread that writes states, one after the other, and looks after those that other nodes write too.

What this node has written of a state is durable only when the manifest is there.  Between its own part and that it
neither keeps the images nor waits: it looks from time to time, between the states that it writes, and not for ever.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from resilient_train.errors import OutsideError, ReplicasDiffer, ResilientError
from resilient_train.keeper.persist import Job, Written, look, persist
from resilient_train.spec.world import Key
from resilient_train.storage.commit import folder_of
from resilient_train.storage.filesystem import open_tier

_OTHERS = 30.0
"""Seconds that other nodes may take longer than four times as long as this one."""
_FIRST_LOOK, _LONGEST = 0.05, 2.0
"""Seconds until the first look at what others have written, and most between two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a `Job`; of one that is `awaited` another one comes, which is `late`."""

    job: Job
    """The job."""
    error: str = ""
    """Why the state is not durable; empty if it is, or may still be."""
    awaited: bool = False
    """Whether this node's part is written, and others' are not."""
    late: bool = False
    """Whether this is what became of it after that."""
    seconds: float = 0.0
    """How long it took to write."""
    nbytes: int = 0
    """Bytes written."""

    @property
    def cost(self) -> str:
        """For people."""
        return f"{self.nbytes:,} bytes in {self.seconds:.2f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    outcome: Outcome
    written: Written
    deadline: float

    @property
    def job(self) -> Job:
        return self.outcome.job


class Persister:
    """One background thread; jobs one after the other."""

    def __init__(self, done: Callable[[Outcome], None]) -> None:
        """Args:
        done: called from the thread with each outcome.
        """
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._done = done
        self._waiting: dict[Key, _Waiting] = {}
        self._differing: int | None = None
        """The lineage whose nodes were found to differ in what they hold alike, and so do not divide it."""
        self._useless: tuple[str, Key] | None = None
        """The state over which that was found, and where it is."""
        self._delay = _FIRST_LOOK
        self._thread = threading.Thread(target=self._run, name="persist", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Persist ``job`` after those before it."""
        self._queue.put(job)

    def _run(self) -> None:
        while True:
            try:
                job = self._queue.get(timeout=self._delay if self._waiting else None)
            except queue.Empty:
                self._delay = min(2 * self._delay, _LONGEST)
                self._look()
                continue
            self._look()
            self._write(job)

    def _write(self, job: Job) -> None:
        self._waiting.pop(job.key, None)
        began = time.monotonic()
        try:
            tier = open_tier(job.url)
            if self._useless is not None:
                # By now all keepers have seen it, or are about to see this one.
                with contextlib.suppress(OutsideError):
                    open_tier(self._useless[0]).delete(folder_of(self._useless[1]))
                self._useless = None
            written = persist(tier, job, divide=self._differing != job.key.lineage)
        except Exception as failure:  # Whatever it is, it must not end the thread that later states depend on.
            self._hear(failure, job)
            self._done(Outcome(job=job, error=_said(failure), seconds=time.monotonic() - began))
            return
        now = time.monotonic()
        outcome = Outcome(job=job, awaited=not written.committed, seconds=now - began, nbytes=written.nbytes)
        if outcome.awaited:
            deadline = now + _OTHERS + 3 * outcome.seconds
            self._waiting[job.key] = _Waiting(outcome=outcome, written=written, deadline=deadline)
            self._delay = _FIRST_LOOK
        self._done(outcome)

    def _hear(self, failure: Exception, job: Job) -> None:
        """What is wrong with a state may say how to write the next one: training goes on, and has to be saved."""
        if isinstance(failure, ReplicasDiffer):
            # The next generation restores one of them on all nodes.
            self._differing, self._useless = job.key.lineage, (job.url, job.key)

    def _look(self) -> None:
        """See what became of states that others write too."""
        for url in {waiting.job.url for waiting in self._waiting.values()}:
            folders, failure = {}, ""
            try:
                folders = open_tier(url).folders()
            except Exception as trouble:
                failure = _said(trouble)
            for waiting in [waiting for waiting in self._waiting.values() if waiting.job.url == url]:
                self._settle(waiting, folders, failure)

    def _settle(self, waiting: _Waiting, folders: dict[str, set[str]], failure: str) -> None:
        job, part = waiting.job, waiting.written.part
        newest, over = None, False
        try:
            newest = look(open_tier(job.url), folders, part, job.keep_last, job.word)
        except ReplicasDiffer as trouble:
            self._hear(trouble, job)
            failure, over = _said(trouble), True
        except Exception as trouble:
            failure = _said(trouble)  # It may be gone a moment later.
        if newest is None and not over and (time.monotonic() < waiting.deadline or not job.word.may_commit()):
            return
        error = ""
        if newest is None:
            ours = f"the images of {len(part.files)} of {part.world} ranks are written"
            error = failure if over else f"{ours}; " + (failure or "those of the others were not for too long")
        elif newest != job.key:
            error = f"{newest} is newer"
        del self._waiting[job.key]
        before = waiting.outcome
        self._done(Outcome(job=job, error=error, late=True, seconds=before.seconds, nbytes=before.nbytes))


def _said(error: Exception) -> str:
    if isinstance(error, ReplicasDiffer):
        return f"{error}; from now on every node writes all of what it holds"
    return str(error) if isinstance(error, ResilientError) else f"{type(error).__name__}: {error}"
