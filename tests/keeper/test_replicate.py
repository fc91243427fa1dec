"""Copies on other nodes: all ranks' images of one state, and what happens to them when keepers and nodes die."""

from __future__ import annotations

import os
import resource
import signal
import time
import uuid
from collections.abc import Callable

import pytest
import torch
from nodes import Cluster, rows_of, wait_until

from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.spec.world import Key
from resilient_train.worker.keeper_link import KeeperLink
from resilient_train.worker.sources import Candidate, MemorySource

pytestmark = pytest.mark.timeout(180)
Make = Callable[..., Cluster]


def copied(cluster: Cluster, after: int = 0) -> bool:
    """Whether all nodes know of a newer state that survives the loss of one."""
    return all(key is not None and key.step > after for key in cluster.kept())


def keys(source: MemorySource) -> list[Key]:
    """The states that can be restored."""
    return [state.key for state in source.candidates({})]


def check(source: MemorySource, key: Key, world: int, rows: int = 4) -> None:
    """What is restored is what was computed."""
    with source.open(Candidate(key=key)) as images:
        assert [reader.stamp.rank for reader in images.all()] == list(range(world))
        for rank, reader in enumerate(images.all()):
            (entry,) = reader.entries()
            assert torch.equal(reader.tensor(entry), rows_of(rank, world, key.step, rows))


def test_every_state_that_is_kept_survives_the_loss_of_any_node(cluster: Make) -> None:
    """Three nodes of two ranks: after the loss of one, the other two hold every rank's image of one state."""
    job = cluster(2, 2, 2)
    job.introduce()
    job.start_workers()
    job.step_until(lambda: copied(job))
    job.lose(job.nodes[1])
    for survivor in job.nodes:
        source = MemorySource(survivor.workers[0].link)
        kept = survivor.workers[0].link.board.kept()
        whole = keys(source)
        assert kept is not None
        assert whole[0] >= kept
        check(source, whole[0], 6)


def test_states_go_on_being_kept_and_no_snapshot_is_skipped(cluster: Make) -> None:
    """With the slots that there are; the nodes agree on each state."""
    job = cluster(1, 1)
    job.introduce()
    job.start_workers()
    done, seen = [], set()
    for step in range(1, 120):
        done += job.step(Key(1, step))
        seen |= {key for key in job.kept() if key}
    assert all(done)
    job.step_until(lambda: copied(job, 120), first=120)
    assert len(job.nodes[0].deposits) <= 1 + 5 + 2


@pytest.mark.soak
def test_a_keeper_killed_in_the_middle_of_copying_delays_and_does_no_harm(cluster: Make) -> None:
    """Its successor has what it had; the state that was on its way, or a later one, is kept all the same."""
    job = cluster(1, 1, 1)
    job.introduce()
    job.start_workers()
    last = job.step_until(lambda: copied(job), rows=200_000)
    for victim in (2, 1, 0):  # The last is the one that names the states.
        before = max(key for key in job.kept() if key)
        job.nodes[victim].replace_keeper()
        job.introduce()
        last = job.step_until(lambda after=before.step: copied(job, after), first=last + 1, rows=200_000)
    kept = min(key for key in job.kept() if key)
    job.lose(job.nodes[0])
    source = MemorySource(job.nodes[1].workers[0].link)
    assert keys(source)[0] >= kept
    check(source, keys(source)[0], 3, 200_000)


@pytest.mark.soak
def test_after_a_change_of_the_world_the_old_state_stays_until_a_new_one_is_kept(cluster: Make) -> None:
    """A second node may die before the new world has copied anything."""
    job = cluster(1, 1, 1)
    job.introduce()
    job.start_workers()
    last = job.step_until(lambda: copied(job))
    old = min(key for key in job.kept() if key)
    job.lose(job.nodes[1])
    job.generation = 2
    job.introduce()
    for node in job.nodes:
        for worker in node.workers:
            worker.generation = 2
    # Their ranks have begun anew from some state, and are far ahead before anything is copied.
    first, third = job.nodes
    for rank, node in enumerate(job.nodes):
        node.workers[0].past = {1: None, 2: None}
        assert node.workers[0].publish(Key(2, last + 1), rank, 2)
    source = MemorySource(third.workers[0].link)
    assert old in keys(source)
    check(source, old, 3)
    job.step_until(lambda: all(key and key.lineage == 2 for key in job.kept()), lineage=2, first=last + 2)
    # Now what the lost node's neighbour kept for it is of no use.
    wait_until(lambda: old not in keys(source), "the old state's end")
    assert not any("replica of b/" in owner for _, owner in third.deposits.values())
    job.lose(first)
    assert keys(source)[0].lineage == 2
    check(source, keys(source)[0], 2)


def test_no_memory_for_copies_is_said_once_and_harms_nobody(cluster: Make) -> None:
    """Training goes on and nothing is called kept; when there is memory again, states are."""
    job = cluster(1, 1)
    job.start_workers()
    for step in range(1, 6):
        assert job.step(Key(1, step), rows=2000) == [True, True]
    poor = job.nodes[1].process.pid
    # The kernel refuses files beyond this size, those in memory too.
    before = resource.prlimit(poor, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    job.introduce()

    def refused() -> bool:
        return any("no shared memory" in notice.text for notice in job.nodes[0].notices)

    last = job.step_until(refused, first=6, rows=2000)
    done = []
    for _ in range(60):
        last += 1
        done += job.step(Key(1, last), rows=2000)
        time.sleep(0.02)
    assert sum(done) > 100
    assert job.kept() == [None, None]
    assert sum("no shared memory" in notice.text for notice in job.nodes[0].notices) == 1
    resource.prlimit(poor, resource.RLIMIT_FSIZE, before)
    job.step_until(lambda: copied(job), first=last + 1, rows=2000)


def test_more_slots_than_fit_in_one_message_are_handed_over() -> None:
    """A keeper that takes over from one with hundreds of slots."""
    keeper = KeeperProcess(f"test-{uuid.uuid4().hex}", 1, "")
    keeper.start()
    wait_until(keeper.try_connect, "the keeper")
    link = KeeperLink(keeper.address, "n/0.0", 0)
    for count in range(1, 301):
        link.allocate(4096)[1].close()
        _pump(keeper, lambda wanted=count: len(keeper._deposits) == wanted)  # type: ignore[misc]
    os.kill(keeper.pid, signal.SIGKILL)
    keeper.died()
    keeper.start()
    wait_until(keeper.try_connect, "its successor")
    opened = link.open(list(range(1, 301)))
    assert len(opened) == 300
    for memory in opened.values():
        memory.close()
    link.close()
    keeper.stop(20.0)


def _pump(keeper: KeeperProcess, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert keeper.channel is not None
        received = keeper.channel.receive(1.0)
        if received is not None:
            keeper.take_in(*received)
