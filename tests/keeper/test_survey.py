"""What others hold: a living node's keeper that does not answer is asked again, one that ends meanwhile is not."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator

import pytest
from nodes import SECRET, Node

from resilient_train.keeper.survey import Finding, Survey
from resilient_train.spec.messages import Peers

KEY = bytes.fromhex(SECRET)
NOBODY = "127.0.0.1:1"


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node("a", 1)
    yield made
    made.close()


def peers(*endpoints: str) -> Peers:
    others = [[f"n{number}", endpoint] for number, endpoint in enumerate(endpoints)]
    return Peers(node="x", generation=1, slots=[], keepers=[], others=others)


def test_a_keeper_that_is_being_replaced_is_waited_for(node: Node) -> None:
    """It is asked where it serves by then; who is in no hurry hears at once of those that answer."""
    answers: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    survey = Survey()
    survey.follow(peers(NOBODY), "", KEY)
    survey.ask(answers.put)
    assert answers.get(timeout=30).images == {}
    survey.ask(answers.put, patient=True)
    survey.follow(peers(node.endpoint), "", KEY)
    assert answers.get(timeout=60).images == {node.endpoint: []}


def test_who_never_answers_is_waited_for_in_vain(node: Node) -> None:
    """After some seconds the others' answers have to do."""
    answers: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    survey = Survey()
    survey.follow(peers(NOBODY, node.endpoint), "", KEY)
    survey.ask(answers.put, patient=True)
    assert set(answers.get(timeout=60).images) == {node.endpoint}


def test_who_has_left_and_does_not_answer_is_asked_once(node: Node) -> None:
    """A restore asks several times, one after the other, and would wait for a silent node each time."""
    answers: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    survey = Survey()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        survey.follow(peers(endpoint, node.endpoint), "", KEY)
        survey.follow(peers(node.endpoint), "", KEY)
        for _ in range(3):
            survey.ask(answers.put)
            assert set(answers.get(timeout=60).images) == {node.endpoint}
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
