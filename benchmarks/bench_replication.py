"""How fast a state is copied to another node and read back from it, and what that costs a step; on loopback, CPU.

    python benchmarks/bench_replication.py [--mib 256] [--rounds 5] [--steps 60] [--matrix 600]

Copying and reading go through real keepers and are verified on arrival; a plain socket copies as many bytes between two
processes, out of and into warm memory, in turns with them.  A third of the columns of a matrix of 1,536 is read as rows
and with everything between them.  Then two nodes of one rank each do the same step over and over, with a snapshot at
every one, in turns: without copies to the other, with them, and with bare sockets that carry as many bytes between
other processes, which is the least that copies can cost where the processor carries them.
"""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from resilient_train.agent.keeper_process import KeeperProcess
from resilient_train.image.fetch import Range
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.ipc.channel import Channel
from resilient_train.spec.messages import Peers, Serving
from resilient_train.spec.peers import Put
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.world import Key
from resilient_train.storage.peer import Peer, ask_held, put_bytes
from resilient_train.storage.wire import connect
from resilient_train.worker.keeper_link import KeeperLink
from resilient_train.worker.remote import RemoteImage
from resilient_train.worker.slots import Slots

RECEIVE = """
import socket, sys, numpy as np
size, sock = int(sys.argv[1]), socket.create_connection(("127.0.0.1", int(sys.argv[2])))
target = memoryview(np.ones(size, dtype=np.uint8))
while True:
    left = target
    while left:
        count = sock.recv_into(left[: 8 << 20], 0, socket.MSG_WAITALL)
        if not count:
            sys.exit()
        left = left[count:]
    sock.sendall(b"!")
"""


SEND = """
import socket, sys, numpy as np
size, server = int(sys.argv[1]), socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sock, _ = server.accept()
data = memoryview(np.ones(size, dtype=np.uint8))
for _ in sys.stdin:
    for at in range(0, size, 8 << 20):
        sock.sendall(data[at : at + (8 << 20)])
    sock.recv(1)
    print(flush=True)
"""


WIDTH = 4 * 1536
"""Bytes of a row of the matrix."""
COPIES, SOCKETS = "with them", "with bare sockets beside it"
WAYS = ("without copies to the other node", COPIES, SOCKETS)
COLUMNS = "a third of the columns, 4 threads"
WITH_GAPS = "the same with what lies between them"


class Node:
    """A keeper and its only worker."""

    def __init__(self, name: str, secret: str) -> None:
        self.name = name
        self.keeper = KeeperProcess(f"bench-{uuid.uuid4().hex}", 1, "")
        self.endpoint = ""
        self.keeper.serve("127.0.0.1", secret)
        self.keeper.start()
        while not self.keeper.try_connect():
            time.sleep(0.01)
        channel = self.keeper.channel
        assert channel is not None
        threading.Thread(target=self._listen, args=(channel,), daemon=True).start()
        while not self.endpoint:
            time.sleep(0.01)
        self.link = KeeperLink(self.keeper.address, f"{name}/0.0", 0)
        self.link.board.report_copies(0, 1)
        self.slots = Slots(self.link)
        self.newest = Key(0, 0)
        self.generation = 1

    def _listen(self, channel: Channel) -> None:
        try:
            while received := channel.receive(60.0):
                if not self.keeper.take_in(*received) and isinstance(received[0], Serving):
                    self.endpoint = received[0].endpoint
        except Exception:
            return  # It is hung up on at the end.

    def snapshot(self, key: Key, rank: int, state: torch.Tensor) -> ImageWriter | None:
        """Begin to copy the state; None if there was no slot."""
        entry = Entry(
            name="t", dtype="F32", shape=(len(state),), global_shape=(2 * len(state),), offset=(rank * len(state),)
        )
        part = Part(entry=entry, sources=(state,), lazy=True, fixed=True)
        writer = ImageWriter(plan_image([entry], 10), [part], rank, 2)
        self.link.board.report_progress(0, self.generation, key.step)
        for slot in self.slots.writable(writer.layout.total, self.newest, {1: None}):
            slot.key = None
            if writer.begin(slot.memory, key, [part], b"{}"):
                slot.key = key
                return writer
        return None

    def close(self) -> None:
        """End."""
        self.slots.close()
        self.link.close()
        self.keeper.stop(20.0)


class Bare:
    """A process that sends so many bytes to another through a socket each time it is told to."""

    def __init__(self, size: int) -> None:
        command = [sys.executable, "-c", SEND, str(size)]
        self._sender = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        port = self._sender.stdout.readline().strip()
        self._receiver = subprocess.Popen([sys.executable, "-c", RECEIVE, str(size), port])

    def begin(self) -> None:
        """Send once more."""
        self._sender.stdin.write("\n")
        self._sender.stdin.flush()

    def wait(self) -> None:
        """Until that has arrived."""
        self._sender.stdout.readline()

    def close(self) -> None:
        """End both."""
        self._sender.communicate()
        self._receiver.wait()


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def bandwidth(a: Node, b: Node, secret: bytes, mib: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for each way to move an image of ``a`` to ``b``, in turns."""
    for step in (1, 2):
        writer = a.snapshot(Key(1, step), 0, torch.ones(mib << 18))
        assert writer is not None
        writer.conclude()
    image = ask_held(a.endpoint, secret, 5.0).images[0]
    views = {slot.key.step: memoryview(slot.memory.map) for slot in a.slots.all() if slot.key is not None}
    data = views[1]
    server = socket.create_server(("127.0.0.1", 0))
    plain = subprocess.Popen([sys.executable, "-c", RECEIVE, str(image.size), str(server.getsockname()[1])])
    sock, _ = server.accept()
    wire = connect(b.endpoint, secret, 5.0)
    target = np.ones(image.size, dtype=np.uint8)
    copies = list(views.items())
    peer = Peer(a.endpoint, secret)

    def send() -> None:
        for at in range(0, len(data), 8 << 20):
            sock.sendall(data[at : at + (8 << 20)])
        sock.recv(1)

    def copy() -> None:
        # What is there already would not be sent again, so the two take turns in one slot.
        step, view = copies[0]
        put = Put(source="a/0", lineage=1, step=step, rank=0, world=2, size=image.size, keep=None)
        put_bytes(wire, put, [view], lambda _: None)
        copies.reverse()

    def read(threads: int) -> None:
        reader = RemoteImage(0, [(peer, image)]).reader
        (entry,) = reader.entries()
        wanted = Range(reader.start(entry), entry.nbytes, target.ctypes.data)
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(task) for task in reader.fetching([wanted])]:
                done.result()

    def columns(*rows: int) -> None:
        reader = RemoteImage(0, [(peer, image)]).reader
        (entry,) = reader.entries()
        matrix = entry.nbytes // WIDTH * WIDTH
        wanted = Range(reader.start(entry), matrix - WIDTH * 2 // 3, target.ctypes.data, *rows)
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(task) for task in reader.fetching([wanted])]:
                done.result()

    ways: dict[str, Callable[[], None]] = {
        "plain socket": send,
        "copy to a keeper, verified": copy,
        "read from a keeper, verified, 1 thread": lambda: read(1),
        "read from a keeper, verified, 4 threads": lambda: read(4),
        COLUMNS: lambda: columns(WIDTH // 3, WIDTH),
        WITH_GAPS: columns,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            took = timed(way)
            if turn:  # The first finds cold memory.
                seconds[name].append(took)
    for view in views.values():
        view.release()
    wire.close()
    peer.close()
    sock.close()
    server.close()
    plain.wait()
    return seconds


def step_times(
    nodes: list[Node], state: torch.Tensor, steps: int, matrix: int, first: int, bare: list[Bare]
) -> tuple[list[float], int]:
    """Seconds of each step, during which the bare sockets carry what they carried too; snapshots skipped."""
    weights = torch.randn(matrix, matrix)
    times, skipped = [], 0
    for step in range(first, first + steps):
        began = time.perf_counter()
        for socket_ in bare if step > first else ():
            socket_.wait()
        for socket_ in bare:
            socket_.begin()
        writers = [node.snapshot(Key(1, step), rank, state) for rank, node in enumerate(nodes)]
        for _ in range(8):
            weights = torch.nn.functional.normalize(weights @ weights)
        for node, writer in zip(nodes, writers, strict=True):
            if writer is None:
                skipped += 1
            else:
                writer.conclude()
                node.link.board.report_published(0, Key(1, step))
        for node in nodes:
            node.newest = Key(1, step)
        times.append(time.perf_counter() - began)
    for socket_ in bare:
        socket_.wait()
    return times, skipped


def introduce(nodes: list[Node], generation: int, *, copying: bool) -> None:
    """Have the nodes copy to each other, or not."""
    keepers = [[node.name, node.endpoint] for node in nodes]
    for node in nodes:
        node.generation = generation
        ring = keepers if copying else [[node.name, node.endpoint]]
        node.keeper.follow(Peers(node=node.name, generation=generation, slots=[0], keepers=ring, others=[]))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--matrix", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(" ".join(sys.argv))
    secret = secrets.token_hex(32)
    nodes = [Node(name, secret) for name in "ab"]
    seconds = bandwidth(nodes[0], nodes[1], bytes.fromhex(secret), args.mib, args.rounds)
    for node in nodes:
        node.close()
    print(f"\n{args.mib} MiB, median of {args.rounds}:")
    for name, values in seconds.items():
        took = statistics.median(values)
        wanted = (args.mib << 20) / (3 if name in (COLUMNS, WITH_GAPS) else 1)
        print(f"  {name:42} {took:6.3f} s {wanted / took / 1e9:5.2f} GB/s of what is wanted")

    nodes = [Node(name, secret) for name in "ab"]
    state = torch.ones(args.mib << 16)
    step_times(nodes, state, 10, args.matrix, 1, [])
    sockets = [Bare(4 * len(state)) for _ in nodes]
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    kept: set[Key] = set()
    skipped, step = 0, 11
    for turn in range(3 * len(WAYS)):
        way = WAYS[turn % len(WAYS)]
        introduce(nodes, turn + 1, copying=way == COPIES)
        times, missed = step_times(nodes, state, args.steps // 3, args.matrix, step, sockets if way == SOCKETS else [])
        taken[way].extend(times)
        step += len(times)
        skipped += missed
        kept |= {key for node in nodes if (key := node.link.board.kept())}
    for node in nodes:
        node.close()
    for bare in sockets:
        bare.close()
    plain = statistics.median(taken[WAYS[0]])
    print(f"\nsteps on two nodes in one process, {args.mib // 4} MiB each, snapshot at every step, medians:")
    for way, times in taken.items():
        print(f"  {way:34} {statistics.median(times) * 1e3:7.1f} ms ({statistics.median(times) / plain:.2f}x)")
    print(f"  snapshots skipped: {skipped}; last state kept: {max(kept, default=None)}, of {step - 1} steps")


if __name__ == "__main__":
    main()
