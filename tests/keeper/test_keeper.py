"""A real keeper process: allocates, serves, persists, survives its clients, and goes when nobody needs it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resilient_train.errors import LinkLost, MemoryRefused
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.ipc.channel import connect
from resilient_train.spec.messages import (
    Adopt,
    Attach,
    Attached,
    Deposit,
    Flush,
    Flushed,
    Notice,
    Policy,
    Published,
    Save,
    Standing,
)
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.keeper_link import KeeperLink
from resilient_train.worker.sources import Candidate, MemorySource, TierSource

WHOLE = torch.arange(40, dtype=torch.float32).view(8, 5)


@pytest.fixture
def keeper() -> Iterator[str]:
    """A keeper's address; it has two lines and ends with its last client."""
    name = f"test-{uuid.uuid4().hex}"
    process = subprocess.Popen([sys.executable, "-m", "resilient_train.keeper", name, "2", "0"])
    yield name
    try:
        assert process.wait(20) == 0, "the keeper did not end by itself"
    finally:
        process.kill()
        process.wait()


def publish(link: KeeperLink, rank: int, key: Key) -> int:
    """Write this rank's half of WHOLE into a fresh slot."""
    entry = Entry(name="t", dtype="F32", shape=(4, 5), global_shape=(8, 5), offset=(4 * rank, 0))
    layout = plan_image([entry], 10)
    number, slot = link.allocate(layout.total)
    parts = [Part(entry=entry, sources=(WHOLE[4 * rank : 4 * rank + 4],))]
    writer = ImageWriter(layout, parts, rank, 2)
    assert writer.begin(slot, key, parts, b"{}")
    assert writer.conclude() == []
    slot.close()
    return number


def message(slot: int, rank: int, key: Key) -> Published:
    return Published(
        slot=slot, lineage=key.lineage, step=key.step, rank=rank, world=2, local=2, past=[[key.lineage, None]]
    )


def test_images_outlive_their_writers_until_a_newer_state_is_complete(keeper: str) -> None:
    """A dead rank's image is listed and readable; it goes when a newer state is complete."""
    one, two = KeeperLink(keeper, "n/0.0", 0), KeeperLink(keeper, "n/1.0", 1)
    publish(one, 0, Key(1, 3))
    publish(two, 1, Key(1, 3))
    two.close()
    source = MemorySource(one)
    assert [state.key for state in source.candidates({})] == [Key(1, 3)]
    with source.open(Candidate(key=Key(1, 3))) as images:
        assert torch.equal(torch.cat([reader.tensor(reader.entries()[0]) for reader in images.all()]), WHOLE)
    three = KeeperLink(keeper, "n/1.1", 1)
    publish(one, 0, Key(1, 4))
    assert [state.key for state in source.candidates({})] == [Key(1, 3)], "a state is complete when every rank has it"
    publish(three, 1, Key(1, 4))
    assert source.candidates({})[0].key == Key(1, 4)
    for _ in range(200):
        if len(one.images()) == 3:
            break
        one.news(0.05)
    # The dead rank's old image is gone, so that state is not complete any more.
    assert [state.key for state in source.candidates({})] == [Key(1, 4)]
    one.close()
    three.close()


def test_a_state_is_persisted_when_all_ranks_handed_it_over(keeper: str, tmp_path: Path) -> None:
    """Not before; and the giver hears of it."""
    one, two = KeeperLink(keeper, "n/0.0", 0), KeeperLink(keeper, "n/1.0", 1)
    for link in (one, two):
        link.set_policy(Policy(url=str(tmp_path), every_steps=1, every_seconds=0.0, keep_last=3))
    key = Key(1, 3)
    one.hand_over(message(publish(one, 0, key), 0, key))
    assert one.news(0.3) == []
    two.hand_over(message(publish(two, 1, key), 1, key))
    (done,) = one.news(20.0)
    assert (done.step, done.error) == (3, "")
    tier = TierSource(FilesystemTier(str(tmp_path)))
    with tier.open(Candidate(key=key)) as images:
        assert torch.equal(torch.cat([reader.tensor(reader.entries()[0]) for reader in images.all()]), WHOLE)
    one.close()
    two.close()


def test_a_state_waits_for_the_last_rank_until_that_has_a_newer_one(keeper: str, tmp_path: Path) -> None:
    """However many steps lie between snapshots; a rank that has published a newer state hands no older one over."""
    one, two = KeeperLink(keeper, "n/0.0", 0), KeeperLink(keeper, "n/1.0", 1)
    one.set_policy(Policy(url=str(tmp_path), every_steps=1, every_seconds=0.0, keep_last=3))
    for rank, link in enumerate((one, two)):
        link.board.report_progress(rank, 1, 20)
        link.board.report_published(rank, Key(1, 10))
    one.hand_over(message(publish(one, 0, Key(1, 10)), 0, Key(1, 10)))
    assert one.news(1.0) == [], "the other is only late"
    two.hand_over(message(publish(two, 1, Key(1, 10)), 1, Key(1, 10)))
    (done,) = one.news(20.0)
    assert (done.step, done.error) == (10, "")
    one.hand_over(message(publish(one, 0, Key(1, 20)), 0, Key(1, 20)))
    for rank, link in enumerate((one, two)):
        link.board.report_published(rank, Key(1, 30))
    (done,) = one.news(20.0)
    assert (done.step, done.error) == (20, "not every rank handed it over")
    one.close()
    two.close()


def test_a_failed_write_is_reported_and_the_next_one_works(keeper: str, tmp_path: Path) -> None:
    """Training is unharmed; the slot is free again."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    one, two = KeeperLink(keeper, "n/0.0", 0), KeeperLink(keeper, "n/1.0", 1)
    links = (one, two)
    for step, url in ((3, str(blocked)), (4, str(tmp_path / "good"))):
        for link in links:
            link.set_policy(Policy(url=url, every_steps=1, every_seconds=0.0, keep_last=3))
        for rank, link in enumerate(links):
            link.hand_over(message(publish(link, rank, Key(1, step)), rank, Key(1, step)))
        errors = [link.news(20.0)[0].error for link in links]
        assert all("blocked" in error for error in errors) if step == 3 else errors == ["", ""]
    one.close()
    two.close()


def test_the_last_state_is_the_one_that_the_last_worker_gives(keeper: str, tmp_path: Path) -> None:
    """Who is done waits for who is not, whatever else the keeper does meanwhile; then what all have is durable."""
    one, two = KeeperLink(keeper, "n/0.0", 0), KeeperLink(keeper, "n/1.0", 1)
    for link in (one, two):
        link.set_policy(Policy(url=str(tmp_path), every_steps=1, every_seconds=0.0, keep_last=3))
    for rank, link in enumerate((one, two)):
        slot = publish(link, rank, Key(1, 3))
        link.hand_over(message(slot, rank, Key(1, 3)))
    publish(one, 0, Key(1, 4))
    said: list[str] = []
    waiting = threading.Thread(target=lambda: said.append(one.flush()))
    waiting.start()
    assert two.news(20.0)[0].error == "", "an earlier state becomes durable meanwhile"
    publish(two, 1, Key(1, 4))
    waiting.join(0.3)
    assert waiting.is_alive(), "the other had not said that it is done"
    assert two.flush() == ""
    waiting.join(20)
    assert said == [""]
    assert [state.key for state in TierSource(FilesystemTier(str(tmp_path))).candidates({})] == [Key(1, 4), Key(1, 3)]
    one.close()
    two.close()


def test_images_that_never_make_a_state_are_not_well(keeper: str, tmp_path: Path) -> None:
    """A rank whose siblings have gone elsewhere hears that nothing of its steps is durable."""
    link = KeeperLink(keeper, "n/0.0", 0)
    link.set_policy(Policy(url=str(tmp_path), every_steps=0, every_seconds=300.0, keep_last=3))
    publish(link, 0, Key(1, 3))
    publish(link, 0, Key(1, 4))
    assert "nothing is durable: of 2 ranks only [0]" in link.flush()
    link.close()


def test_refused_memory_is_an_error_of_the_asker(keeper: str) -> None:
    """The keeper lives on."""
    link = KeeperLink(keeper, "n/0.0", 0)
    with pytest.raises(MemoryRefused):
        link.allocate(1 << 60)
    publish(link, 0, Key(1, 1))
    link.close()


def test_nonsense_ends_the_connection_and_not_the_keeper(keeper: str) -> None:
    """A client that sends garbage is hung up on."""
    link = KeeperLink(keeper, "n/0.0", 0)
    rude = connect(keeper, 5.0)
    rude._socket.sendall(b"\x05\x00\x00\x00\x00\x00hello")
    with pytest.raises(LinkLost):
        rude.receive(5.0)
    assert link.images() == []
    rude.close()
    link.close()


def test_a_second_keeper_takes_over_what_the_first_deposited(tmp_path: Path) -> None:
    """The agent's copies of the descriptors are the memory: nothing is lost with the first process."""
    name = f"test-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "resilient_train.keeper", name, "2", "agent", str(os.getpid())]
    first = subprocess.Popen(command)
    agent = connect(name, 20.0)
    agent.send(Adopt(slots=[]))
    link = KeeperLink(name, "n/0.0", 0)
    slot = publish(link, 0, Key(1, 3))
    deposits = {}
    while len(deposits) < 2:
        received = agent.receive(5.0)
        assert received is not None
        deposits[received[0].slot] = received[1][0]  # type: ignore[attr-defined]
    first.kill()
    first.wait()
    second = subprocess.Popen(command)
    try:
        early = connect(name, 20.0)
        early.send(Attach(member="n/1.0", slot=1))
        assert early.receive(0.5) is None, "nobody is served before the agent has handed over"
        again = connect(name, 20.0)
        again.send(Adopt(slots=[[slot, "n/0.0"]]), [deposits[-1], deposits[slot]])
        answer = early.receive(20.0)
        assert answer is not None
        assert isinstance(answer[0], Attached)
        os.close(answer[1][0])
        assert [(image.slot, image.key) for image in link.images()] == [(slot, Key(1, 3))]
        again.send(Flush())
        flushed = again.receive(20.0)
        assert flushed is not None
        assert isinstance(flushed[0], Flushed)
        for channel in (early, again, agent):
            channel.close()
        link.close()
        assert second.wait(20) == 0
    finally:
        second.kill()
        second.wait()
        for fd in deposits.values():
            os.close(fd)


def test_the_newest_state_is_saved_when_the_agent_says_so(tmp_path: Path) -> None:
    """Nobody has handed it over and nobody waits for it; the keeper goes on serving."""
    name = f"test-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "resilient_train.keeper", name, "2", "agent", str(os.getpid())]
    process = subprocess.Popen(command)
    try:
        agent = connect(name, 20.0)
        agent.send(Adopt(slots=[]))
        links = [KeeperLink(name, f"n/{rank}.0", rank) for rank in (0, 1)]
        links[0].set_policy(Policy(url=str(tmp_path), every_steps=1000, every_seconds=0.0, keep_last=3))
        for rank, link in enumerate(links):
            publish(link, rank, Key(1, 3))
        agent.send(Save())
        deadline = time.monotonic() + 30.0
        while not list(tmp_path.glob("step-000000003.g1/manifest.json")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(links[1].images()) == 2
        for channel in (agent, *links):
            channel.close()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_second_keeper_finishes_what_the_first_was_writing(tmp_path: Path) -> None:
    """Killed between two files of a state: the one that is whole stays as it is, the other is written, and the state is
    committed, without a word from the workers."""
    name, key = f"test-{uuid.uuid4().hex}", Key(1, 3)
    command = [sys.executable, "-m", "resilient_train.keeper", name, "2", "agent", str(os.getpid())]
    first = subprocess.Popen(command)
    agent = connect(name, 20.0)
    agent.send(Adopt(slots=[]))
    links = [KeeperLink(name, f"n/{rank}.0", rank) for rank in (0, 1)]
    slots = [publish(link, rank, key) for rank, link in enumerate(links)]
    # Slow enough that the second file waits longer than this test lasts.
    policy = Policy(url=str(tmp_path), every_steps=1, every_seconds=0.0, keep_last=3, bytes_per_second=100.0)
    for rank, link in enumerate(links):
        link.set_policy(policy)
        link.hand_over(message(slots[rank], rank, key))
    deposits, standing = {}, None
    while len(deposits) < 3 or standing is None or standing.running is None:
        received = agent.receive(20.0)
        assert received is not None
        if isinstance(received[0], Deposit):
            deposits[received[0].slot] = received[1][0]
        if isinstance(received[0], Standing):
            standing = received[0]
    deadline = time.monotonic() + 20
    while not (whole := list(tmp_path.glob("*/*.safetensors"))):
        assert time.monotonic() < deadline
    first.kill()
    first.wait()
    (written,) = whole
    before = written.stat()
    assert not list(tmp_path.glob("*/manifest.json"))

    second = subprocess.Popen(command)
    try:
        again = connect(name, 20.0)
        told = dataclasses.asdict(standing)
        told["policy"]["bytes_per_second"] = 0.0
        kept = [[slot, f"n/{rank}.0"] for rank, slot in enumerate(slots)]
        again.send(Adopt(slots=kept, standing=told), [deposits[number] for number in (-1, *slots)])
        received = again.receive(20.0)
        while received is not None and not (isinstance(received[0], Notice) and received[0].kind == "persisted"):
            received = again.receive(20.0)
        assert received is not None
        with TierSource(FilesystemTier(str(tmp_path))).open(Candidate(key=key)) as images:
            assert torch.equal(torch.cat([reader.tensor(reader.entries()[0]) for reader in images.all()]), WHOLE)
        after = written.stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "written a second time"
        for link in links:
            link.close()
        again.close()
        agent.close()
        assert second.wait(20) == 0
    finally:
        second.kill()
        second.wait()
        for fd in deposits.values():
            os.close(fd)
