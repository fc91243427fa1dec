"""What others hold: a living node's keeper that does not answer is asked again, one that ends meanwhile is not."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time
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
            survey.ask(answers.put, patient=True)
            assert set(answers.get(timeout=60).images) == {node.endpoint}
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_who_asks_only_once_gives_everybody_time(node: Node) -> None:
    """The last state is chosen after one round; a busy keeper whose node has no part in the world may hold it."""
    answers: queue.SimpleQueue[Finding] = queue.SimpleQueue()
    host, _, port = node.endpoint.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as busy:

        def answer_late() -> None:
            near, _ = busy.accept()
            time.sleep(0.6)
            with near, socket.create_connection((host, int(port))) as far:
                threading.Thread(target=pump, args=(far, near), daemon=True).start()
                pump(near, far)

        threading.Thread(target=answer_late, daemon=True).start()
        endpoint = f"127.0.0.1:{busy.getsockname()[1]}"
        survey = Survey()
        survey.follow(peers(endpoint), "", KEY)
        survey.ask(answers.put)
        assert set(answers.get(timeout=60).images) == {endpoint}


ENDING = """
import time
from concurrent.futures import ThreadPoolExecutor
from resilient_train.keeper.survey import Survey
from resilient_train.spec.messages import Peers

ThreadPoolExecutor(1).submit(time.sleep, 0.6)
survey = Survey()
survey.follow(Peers(node="x", generation=1, slots=[], keepers=[], others=[["n", "127.0.0.1:1"]]), "", bytes(32))

def again(finding):
    time.sleep(0.01)
    survey.ask(again)

survey.ask(again)
time.sleep(0.1)
"""


def test_a_keeper_that_ends_while_it_asks_ends_quietly() -> None:
    """The interpreter takes its time to end, and lets nobody begin anything meanwhile."""
    result = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes, until either end hangs up."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
