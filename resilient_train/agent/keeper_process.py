"""The keeper as the agent's child: started, watched, replaced without losing what it held."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence

from resilient_train.errors import LinkLost
from resilient_train.image.arena import Board, reopen
from resilient_train.ipc.channel import Channel, connect
from resilient_train.spec.messages import Adopt, Deposit, Flush, Message, Peers, Serve, Standing, Withdraw

_START_TIMEOUT = 60.0
_AT_ONCE = 200
"""Descriptors in one message; the kernel takes at most 253."""


class KeeperProcess:
    """One node's keeper and the agent's copies of its memory."""

    def __init__(self, address: str, slots: int, scratch: str, leaves: Sequence[str] = ()) -> None:
        """Args:
        address: where it will listen.
        slots: number of workers of this node.
        scratch: a folder that it removes at its end, in case this agent is killed before it can; empty for none.
        leaves: folders that this agent needs for longer than its keeper; removed if it was killed.
        """
        self.address = address
        self._scratch = scratch
        self._leaves = list(leaves)
        self._slots = slots
        self._deposits: dict[int, tuple[int, str]] = {}
        self._board_fd = -1
        self.standing: Standing | None = None
        """What the next keeper has to know."""
        self.board: Board | None = None
        self.channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._serve: Serve | None = None
        self._peers: Peers | None = None
        self.pidfd = -1

    def start(self) -> None:
        """Start the process (from the main thread). It outlives this agent long enough to save the last state."""
        linger = ["agent", str(os.getpid())]
        command = [sys.executable, "-m", "resilient_train.keeper", self.address, str(self._slots), *linger]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self.pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid if self._process else -1

    def try_connect(self) -> bool:
        """Connect if it listens already, and hand over what an earlier keeper had deposited."""
        try:
            self.channel = connect(self.address, 0.0)
        except LinkLost:
            return False
        standing = None if self.standing is None else dataclasses.asdict(self.standing)
        kept = sorted(self._deposits.items())
        groups = [kept[at : at + _AT_ONCE] for at in range(0, len(kept), _AT_ONCE)] or [[]]
        for index, group in enumerate(groups):
            first = [self._board_fd] if index == 0 and self._board_fd >= 0 else []
            message = Adopt(
                slots=[[slot, owner] for slot, (_, owner) in group],
                scratch=self._scratch,
                leaves=self._leaves,
                standing=standing,
                more=index < len(groups) - 1,
            )
            if not self.tell(message, [*first, *(fd for _, (fd, _) in group)]):
                self.channel.close()
                self.channel = None
                return False
        for known in (self._serve, self._peers):
            if known is not None:
                self.tell(known)
        return True

    def serve(self, host: str, secret: str) -> None:
        """Have it serve other nodes, it and its successors; each says where, in a `Serving`."""
        self._serve = Serve(host=host, secret=secret)
        self.tell(self._serve)

    def follow(self, peers: Peers) -> None:
        """Tell it, and its successors, of the keepers of the job."""
        if peers != self._peers:
            self._peers = peers
            self.tell(peers)

    def tell(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Say something to it; whether it could be said.

        Only what has descriptors may wait for it to read; that is said to a keeper that has just begun.
        """
        try:
            if self.channel is None:
                return False
            if descriptors:
                self.channel.send(message, descriptors)
            else:
                self.channel.post(message)
        except LinkLost:
            return False
        return True

    def push(self) -> bool:
        """Say what it did not take before; whether nothing is left."""
        return self.channel is None or self.channel.push()

    def owners(self) -> set[str]:
        """The workers whose slots the agent holds."""
        return {owner for _, owner in self._deposits.values()}

    def take_in(self, message: Message, descriptors: list[int]) -> bool:
        """Handle deposits and withdrawals; whether ``message`` was one."""
        if isinstance(message, Deposit) and descriptors:
            if message.slot < 0:
                self._board_fd = descriptors[0]
                self.board = Board(descriptors[0])
            else:
                # An open of our own: file locks that the keeper held when it died must go with it.
                self._deposits[message.slot] = (reopen(descriptors[0]), message.owner)
                os.close(descriptors[0])
            return True
        if isinstance(message, Standing):
            self.standing = message
            return True
        if isinstance(message, Withdraw):
            fd, _ = self._deposits.pop(message.slot, (-1, ""))
            if fd >= 0:
                os.close(fd)
            return True
        return False

    def flush(self) -> bool:
        """Ask it to make the last state durable; whether it could be asked."""
        return self.tell(Flush())

    def kill(self) -> None:
        """SIGKILL; its pidfd tells the rest."""
        if self._process is not None and self.pidfd >= 0:
            self._process.kill()

    def died(self) -> int:
        """Reap it; its exit code."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        assert self._process is not None
        code = self._process.wait()
        os.close(self.pidfd)
        self.pidfd = -1
        return code

    def stop(self, timeout: float) -> None:
        """Let it end, which it does when the agent hangs up; end it after ``timeout`` seconds."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self._process is not None and self.pidfd >= 0:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self.pidfd)
            self.pidfd = -1
        for fd, _ in self._deposits.values():
            os.close(fd)
        self._deposits = {}
        if self.board is not None:
            self.board.close()
            os.close(self._board_fd)
            self.board = None
