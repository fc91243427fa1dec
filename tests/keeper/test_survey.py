"""What others hold: a living node's keeper that does not answer is asked again, one that ends meanwhile is not."""

from __future__ import annotations

import queue
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
