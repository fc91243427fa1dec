"""What an agent says to its keeper never waits for the keeper."""

from __future__ import annotations

import os
import signal
import time
import uuid

from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.spec.messages import Flushed, Peers


def test_a_stopped_keeper_holds_up_nobody() -> None:
    """More than the socket takes is said at once; when the keeper goes on it hears all of it."""
    keeper = KeeperProcess(f"test-{uuid.uuid4().hex}", 1, "")
    keeper.start()
    try:
        deadline = time.monotonic() + 60
        while not keeper.try_connect():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(keeper.pid, signal.SIGSTOP)
        for number in range(100):
            keepers = [[f"n{node}", f"host:{node}"] for node in range(500)]
            keeper.follow(Peers(node="n0", generation=number, slots=[0], keepers=keepers, others=[]))
        assert keeper.flush()
        assert not keeper.push()
        os.kill(keeper.pid, signal.SIGCONT)
        answered = False
        while not answered:
            assert time.monotonic() < deadline
            keeper.push()
            assert keeper.channel is not None
            received = keeper.channel.receive(0.05)
            answered = received is not None and isinstance(received[0], Flushed)
            if received is not None:
                keeper.take_in(*received)
    finally:
        os.kill(keeper.pid, signal.SIGCONT)
        keeper.stop(5.0)
