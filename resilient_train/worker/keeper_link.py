"""This worker's line to the keeper of its node."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from resilient_train.errors import LinkLost, MemoryRefused
from resilient_train.image.arena import Board, Slot
from resilient_train.ipc.channel import Channel, connect
from resilient_train.spec.messages import (
    Allocate,
    Allocated,
    Attach,
    Attached,
    Discard,
    Flush,
    Flushed,
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
    Refused,
)
from resilient_train.storage.peer import HeldImage, Listing, held_image, held_parity

logger = logging.getLogger(__name__)

_TIMEOUT = 300.0
"""Seconds for the keeper's answer; backing a large image's memory takes some."""
_START_TIMEOUT = 15.0
"""Seconds for a keeper that was started here to listen."""
FLUSH_TIMEOUT = 600.0
"""Seconds for the last state to become durable."""
_M = TypeVar("_M", bound=Message)


class KeeperLink:
    """Requests to the keeper, one at a time, from the main thread.

    A keeper that dies is replaced by the agent, which holds its memory; the next request then goes to the new one.
    """

    def __init__(self, address: str, member: str, index: int, restart: Callable[[], None] | None = None) -> None:
        """Connects and attaches.

        Args:
            address: where the keeper listens.
            member: this worker.
            index: its line on the board.
            restart: starts a keeper if there is none; None where an agent does.

        Raises:
            LinkLost: if no keeper answers.
        """
        self._address = address
        self._member = member
        self._index = index
        self._restart = restart
        self._policy: Policy | None = None
        self._news: list[Persisted] = []
        self._channel: Channel | None = None
        self.replaced = False
        """Another keeper has taken over since somebody last looked."""
        self.board = self._attach()

    @property
    def started_here(self) -> bool:
        """Whether workers start the keeper, and no agent does."""
        return self._restart is not None

    def _attach(self) -> Board:
        if self._channel is not None:
            self._channel.close()
            # The board before stays mapped: another thread may be writing to it.
            self.replaced = True
        deadline = time.monotonic() + _TIMEOUT
        while True:
            if self._restart is not None:
                self._restart()
            try:
                return self._introduce(connect(self._address, _TIMEOUT if self._restart is None else _START_TIMEOUT))
            except LinkLost:
                # A keeper that is being killed still takes connections until the very end.
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)

    def _introduce(self, channel: Channel) -> Board:
        self._channel = channel
        _, descriptors = self._ask(Attach(member=self._member, slot=self._index), Attached)
        board = Board(descriptors[0])
        os.close(descriptors[0])
        if self._policy is not None:
            channel.send(self._policy)
        return board

    def _come_back(self) -> bool:
        """Find the keeper's successor if it is there already; training goes on meanwhile."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            self.replaced = True
        try:
            self.board = self._introduce(connect(self._address, 0.0))
        except LinkLost:
            self._channel = None
            return False
        return True

    def _ask(self, request: Message, kind: type[_M], timeout: float = _TIMEOUT) -> tuple[_M, list[int]]:
        """Send a request and wait for its answer; what the keeper says meanwhile is kept for `news`."""
        channel = self._channel
        if channel is None:
            raise LinkLost("not connected to the keeper")
        channel.send(request)
        while True:
            received = channel.receive(timeout)
            if received is None:
                raise LinkLost(f"the keeper did not answer within {timeout:g} s")
            message, descriptors = received
            if isinstance(message, kind):
                return message, descriptors
            if isinstance(message, Refused):
                raise MemoryRefused(message.reason)
            self._hear(message)

    def _hear(self, message: Message) -> None:
        if isinstance(message, Persisted):
            self._news.append(message)
        elif isinstance(message, Notice) and self._index == 0:
            logger.info("%s", message.text)

    def _ask_any(self, request: Message, kind: type[_M]) -> tuple[_M, list[int]]:
        """The same, to the keeper's successor if the keeper has died."""
        try:
            return self._ask(request, kind)
        except LinkLost:
            self.board = self._attach()
            return self._ask(request, kind)

    def _tell(self, message: Message) -> None:
        try:
            if self._channel is None:
                raise LinkLost("not connected to the keeper")
            self._channel.send(message)
        except LinkLost:
            self.board = self._attach()
            assert self._channel is not None
            self._channel.send(message)

    def allocate(self, size: int, ahead: int = 0) -> tuple[int, Slot]:
        """A new slot: (its id, its memory).

        Args:
            size: bytes.
            ahead: how many more of the same will be asked for.

        Raises:
            MemoryRefused: if there is no memory.
            LinkLost: if the keeper has died and its successor is not there yet; a snapshot less is better than to wait.
        """
        request = Allocate(size=size, ahead=ahead)
        try:
            answer, descriptors = self._ask(request, Allocated)
        except LinkLost:
            if self._restart is not None:
                self.board = self._attach()
            elif not self._come_back():
                raise
            answer, descriptors = self._ask(request, Allocated)
        slot = Slot(descriptors[0])
        slot.populate()
        os.close(descriptors[0])
        return answer.slot, slot

    def discard(self, slot: int) -> None:
        """Give a slot back."""
        self._tell(Discard(slot=slot))

    def set_policy(self, policy: Policy) -> None:
        """Say where and when to persist."""
        self._policy = policy
        self._tell(policy)

    def hand_over(self, message: Published) -> None:
        """Hand a published image over to be persisted."""
        self._tell(message)

    def news(self, timeout: float = 0.0) -> list[Persisted]:
        """What became of images that were handed over, waiting up to ``timeout`` seconds if there is no news yet.

        If the keeper has died, `replaced` is set and what it had not persisted is not going to be.
        """
        if self._channel is None and not timeout and not self._come_back():
            return []
        if self._channel is None:
            self.board = self._attach()
        assert self._channel is not None
        try:
            if timeout and not self._news:
                received = self._channel.receive(timeout)
                arrived = [received] if received is not None else []
            else:
                arrived = self._channel.pending()
        except LinkLost:
            if timeout or self._restart is not None:
                self.board = self._attach()
            else:
                self._come_back()
            arrived = []
        for message, _ in arrived:
            self._hear(message)
        news, self._news = self._news, []
        return news

    def images(self) -> list[HeldImage]:
        """Every complete image in this node's memory."""
        answer, _ = self._ask_any(ListImages(), Images)
        return [held_image(row) for row in answer.images]

    def everywhere(self) -> Listing:
        """What the memory of all nodes holds."""
        answer, _ = self._ask_any(ListImages(everywhere=True), Images)
        return Listing(
            here=[held_image(row) for row in answer.images],
            peers={str(endpoint): [held_image(row) for row in rows] for endpoint, rows in answer.peers},
            parities={str(endpoint): [held_parity(row) for row in rows] for endpoint, rows in answer.parities},
            secret=bytes.fromhex(answer.secret),
        )

    def open(self, slots: list[int]) -> dict[int, Slot]:
        """The memory of slots, as far as they are still there."""
        opened: dict[int, Slot] = {}
        for begin in range(0, len(slots), 32):
            answer, descriptors = self._ask_any(OpenImages(slots=slots[begin : begin + 32]), Opened)
            for slot, descriptor in zip(answer.slots, descriptors, strict=True):
                opened[slot] = Slot(descriptor)
                os.close(descriptor)
        return opened

    def flush(self) -> str:
        """Wait until the last state is durable, with all other workers of this node; why it is not, if so."""
        try:
            answer, _ = self._ask(Flush(), Flushed, FLUSH_TIMEOUT)
        except LinkLost as error:
            return f"the last state may not be durable: {error}"
        return answer.text

    def close(self) -> None:
        """Take leave."""
        if self._channel is None:
            return
        try:
            self._channel.send(Goodbye())
        except LinkLost:
            pass
        self._channel.close()
        self._channel = None
        self.board.close()
