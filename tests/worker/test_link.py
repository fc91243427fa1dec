"""What a worker hears from its agent while it waits at a boundary."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest

from resilient_train.errors import LinkLost
from resilient_train.ipc.channel import Channel, Listener
from resilient_train.spec.messages import Hello, Promise, Welcome, WorldIs
from resilient_train.spec.world import Phase, Planned, WorldRecord
from resilient_train.worker.link import AgentLink

PATIENCE = 30.0
BASE = WorldRecord(revision=1, generation=1, members=("n/0.0",), bootstrap="h:1", reason="test")


class NoGroups:
    """There is nothing to free the main thread from."""

    def abort(self, generation: int | None = None) -> int:
        return 0


class Agent:
    """The other end of the line."""

    def __init__(self) -> None:
        address = f"test-{uuid.uuid4().hex}"
        listener = Listener(address)
        links: list[AgentLink] = []
        thread = threading.Thread(target=lambda: links.append(AgentLink(address, Hello(member="n/0.0"), NoGroups())))
        thread.start()
        channel = None
        while channel is None:
            channel = listener.accept()
        self.channel: Channel = channel
        assert isinstance(self.heard(), Hello)
        self.channel.send(Welcome(keeper="k", verdict=7.0))
        thread.join(PATIENCE)
        self.link = links[0]
        listener.close()

    def heard(self) -> object:
        received = self.channel.receive(PATIENCE)
        assert received is not None
        return received[0]

    def tell(self, record: WorldRecord) -> None:
        self.channel.send(WorldIs(record=record.to_json()))


def planned(number: int, boundary: int) -> WorldRecord:
    plan = Planned(number=number, boundary=boundary, members=("n/0.0",), reason="test")
    return replace(BASE, planned=plan, revision=number)


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    agent.tell(BASE)
    agent.link.next_world()
    agent.link.begin_steps(0, 100)
    agent.tell(planned(2, 5))
    assert agent.heard() == Promise(number=2, accepted=True)
    assert agent.link.reach(5)
    yield agent
    agent.channel.close()
    agent.link._channel.close()


def test_the_agent_says_how_long_to_wait_for_a_verdict(agent: Agent) -> None:
    """It follows from how soon losses are to be noticed, which workers do not know."""
    assert (agent.link.keeper, agent.link.verdict) == ("k", 7.0)


@pytest.mark.parametrize(
    ("news", "leaves"),
    [
        (replace(BASE, revision=3), False),
        (planned(4, 9), False),
        (replace(BASE, revision=3, generation=2, boundary=5), True),
    ],
    ids=["taken back", "another plan", "committed"],
)
def test_a_rank_waits_at_its_boundary_for_the_outcome(agent: Agent, news: WorldRecord, leaves: bool) -> None:
    """That a plan was taken back may be heard of only by the next one, which is for another boundary."""
    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(agent.link.wait_at_boundary()))
    thread.start()
    agent.tell(news)
    thread.join(PATIENCE)
    assert outcome == [leaves]


def waits(agent: Agent, word: threading.Event) -> tuple[threading.Thread, list[bool | str]]:
    """A rank at a boundary without the store's word: what comes of its wait."""
    outcome: list[bool | str] = []

    def wait() -> None:
        try:
            outcome.append(agent.link.wait_while(lambda: not word.is_set()))
        except LinkLost as error:
            outcome.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize(
    ("news", "leaves"),
    [
        (None, False),
        (replace(BASE, revision=3), False),
        (replace(BASE, revision=3, generation=2, boundary=5), False),
        (replace(BASE, revision=3, generation=2), True),
        (replace(BASE, revision=3, phase=Phase.FAILED, error="a bug"), True),
    ],
    ids=["the word", "taken back", "a planned change", "a loss", "the end"],
)
def test_a_rank_without_the_word_waits_for_it_or_for_another_world(
    agent: Agent, news: WorldRecord | None, leaves: bool
) -> None:
    """Only a loss or the end of the job frees it; a change at a boundary still to come does not."""
    word = threading.Event()
    thread, outcome = waits(agent, word)
    if news is not None:
        agent.tell(news)
    if not leaves:
        while news is not None and (heard := agent.link.heard()) is not None and heard.revision != news.revision:
            assert thread.is_alive()
        thread.join(0.1)
        assert outcome == []
        word.set()
    thread.join(PATIENCE)
    assert outcome == [leaves]


def test_a_rank_without_the_word_does_not_outlive_its_agent(agent: Agent) -> None:
    """Nobody would ever give it one."""
    thread, outcome = waits(agent, threading.Event())
    agent.channel.close()
    thread.join(PATIENCE)
    assert outcome == ["the agent on this node is gone"]
