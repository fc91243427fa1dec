"""A rank begins a step only while the store's word holds that its world is the job's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import pytest

from resilient_train.image.arena import Board
from resilient_train.worker.host import Host
from resilient_train.worker.session import LeaveGeneration


class Session:
    """An agent's part: what it is told, and what it does while a rank waits."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.operations = self
        self.told: list[str] = []
        self.elastic = True
        self._meanwhile = meanwhile

    def known_as_elastic(self) -> bool:
        return self.elastic

    def announce(self, name: str) -> AbstractContextManager[None]:
        @contextmanager
        def announced() -> Iterator[None]:
            self.told.append(name)
            try:
                yield
            finally:
                self.told.append("")

        return announced()

    def wait_while(self, condition: Callable[[], bool]) -> None:
        if condition():
            self._meanwhile()
        assert not condition()


class Keeper:
    def __init__(self, board: Board) -> None:
        self.board = board


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board(Board.create(1))
    yield made
    made.close()


def host(board: Board, session: Session | None) -> Host:
    return Host(cast(Any, Keeper(board)), 0, cast(Any, session))


def never() -> None:
    raise AssertionError("it waited")


@pytest.mark.parametrize("until", [None, math.inf, 60.0])
def test_a_rank_with_the_word_goes_on(board: Board, until: float | None) -> None:
    """It holds for a while yet; none is needed; or there is nobody who would give it, as on a job's only node."""
    if until is not None:
        board.vouch(time.monotonic() + until)
    session = Session(never)
    host(board, session).wait_for_word()
    assert session.told == []


def test_a_rank_without_the_word_waits_as_a_long_operation(board: Board) -> None:
    """So it is taken for neither hung nor slow; it goes on when the word is given anew."""
    board.vouch(time.monotonic())
    session = Session(lambda: board.vouch(time.monotonic() + 60))
    host(board, session).wait_for_word()
    assert session.told == ["waiting for the control store", ""]


def test_a_rank_waits_until_the_record_says_that_it_is_elastic(board: Board) -> None:
    """Who does not know it may follow this world at once; the word says nothing about it."""

    def heard() -> None:
        session.elastic = True

    board.vouch(time.monotonic() + 60)
    session = Session(heard)
    session.elastic = False
    host(board, session).wait_for_word()
    assert session.elastic
    assert session.told == []


def test_a_rank_whose_world_was_replaced_meanwhile_leaves_it(board: Board) -> None:
    """The operation is over with the world."""

    def replaced() -> None:
        raise LeaveGeneration

    board.vouch(time.monotonic())
    session = Session(replaced)
    with pytest.raises(LeaveGeneration):
        host(board, session).wait_for_word()
    assert session.told == ["waiting for the control store", ""]


def test_a_rank_without_an_agent_needs_no_word(board: Board) -> None:
    """Under plain python or torchrun."""
    board.vouch(time.monotonic())
    host(board, None).wait_for_word()
