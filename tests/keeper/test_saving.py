"""What a keeper makes durable of what ranks hand over: complete states, the newest first, and no slot held in vain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.keeper.clients import Client
from resilient_train.keeper.persist import Job
from resilient_train.keeper.persister import Outcome
from resilient_train.keeper.saving import Saving
from resilient_train.keeper.shelf import Shelf
from resilient_train.keeper.word import Word
from resilient_train.spec.messages import Persisted, Policy, Published
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key

RANKS = 2


class Bench:
    """A keeper's saving, whose writing the test does: nothing is written anywhere."""

    def __init__(self) -> None:
        self.time = 100.0
        self.shelf = Shelf()
        self.saving = Saving(self.shelf, self, lambda: None, self, Word(clock=self))
        self.jobs: list[Job] = []
        self.saving._persister = cast(Any, self)
        self.workers = [Client(channel=cast(Any, None), member=f"n/{rank}.0", index=rank) for rank in range(RANKS)]
        self.connected = set(range(RANKS))
        self.newest: list[Key | None] = [None] * RANKS
        self.answers: list[tuple[int, int, str]] = []
        self.notices: list[str] = []
        self.asked = 0
        self.saving.set_policy(policy())

    def now(self) -> float:
        return self.time

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def answer(self, client: Client, message: Persisted) -> None:
        self.answers.append((client.index, message.step, message.error))

    def notice(self, kind: str, text: str, *, workers: bool = False) -> None:
        self.notices.append(kind)

    def standing_changed(self) -> None: ...

    def attached(self, client: Client) -> bool:
        return client.index in self.connected

    def published(self) -> list[Key | None]:
        return [self.newest[rank] for rank in sorted(self.connected)]

    def time_to_persist(self) -> None:
        self.asked += 1

    def image(self, rank: int, step: int) -> int:
        """A rank's image in a slot of its own."""
        entry = Entry(name="t", dtype="F32", shape=(4,), global_shape=(8,), offset=(4 * rank,))
        layout = plan_image([entry], 10)
        fd = create_memory("test", layout.total)
        number, slot = self.shelf.add(fd, f"n/{rank}.0"), Slot(fd)
        os.close(fd)
        parts = [Part(entry=entry, sources=(torch.zeros(4),))]
        writer = ImageWriter(layout, parts, rank, RANKS)
        assert writer.begin(slot, Key(1, step), parts, b"{}")
        assert writer.conclude() == []
        slot.close()
        return number

    def hand_over(self, rank: int, step: int, slot: int | None = None) -> int:
        slot = self.image(rank, step) if slot is None else slot
        message = Published(slot=slot, lineage=1, step=step, rank=rank, world=RANKS, local=RANKS, past=[[1, None]])
        self.saving.published(self.workers[rank], message)
        return slot

    def written(self, error: str = "", seconds: float = 1.0, **changes: Any) -> None:
        """The oldest job is done."""
        self.saving._finish(Outcome(job=self.jobs.pop(0), error=error, seconds=seconds, nbytes=1, **changes))
        self.saving.outcomes()


def policy(**changes: Any) -> Policy:
    return Policy(**{"url": "s3://b", "every_steps": 1, "every_seconds": 0.0, "keep_last": 3} | changes)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for number in list(made.shelf.owners()):
        made.shelf.remove(number)


def test_a_state_is_written_when_all_ranks_have_handed_it_over(bench: Bench) -> None:
    """Not before; its slots are locked until then, and free after, and everybody is told."""
    slots = [bench.hand_over(0, 7)]
    assert bench.jobs == []
    slots.append(bench.hand_over(1, 7))
    assert [(job.key, sorted(job.images)) for job in bench.jobs] == [(Key(1, 7), [0, 1])]
    assert all(bench.shelf.locked(slot) and bench.saving.holds(slot) for slot in slots)
    bench.written()
    assert bench.saving.persisted == Key(1, 7)
    assert bench.answers == [(0, 7, ""), (1, 7, "")]
    assert not any(bench.shelf.locked(slot) for slot in slots)


def test_of_what_waits_the_newest_is_written_next_and_older_ones_are_let_go(bench: Bench) -> None:
    """A slow disk costs states, and never training its slots; none is written after a newer one."""
    for step in (7, 8, 9):
        for rank in range(RANKS):
            bench.hand_over(rank, step)
    assert [job.key.step for job in bench.jobs] == [7]
    bench.written()
    assert [job.key.step for job in bench.jobs] == [9]
    bench.written()
    assert bench.jobs == []
    assert [(step, bool(error)) for _, step, error in bench.answers] == [(8, True)] * 2 + [(7, False)] * 2 + [
        (9, False)
    ] * 2


def test_what_a_rank_never_hands_over_is_given_up_and_not_at_the_first_look(bench: Bench) -> None:
    """It skipped the snapshot: known when it has published a newer one, as its word of this one was read before."""
    slot = bench.hand_over(0, 7)
    bench.newest = [Key(1, 8), Key(1, 6)]
    for _ in range(3):
        bench.saving.tick()
    assert bench.shelf.locked(slot), "the other one may still hand it over"
    bench.newest = [Key(1, 8), Key(1, 8)]
    bench.saving.tick()
    assert bench.shelf.locked(slot), "its message may be on the way"
    bench.saving.tick()
    assert bench.answers == [(0, 7, "not every rank handed it over")]
    assert not bench.shelf.locked(slot)


def test_what_a_dead_rank_had_handed_over_is_given_up(bench: Bench) -> None:
    """Without the others' parts it is nothing; nobody is told who is not there."""
    slot = bench.hand_over(0, 7)
    bench.connected = {1}
    bench.saving.tick()
    assert not bench.shelf.locked(slot)
    assert bench.answers == []


def test_an_image_that_is_not_what_was_said_is_refused(bench: Bench) -> None:
    """A slot that has another state by now, or is gone; nothing is begun with it."""
    slot = bench.image(0, 8)
    bench.hand_over(0, 7, slot)
    bench.hand_over(0, 7, 999)
    assert bench.answers == [(0, 7, "the image is gone")] * 2
    assert not bench.saving.busy
    assert not bench.shelf.locked(slot)


def test_a_save_that_failed_is_told_and_the_next_one_tries_again(bench: Bench) -> None:
    """Why is kept for the end of the job."""
    for step in (7, 8):
        for rank in range(RANKS):
            bench.hand_over(rank, step)
        bench.written("disk full" if step == 7 else "")
    assert bench.answers == [(0, 7, "disk full"), (1, 7, "disk full"), (0, 8, ""), (1, 8, "")]
    assert bench.saving.why_not == "disk full"
    assert bench.saving.persisted == Key(1, 8)
    assert bench.notices == ["persist_failed", "persisted"]


def test_what_waits_for_other_nodes_does_not_hold_the_slots(bench: Bench) -> None:
    """Written here, not committed yet: training has its slots back, and hears of it when the others are done."""
    slots = [bench.hand_over(rank, 7) for rank in range(RANKS)]
    (job,) = bench.jobs
    bench.written(awaited=True)
    assert bench.answers == []
    assert bench.saving.persisted is None
    assert not any(bench.shelf.locked(slot) for slot in slots)
    bench.jobs.append(job)
    bench.written(late=True)
    assert bench.answers == [(0, 7, ""), (1, 7, "")]
    assert bench.saving.persisted == Key(1, 7)


def test_by_time_it_is_asked_for_when_nothing_is_on_its_way(bench: Bench) -> None:
    """From the last attempt; where steps count, never."""
    bench.saving.set_policy(policy(every_steps=0, every_seconds=60.0))
    bench.time += 59.0
    bench.saving.tick()
    assert bench.asked == 0
    bench.time += 1.0
    bench.saving.tick()
    assert bench.asked == 1
    bench.hand_over(0, 7)
    bench.saving.tick()
    assert bench.asked == 1, "a state is being handed over"
    bench.hand_over(1, 7)
    bench.written()
    bench.saving.tick()
    assert bench.asked == 1
    bench.saving.set_policy(policy(every_steps=5))
    bench.time += 1000.0
    bench.saving.tick()
    assert bench.asked == 1


def test_without_a_place_nothing_is_held(bench: Bench) -> None:
    """Memory only: the ranks hear that it is not made durable, and go on."""
    bench.saving.policy = None
    slots = [bench.hand_over(rank, 7) for rank in range(RANKS)]
    assert [error for *_, error in bench.answers] == ["no location to persist to"] * 2
    assert not any(bench.shelf.locked(slot) for slot in slots)
