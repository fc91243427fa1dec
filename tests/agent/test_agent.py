"""The agent's edges: who asks it gets an answer of any length, and what it says to people never stops it."""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from resilient_train.agent.agent import Agent, AgentConfig, print_line
from resilient_train.clock import MonotonicClock
from resilient_train.control.tcp import TcpControlStore, serve
from resilient_train.events import NoSink
from resilient_train.ipc.channel import connect
from resilient_train.plan.view import Limits
from resilient_train.spec.messages import AskStatus, Status
from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.world import WorldRecord, member_id

NODES, SLOTS = 400, 8
pytestmark = pytest.mark.timeout(60)


class NoKeeper:
    """No process; says and sends nothing."""

    board = None
    address = ""

    def push(self) -> bool:
        return True


@pytest.fixture
def agent() -> Iterator[Agent]:
    """One whose loop turns, of a job on hundreds of nodes."""
    server = serve("127.0.0.1", 0)
    store = TcpControlStore("127.0.0.1", server.port, "job")
    settings = AgentConfig(
        node="n0", order=0, slots=SLOTS, limits=Limits(), address=f"job-{uuid.uuid4().hex}", job="big"
    )
    no_workers = cast(Any, object())
    agent = Agent(
        settings, no_workers, cast(Any, NoKeeper()), store, lambda: "h:1", NoSink(), lambda _: None, MonotonicClock()
    )
    members = tuple(member_id(f"n{n}", slot, 0) for n in range(NODES) for slot in range(SLOTS))
    record = WorldRecord(revision=1, generation=1, members=members, bootstrap="h:1", reason="start")
    nodes = {}
    for order in range(NODES):
        workers = tuple(WorkerInfo(member=member_id(f"n{order}", slot, 0), elastic=True) for slot in range(SLOTS))
        nodes[f"n{order}"] = NodeInfo(node=f"n{order}", order=order, endpoint="h:1", slots=SLOTS, workers=workers)
    agent._state = replace(agent._state, view=replace(agent._state.view, nodes=nodes, record=record))
    agent._loop.selector.register(agent._listener, 1, agent._accept)
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            agent._once()

    thread = threading.Thread(target=run, name="agent")
    thread.start()
    yield agent
    over.set()
    agent._loop.post(lambda: None)
    thread.join()
    store.close()
    agent._listener.close()


def test_a_status_of_any_length_reaches_whoever_asks(agent: Agent) -> None:
    """More than a socket takes at once: the rest follows, though who asks is no worker."""
    channel = connect(agent._settings.address, 10.0)
    channel.send(AskStatus())
    received = channel.receive(30.0)
    assert received is not None
    status = received[0]
    assert isinstance(status, Status)
    assert len(status.nodes) == NODES
    channel.close()


def test_what_nobody_can_read_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under the log, or a terminal that is gone."""
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", full)
    print_line("generation 2: lost rank 3")
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"):
        full.close()
    monkeypatch.setattr(sys, "stderr", full)
    print_line("generation 3: lost rank 2")
