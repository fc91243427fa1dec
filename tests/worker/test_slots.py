"""Which of a worker's slots may be overwritten while states are copied to other nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from resilient_train.errors import LinkLost, MemoryRefused
from resilient_train.image.arena import Board, Slot, create_memory
from resilient_train.spec.world import Key
from resilient_train.worker.slots import SLOTS, Slots

SIZE = 4096


class Keeper:
    """Memory without a keeper process, for so many slots."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.gone = False
        self.given: list[Slot] = []
        descriptor = Board.create(1)
        self.board = Board(descriptor)
        os.close(descriptor)

    def allocate(self, size: int, ahead: int = 0) -> tuple[int, Slot]:
        if self.gone:
            raise LinkLost("no keeper")
        if len(self.given) >= self.most:
            raise MemoryRefused("full")
        descriptor = create_memory("test", size)
        self.given.append(Slot(descriptor))
        os.close(descriptor)
        return len(self.given), self.given[-1]


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    """With memory for ten slots."""
    made = Keeper(10)
    yield made
    for slot in made.given:
        slot.close()
    made.board.close()


def take(slots: Slots, step: int, safe: int) -> bool:
    """A snapshot of a step, when all ranks have published ``safe``."""
    for slot in slots.writable(SIZE, Key(1, safe), {1: None}):
        slot.key = Key(1, step)
        return True
    return False


def held(slots: Slots) -> set[int]:
    return {slot.key.step for slot in slots.all() if slot.key is not None}


def test_what_is_pending_and_what_is_kept_is_not_overwritten(keeper: Keeper) -> None:
    """Snapshots go on in the slots that are left; each of the two takes one more at most."""
    slots = Slots(keeper)  # type: ignore[arg-type]
    for step in range(1, 40):
        if step == 10:
            keeper.board.protect(Key(1, 12), None)
        if step == 20:
            keeper.board.protect(Key(1, 22), Key(1, 12))
        assert take(slots, step, step - 1)
        assert step < 12 or 12 in held(slots)
        assert step < 22 or 22 in held(slots)
    assert len(slots.all()) <= SLOTS + 2
    keeper.board.protect(Key(1, 45), Key(1, 22))
    for step in range(40, 50):
        assert take(slots, step, step - 1)
    assert 12 not in held(slots)
    assert {22, 45} <= held(slots)


def test_a_state_of_an_abandoned_past_protects_nothing(keeper: Keeper) -> None:
    """Whatever the board says of it."""
    slots = Slots(keeper)  # type: ignore[arg-type]
    assert take(slots, 5, 4)
    keeper.board.protect(None, Key(1, 5))
    assert next(iter(slots.writable(SIZE, None, {2: None}))).key == Key(1, 5)


def test_without_memory_for_more_slots_snapshots_are_skipped_and_training_goes_on(keeper: Keeper) -> None:
    """It is asked for once; the slots that training cannot do without are an error as ever."""
    keeper.most = SLOTS
    slots = Slots(keeper)  # type: ignore[arg-type]
    for step in range(1, 6):
        assert take(slots, step, step - 1)
    keeper.board.protect(Key(1, 4), Key(1, 5))
    done = [take(slots, step, step - 2) for step in range(6, 12)]
    assert done[0]
    assert not all(done)
    assert {4, 5} <= held(slots)
    keeper.board.protect(None, None)
    assert take(slots, 12, 11)
    keeper.most = 0
    with pytest.raises(MemoryRefused):
        take(Slots(keeper), 1, 0)  # type: ignore[arg-type]


def test_without_a_keeper_snapshots_go_on_in_the_slots_that_are_there(keeper: Keeper) -> None:
    """Of what needs a new one, a snapshot is skipped: training waits for no keeper."""
    slots = Slots(keeper)
    assert take(slots, 1, 0)
    keeper.gone = True
    assert not take(slots, 2, 0)
    assert held(slots) == {1}
    assert take(slots, 3, 2), "what all ranks have a newer state of may be overwritten"
    keeper.gone = False
    assert take(slots, 4, 2)
    assert held(slots) == {3, 4}
