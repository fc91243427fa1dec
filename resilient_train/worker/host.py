"""What surrounds a `Checkpointer`: under ``rtrun`` the agent's session and keeper, elsewhere a keeper of its own."""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from resilient_train import config
from resilient_train.errors import ConfigError, ExitCode
from resilient_train.image.arena import Board
from resilient_train.spec.world import Restore, node_of, slot_of
from resilient_train.worker import session as sessions
from resilient_train.worker.keeper_link import KeeperLink
from resilient_train.worker.session import Session
from resilient_train.worker.slots import Slots

logger = logging.getLogger(__name__)

LINGER = 60.0
"""Seconds that a keeper without an agent waits for workers to come back."""


class Host:
    """One process's surroundings; `Checkpointer` objects come and go with generations, this stays."""

    def __init__(self, keeper: KeeperLink, index: int, session: Session | None) -> None:
        self.keeper = keeper
        self.slots = Slots(keeper)
        self.index = index
        self._session = session
        self._local: tuple[int, ...] = (index,)
        self._claimed = False
        self.before_end: Callable[[], None] | None = None
        """What the Checkpointer has to finish before this process may end."""

    def claim(self) -> None:
        """Images are keyed by step, so there can be one Checkpointer at a time.

        Raises:
            ConfigError: if there is one.
        """
        if self._claimed:
            raise ConfigError("there is a Checkpointer already: put everything into one State, or close() the first")
        self._claimed = True

    def release(self) -> None:
        """The Checkpointer is closed, or its generation over."""
        self._claimed = False
        self.before_end = None
        self.before_abort(None)

    @property
    def board(self) -> Board:
        """Everybody's progress on this node."""
        return self.keeper.board

    @property
    def generation(self) -> int:
        """The current generation's number."""
        record = self._session.record if self._session else None
        return record.generation if record else 1

    @property
    def device(self) -> torch.device:
        """Where collectives on small tensors run."""
        if self._session is not None and self._session.world is not None:
            return self._session.world.device
        return _collective_device()

    @property
    def local_slots(self) -> tuple[int, ...]:
        """The slots of this node's members."""
        record = self._session.record if self._session else None
        if record is None or self._session is None:
            return self._local
        node = node_of(self._session.link.member)
        return tuple(slot_of(member) for member in record.members if node_of(member) == node)

    def set_local(self, count: int) -> None:
        """Without an agent: the number of ranks on this node."""
        self._local = tuple(range(count))

    def restores(self) -> list[Restore]:
        """The job's log of restores."""
        record = self._session.latest() if self._session else None
        return list(record.restores) if record else []

    def on_leave(self, action: Callable[[], None]) -> None:
        """Have ``action`` called when the generation ends."""
        if self._session is not None:
            self._session.on_leave(action)

    def before_abort(self, action: Callable[[], None] | None) -> None:
        """Have ``action`` called, from any thread, before collectives on devices are aborted."""
        if self._session is not None:
            self._session.before_abort(action)

    def begin_steps(self, first: int, last: int) -> None:
        """The script steps through boundaries from now on."""
        if self._session is not None:
            self._session.begin_steps(first, last)

    def long_operation(self, name: str) -> AbstractContextManager[None]:
        """Announce that this rank is away for long."""
        return self._session.operations.announce(name) if self._session is not None else nullcontext()

    def wait_for_word(self) -> None:
        """Go on only in a world that is known to be the current one, and to be elastic.

        A world that nobody knows to be elastic may be followed by another at once, as no process of it would wait.

        Raises:
            LeaveGeneration: if it is not any more.
            LinkLost: if the agent is gone.
        """
        session, board = self._session, self.board
        if session is None or board.vouched() == math.inf:
            return
        session.wait_while(lambda: not session.known_as_elastic() and board.vouched() != math.inf)
        if time.monotonic() >= board.vouched():
            with self.long_operation("waiting for the control store"):
                session.wait_while(lambda: time.monotonic() >= board.vouched())

    def reach(self, step: int) -> bool:
        """At the boundary before ``step``; whether a planned change takes place here."""
        stopping = self._session.reach(step) if self._session is not None else False
        self.report(step)
        return stopping

    def report(self, step: int) -> None:
        """Tell the keeper that ``step`` steps are finished."""
        self.board.report_progress(self.index, self.generation, step)

    def leave_if_over(self) -> None:
        """Leave the user's function if the generation has ended by a loss."""
        if self._session is not None:
            self._session.leave_if_over()

    def goes_on(self) -> bool:
        """Whether the job goes on, so that what this rank leaves behind is of use."""
        return self._session is not None and self._session.goes_on()

    def finished_steps(self) -> int:
        """The most steps that the job is known to have finished in earlier generations."""
        record = self._session.record if self._session else None
        return record.best_step if record else 0

    def leave_at_boundary(self) -> None:
        """Carry out the planned change, or go on if it was taken back."""
        if self._session is not None:
            self._session.leave_at_boundary()

    def stage(self, name: str) -> None:
        """Report a stage of recovery."""
        if self._session is not None:
            self._session.stage(name)

    def resumed(self, restore: Restore, text: str) -> None:
        """Rank 0: have the restore logged."""
        if self._session is not None:
            self._session.resumed(restore.lineage, restore.source, text)

    def close(self) -> str:
        """Take leave of a keeper without an agent, once the last state is durable; why it is not, if so."""
        global _host
        if self._session is not None or _host is not self:
            return ""
        unsaved = self.keeper.flush() if self.keeper.started_here else ""
        self.keeper.close()
        self.slots.close()
        _host = None
        return unsaved


_host: Host | None = None


def connect(url: str | None) -> Host:
    """This process's host, made at the first call.

    Args:
        url: where states are made durable; keepers without an agent are found again by it.

    Raises:
        LinkLost: if no keeper answers.
        ConfigError: if this process is one of several that have no process group yet, or are on several hosts.
    """
    global _host
    if _host is not None:
        return _host
    settings = config.environment()
    session = sessions.current()
    if session is not None:
        _host = Host(KeeperLink(session.link.keeper, session.link.member, session.slot), session.slot, session)
        _host.board.clear(session.slot)
        return _host
    if settings.agent and settings.member:
        # Under rtrun, but the script is not elastic: the node's keeper serves it all the same.
        slot = slot_of(settings.member)
        _host = Host(KeeperLink(f"{settings.agent}/keeper", settings.member, slot), slot, None)
        _host.set_local(settings.local_world_size)
    else:
        if settings.world_size > 1 and not dist.is_initialized():
            raise ConfigError("this is one of several ranks: call init_process_group() before making a Checkpointer")
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if ranks > 1 else 0
        _host = Host(_own_keeper(settings, rank, ranks, url), rank, None)
        _host.set_local(ranks)
    atexit.register(_take_leave)
    _host.board.clear(_host.index)
    return _host


def _in_child() -> None:
    """A forked process is nobody's worker: what it inherited of the line to the keeper is its parent's."""
    global _host
    _host = None


os.register_at_fork(after_in_child=_in_child)


_unsaved = False


def _end_unsaved() -> None:
    """Registered when this module is imported, so that whatever the script registers has its turn first."""
    if _unsaved:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ExitCode.NOT_DURABLE)


atexit.register(_end_unsaved)


def _take_leave() -> None:
    """At the end of the process. After an error the keeper is left waiting: a launcher may restart the ranks."""
    if _host is None:
        return
    if _host.before_end is not None:
        _host.before_end()
    if not hasattr(sys, "last_value"):
        unsaved = _host.close()
        if unsaved:
            global _unsaved
            _unsaved = True
            logger.error("%s", unsaved)


def _own_keeper(settings: config.Environment, rank: int, ranks: int, url: str | None) -> KeeperLink:
    """A line to the keeper that the first of all ranks starts.

    Where a launcher told the ranks who they are, it may start them again, and they find the keeper again: its address
    names the job as exactly as can be known, so that no other run is taken for this one's past.  It is the first rank's
    that counts: several launchers on one host are several processes, and each is a fact about its own ranks only.
    """
    facts = (settings.job, settings.meeting_place, os.path.abspath(sys.argv[0]), str(url))
    launched = settings.world_size == ranks > 1
    run = _number(chr(0).join(facts)) if launched else uuid.uuid4().int >> 66
    if ranks > 1:
        run = _agree_on_run(run)
    address = f"{'job' if launched else 'run'}-{run:x}/keeper"

    def start() -> None:
        if rank == 0:
            _start_keeper(address, ranks, LINGER if launched else 0.0)

    return KeeperLink(address, f"local/{rank}.{os.getpid()}", rank, start)


def _number(text: str) -> int:
    """One of 56 bits that stands for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _agree_on_run(run: int) -> int:
    """The first rank's number of this run, all ranks being on one host.

    Raises:
        ConfigError: if they are not.
    """
    # Keepers are found by abstract socket names, which a network namespace has for itself.
    here = f"{Path('/proc/sys/kernel/random/boot_id').read_text()} {os.readlink('/proc/self/ns/net')}"
    host = _number(here)
    told = run if dist.get_rank() == 0 else 0
    agreed = torch.tensor([host, -host, told], dtype=torch.int64, device=_collective_device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    if int(agreed[0]) != -int(agreed[1]):
        raise ConfigError("the ranks are on several hosts: start them with rtrun, which has a keeper on each")
    return int(agreed[2])


def _collective_device() -> torch.device:
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _start_keeper(address: str, lines: int, linger: float) -> None:
    """Whoever is second at the same address finds it taken and ends, so a keeper that is still there is found again."""
    subprocess.Popen(
        [sys.executable, "-m", "resilient_train.keeper", address, str(max(1, lines)), str(linger)],
        # Not the script's own: whoever reads its output would wait for the keeper as well.
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
