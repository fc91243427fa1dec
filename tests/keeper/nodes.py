"""Nodes of a job without agents and training: real keepers, each with somebody who plays its agent and its workers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict

import torch

from resilient_train.errors import LinkLost
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.ipc.channel import Channel, connect
from resilient_train.spec.messages import (
    Adopt,
    Deposit,
    Flush,
    Flushed,
    Message,
    Notice,
    Peers,
    Serve,
    Serving,
    Standing,
    Withdraw,
)
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key
from resilient_train.worker.keeper_link import KeeperLink
from resilient_train.worker.slots import Slots

SECRET = "5ec4e7" * 8


def wait_until(condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
    """Poll until ``condition()`` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def rows_of(rank: int, world: int, step: int, rows: int = 4, columns: int = 5) -> torch.Tensor:
    """A rank's rows of the state at a step; told apart from all others by their values."""
    count = rows * columns
    return torch.arange(count, dtype=torch.float32).view(rows, columns) + count * rank + 1000.0 * step + 0.5 * world


class Worker:
    """One rank: publishes images like a `Checkpointer` does."""

    def __init__(self, node: Node, slot: int, copies: int = 1, rate: int = 0, group: int = 0) -> None:
        self.link = KeeperLink(node.address, f"{node.name}/{slot}.0", slot)
        self.link.board.report_copies(slot, copies, rate, group)
        self.slot = slot
        self.slots = Slots(self.link)
        self.generation = 1
        self.safe: Key | None = None
        self.past: dict[int, int | None] = {1: None}

    def publish(self, key: Key, rank: int, world: int, rows: int = 4, columns: int = 5) -> bool:
        """Write the image of a state at its boundary; False if there is no free slot."""
        entry = Entry(
            name="t",
            dtype="F32",
            shape=(rows, columns),
            global_shape=(rows * world, columns),
            offset=(rows * rank, 0),
        )
        layout = plan_image([entry], 10)
        parts = [Part(entry=entry, sources=(rows_of(rank, world, key.step, rows, columns),))]
        writer = ImageWriter(layout, parts, rank, world)
        self.link.board.report_progress(self.slot, self.generation, key.step)
        for slot in self.slots.writable(layout.total, self.safe, self.past):
            slot.key = None
            if writer.begin(slot.memory, key, parts, b"{}"):
                assert writer.conclude() == []
                slot.key = key
                self.link.board.report_published(self.slot, key)
                return True
        return False

    def close(self) -> None:
        self.slots.close()
        self.link.close()


class Node:
    """A keeper, its agent and its workers."""

    def __init__(self, name: str, workers: int = 1, secret: str = SECRET, serve: bool = True) -> None:
        self.name = name
        self.address = f"test-{uuid.uuid4().hex}"
        self._command = [sys.executable, "-m", "resilient_train.keeper", self.address, str(workers), "agent"]
        self._command.append(str(os.getpid()))
        self.secret = secret
        self.deposits: dict[int, tuple[int, str]] = {}
        self.notices: list[Notice] = []
        self.flushed: Flushed | None = None
        self.standing: Standing | None = None
        self.endpoint = ""
        self._count = workers
        self.workers: list[Worker] = []
        self.process = subprocess.Popen(self._command)
        self.agent = self._adopt()
        if serve:
            self.agent.send(Serve(host="127.0.0.1", secret=secret))
            wait_until(lambda: self.endpoint, "Serving")

    def _adopt(self) -> Channel:
        agent = connect(self.address, 20.0)
        kept = [(slot, *held) for slot, held in sorted(self.deposits.items())]
        slots = [[slot, owner] for slot, _, owner in kept if slot >= 0]
        standing = None if self.standing is None else asdict(self.standing)
        agent.send(Adopt(slots=slots, standing=standing), [fd for _, fd, _ in kept])
        threading.Thread(target=self._listen, args=(agent,), daemon=True).start()
        return agent

    def _listen(self, agent: Channel) -> None:
        while True:
            try:
                received = agent.receive(120.0)
            except (LinkLost, OSError, ValueError):
                return
            if received is None:
                return
            self._hear(*received)

    def _hear(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case Deposit(slot=slot, owner=owner):
                self.deposits[slot] = (descriptors[0], owner)
            case Withdraw(slot=slot):
                os.close(self.deposits.pop(slot)[0])
            case Notice():
                self.notices.append(message)
            case Flushed():
                self.flushed = message
            case Serving(endpoint=endpoint):
                self.endpoint = endpoint
            case Standing():
                self.standing = message

    def start_workers(self, copies: int = 1, rate: int = 0, group: int = 0) -> list[Worker]:
        self.workers = [Worker(self, slot, copies, rate, group) for slot in range(self._count)]
        return self.workers

    def replace_keeper(self) -> None:
        """Kill the keeper; another takes over what it had deposited."""
        self.process.kill()
        self.process.wait()
        self.agent.close()
        self.endpoint = ""
        self.process = subprocess.Popen(self._command)
        self.agent = self._adopt()
        self.agent.send(Serve(host="127.0.0.1", secret=self.secret))
        wait_until(lambda: self.endpoint, "Serving")

    def kill(self) -> None:
        """The whole node dies."""
        self.process.kill()
        self.process.wait()
        self.agent.close()
        for worker in self.workers:
            worker.close()
        self.workers = []

    def flush(self) -> None:
        self.flushed = None
        self.agent.send(Flush())

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []
        self.agent.close()
        try:
            self.process.wait(0.0 if self.flushed is None else 20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for fd, _ in self.deposits.values():
            os.close(fd)
        self.deposits = {}


class Cluster:
    """Nodes that know of each other."""

    def __init__(self, *workers: int) -> None:
        self.nodes = [Node(name, count) for name, count in zip("abcdef", workers, strict=False)]
        self.generation = 1

    def introduce(
        self,
        nodes: list[Node] | None = None,
        others: list[Node] | None = None,
        *,
        labels: dict[str, list[str]] | None = None,
        endpoints: dict[str, str] | None = None,
    ) -> None:
        """Tell everybody of everybody; that some stand elsewhere, if that is said."""
        nodes = self.nodes if nodes is None else nodes
        for node in nodes:
            node.agent.send(
                Peers(
                    node=node.name,
                    generation=self.generation,
                    slots=list(range(node._count)),
                    keepers=[[other.name, (endpoints or {}).get(other.name, other.endpoint)] for other in nodes],
                    labels=labels or {},
                    others=[[other.name, other.endpoint] for other in others or []],
                )
            )

    def lose(self, *nodes: Node) -> None:
        """These die, and the agents of the others hear of it."""
        for node in nodes:
            node.kill()
            self.nodes.remove(node)
        for node in self.nodes:
            others = [[other.name, other.endpoint] for other in self.nodes]
            slots = list(range(node._count))
            node.agent.send(Peers(node=node.name, generation=self.generation, slots=slots, keepers=[], others=others))

    def start_workers(self, copies: int = 1, rate: int = 0, group: int = 0) -> list[Worker]:
        return [worker for node in self.nodes for worker in node.start_workers(copies, rate, group)]

    def step(self, key: Key, rows: int = 4, columns: int = 5) -> list[bool]:
        """All ranks publish their image of a state; whether each could."""
        workers = [worker for node in self.nodes for worker in node.workers]
        done = [worker.publish(key, rank, len(workers), rows, columns) for rank, worker in enumerate(workers)]
        for worker in workers:
            worker.safe = key
        return done

    def step_until(self, condition: Callable[[], object], lineage: int = 1, first: int = 1, rows: int = 4) -> int:
        """Train until something holds; the last step."""
        step = first
        deadline = time.monotonic() + 60

        while not condition():
            assert time.monotonic() < deadline, self.report()
            self.step(Key(lineage, step), rows)
            time.sleep(0.03)
            step += 1
        return step - 1

    def settle(self, rows: int = 4) -> Key:
        """Train until the newest state of all is what survives: with nothing newer to copy, its copies stay."""
        step, kept = 1, Key(1, 1)

        def settled() -> bool:
            return all(key == kept for key in self.kept())

        while not all(self.step(kept, rows)):
            step += 1
            kept = Key(1, step)
            time.sleep(0.03)
        wait_until(settled, f"copies of {kept}")
        return kept

    def kept(self) -> list[Key | None]:
        """What each node's board says survives."""
        return [node.workers[0].link.board.kept() for node in self.nodes if node.workers]

    def report(self) -> str:
        return "\n".join(f"{node.name}: {[n.text for n in node.notices]}" for node in self.nodes)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
