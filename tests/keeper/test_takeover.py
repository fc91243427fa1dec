"""What a keeper does when others die around it: its predecessor, its agent, a worker in the middle of something."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.ipc.channel import Channel, connect
from resilient_train.spec.messages import Adopt, Deposit, Flush, Flushed, Message, Notice, Policy, Standing
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.worker.keeper_link import KeeperLink

KEEPER = [sys.executable, "-m", "resilient_train.keeper"]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Whatever a test starts; ended after it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def publish(link: KeeperLink, key: Key) -> int:
    """Write a state of one rank into a fresh slot."""
    entry = Entry(name="t", dtype="F32", shape=(8, 5), global_shape=(8, 5), offset=(0, 0))
    layout = plan_image([entry], 10)
    number, slot = link.allocate(layout.total)
    parts = [Part(entry=entry, sources=(torch.ones(8, 5),))]
    writer = ImageWriter(layout, parts, 0, 1)
    assert writer.begin(slot, key, parts, b"{}")
    assert writer.conclude() == []
    slot.close()
    return number


def hear(agent: Channel, kind: type[Message], count: int = 1) -> list[tuple[Message, list[int]]]:
    """The next ``count`` messages of a kind."""
    heard: list[tuple[Message, list[int]]] = []
    while len(heard) < count:
        received = agent.receive(20.0)
        assert received is not None
        if isinstance(received[0], kind):
            heard.append(received)
    return heard


def wait_until(condition: object, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_keeper_that_takes_over_saves_what_its_predecessor_may_have_been_saving(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """The workers do not hand it over again, and the next state that is due may be hours away."""
    name = f"test-{uuid.uuid4().hex}"
    command = [*KEEPER, name, "1", "agent", str(os.getpid())]
    processes.append(subprocess.Popen(command))
    agent = connect(name, 20.0)
    agent.send(Adopt(slots=[]))
    link = KeeperLink(name, "n/0.0", 0)
    policy = Policy(url=str(tmp_path), every_steps=1000, every_seconds=0.0, keep_last=3)
    slot = publish(link, Key(1, 3))
    deposits = {message.slot: fds[0] for message, fds in hear(agent, Deposit, 2)}  # type: ignore[attr-defined]
    processes[0].kill()
    processes[0].wait()
    processes.append(subprocess.Popen(command))
    again = connect(name, 20.0)
    standing = asdict(Standing(policy=asdict(policy), persisted=None, running=None, past=[[1, None]]))
    again.send(Adopt(slots=[[slot, "n/0.0"]], standing=standing), [deposits[-1], deposits[slot]])
    ((notice, _),) = hear(again, Notice)
    assert isinstance(notice, Notice)
    assert notice.text.startswith("step 3 (lineage 1) is durable")
    assert listing(FilesystemTier(str(tmp_path))) == ([Key(1, 3)], [])
    for channel in (agent, again):
        channel.close()
    link.close()
    assert processes[1].wait(20) == 0
    for fd in deposits.values():
        os.close(fd)


def test_what_workers_finish_after_their_agent_died_is_saved_too(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """The last state is the last one that exists when nobody is left to make another."""
    name = f"test-{uuid.uuid4().hex}"
    processes.append(subprocess.Popen([*KEEPER, name, "1", "agent", str(os.getpid())]))
    agent = connect(name, 20.0)
    agent.send(Adopt(slots=[]))
    link = KeeperLink(name, "n/0.0", 0)
    link.set_policy(Policy(url=str(tmp_path), every_steps=1000, every_seconds=0.0, keep_last=3))
    publish(link, Key(1, 3))
    agent.close()
    tier = FilesystemTier(str(tmp_path))
    wait_until(lambda: listing(tier)[0] == [Key(1, 3)], "the state of the agent's end")
    publish(link, Key(1, 4))
    link.close()
    assert processes[0].wait(20) == 0
    assert listing(tier)[0] == [Key(1, 3), Key(1, 4)]


def test_a_keeper_whose_agent_died_before_it_came_ends(processes: list[subprocess.Popen[bytes]]) -> None:
    """It has nothing, and nobody will give it anything."""
    name = f"test-{uuid.uuid4().hex}"
    starter = (
        "import os, subprocess, sys;"
        "print(subprocess.Popen([*sys.argv[1:], str(os.getpid())], stdout=subprocess.DEVNULL).pid)"
    )
    command = [sys.executable, "-c", starter, *KEEPER, name, "1", "agent"]
    pid = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the keeper's end")


def test_a_stopped_agent_does_not_stop_the_keeper(tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Ctrl-Z stops rtrun and not the training: what the keeper has to tell it waits, and nobody waits for it."""
    name = f"test-{uuid.uuid4().hex}"
    processes.append(subprocess.Popen([*KEEPER, name, "1", "agent", str(os.getpid())]))
    agent = connect(name, 20.0)
    agent.send(Adopt(slots=[]))
    link = KeeperLink(name, "n/0.0", 0)
    texts = [str(tmp_path / ("x" * 200 + str(number))) for number in range(2000)]
    for url in texts:
        link.set_policy(Policy(url=url, every_steps=1000, every_seconds=0.0, keep_last=3))
    assert link.images() == [], "the keeper answers although its agent does not read"
    heard = hear(agent, Standing, len(texts))
    assert [message.policy["url"] for message, _ in heard] == texts  # type: ignore[attr-defined]
    link.close()
    agent.close()
    assert processes[0].wait(20) == 0


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_killed_agent_cannot_remove_any_more_is_removed(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]], killed: bool
) -> None:
    """Its logs at the end in any case; what it needs beyond that, such as its etcd's data, only if it was killed."""
    logs, data = tmp_path / "logs", tmp_path / "data"
    for folder in (logs, data):
        folder.mkdir()
        (folder / "file").touch()
    name = f"test-{uuid.uuid4().hex}"
    processes.append(subprocess.Popen([*KEEPER, name, "1", "agent", str(os.getpid())]))
    agent = connect(name, 20.0)
    agent.send(Adopt(slots=[], scratch=str(logs), leaves=[str(data)]))
    if not killed:
        agent.send(Flush())
        hear(agent, Flushed)
    agent.close()
    assert processes[0].wait(20) == 0
    assert (logs.exists(), data.exists()) == (False, not killed)
