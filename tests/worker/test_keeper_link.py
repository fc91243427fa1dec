"""A worker's line to its keeper when keepers die."""

from __future__ import annotations

import os
import threading
import time
import uuid

import pytest

from resilient_train.errors import LinkLost
from resilient_train.image.arena import Board
from resilient_train.ipc.channel import Channel, Listener
from resilient_train.spec.messages import Attach, Attached
from resilient_train.worker.keeper_link import KeeperLink


class FakeKeeper:
    """Welcomes one worker, and is gone when it is told so."""

    def __init__(self, address: str, board: int) -> None:
        self._listener = Listener(address)
        self._board = board
        self._channel: Channel | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self._channel = self._listener.accept()
        assert self._channel is not None
        received = self._channel.receive(30.0)
        assert received is not None
        assert isinstance(received[0], Attach)
        self._channel.send(Attached(), [self._board])

    def die(self) -> None:
        self._thread.join(30.0)
        assert self._channel is not None
        self._channel.close()
        self._listener.close()


def test_training_goes_on_while_there_is_no_keeper() -> None:
    """Looking for news does not wait for a successor, and finds it as soon as it is there."""
    address, board = f"test-{uuid.uuid4().hex}/keeper", Board.create(1)
    first = FakeKeeper(address, board)
    link = KeeperLink(address, "n/0.0", 0)
    first.die()
    for _ in range(100):
        assert link.news() == []
    assert link.replaced
    link.replaced = False
    second = FakeKeeper(address, board)
    deadline = time.monotonic() + 30.0
    while link._channel is None:
        assert link.news() == []
        assert time.monotonic() < deadline
    assert not link.replaced
    link.board.report_progress(0, 1, 7)
    assert Board(board).progress(0) == (1, 7)
    link.close()
    second.die()
    os.close(board)


def test_a_slot_that_nobody_can_give_is_not_waited_for() -> None:
    """The keeper has died and there is no other yet: said at once, and looked for again with the next request."""
    address, board = f"test-{uuid.uuid4().hex}/keeper", Board.create(1)
    first = FakeKeeper(address, board)
    link = KeeperLink(address, "n/0.0", 0)
    first.die()
    for _ in range(2):
        with pytest.raises(LinkLost):
            link.allocate(4096)
    assert link.replaced
    link.close()
    os.close(board)
