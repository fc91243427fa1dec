"""Copies on several nodes: what two losses at once leave, transfers that break, and bandwidth."""

from __future__ import annotations

import itertools
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from nodes import SECRET, Cluster, Node, rows_of, wait_until

from resilient_train.errors import CheckpointDamaged, LinkLost
from resilient_train.image.arena import Memory
from resilient_train.image.fetch import Range
from resilient_train.plan.placement import place
from resilient_train.spec.peers import Put, Ready
from resilient_train.spec.topology import Topology
from resilient_train.spec.world import Key
from resilient_train.storage.peer import HeldImage, Peer, PeerDeclined, ask_held, put_bytes
from resilient_train.storage.wire import connect
from resilient_train.worker.remote import RemoteImage
from resilient_train.worker.sources import Candidate, MemorySource

pytestmark = pytest.mark.timeout(180)
KEY = bytes.fromhex(SECRET)
ROWS, COLUMNS = 4200, 1000
"""16 MiB and some: more than what is received at once."""
Make = Callable[..., Cluster]


def held(node: Node) -> list[HeldImage]:
    return ask_held(node.endpoint, KEY, 5.0).images


def test_two_copies_survive_any_two_losses(cluster: Make) -> None:
    """Of four nodes: a state that is called kept is whole in the memory of every two of them."""
    job = cluster(1, 1, 1, 1)
    job.introduce()
    job.start_workers(copies=2)
    kept = job.settle()
    ranks = [{image.rank for image in held(node) if image.key == kept} for node in job.nodes]
    for one, other in itertools.combinations(ranks, 2):
        assert one | other == {0, 1, 2, 3}
    job.lose(job.nodes[1], job.nodes[2])
    source = MemorySource(job.nodes[1].workers[0].link)
    newest = source.candidates({})[0]
    assert newest.key >= kept
    with source.open(newest) as images:
        for rank, reader in enumerate(images.all()):
            assert torch.equal(reader.tensor(reader.entries()[0]), rows_of(rank, 4, newest.key.step))


def test_nothing_is_kept_while_one_of_two_copies_is_missing(cluster: Make) -> None:
    """A node that has no memory for its copies: the others' alone are not what was asked for."""
    job = cluster(1, 1, 1)
    job.start_workers(copies=2)
    for step in range(1, 6):
        assert all(job.step(Key(1, step), rows=2000))
    poor = job.nodes[2].process.pid
    before = resource.prlimit(poor, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    job.introduce()

    def copied() -> bool:
        refused = any("no shared memory" in notice.text for node in job.nodes[:2] for notice in node.notices)
        return refused and any(image.replica for node in job.nodes[:2] for image in held(node))

    last = job.step_until(copied, first=6, rows=2000)
    assert job.kept() == [None, None, None]
    resource.prlimit(poor, resource.RLIMIT_FSIZE, before)
    job.step_until(lambda: all(job.kept()), first=last + 1, rows=2000)


def test_no_copies_take_no_memory(cluster: Make) -> None:
    """With replicas=0 nothing is copied, and ranks have no further slots; what lost ranks left is dropped as ever."""
    job = cluster(2, 1)
    job.introduce()
    job.start_workers(copies=0)
    done = [wrote for step in range(1, 60) for wrote in job.step(Key(1, step))]
    assert all(done)
    assert job.kept() == [None, None]
    for node in job.nodes:
        assert not any(image.replica for image in held(node))
        assert all(len(worker.slots.all()) <= 3 for worker in node.workers)
    first = job.nodes[0]
    first.workers.pop().close()
    first._count = 1
    job.generation = 2
    job.introduce()
    for node in job.nodes:
        node.workers[0].generation = 2
    job.step_until(lambda: all(image.rank == 0 for image in held(first)), first=60)


def test_copies_go_to_another_rack(cluster: Make) -> None:
    """By the labels that the agents pass on."""
    job = cluster(1, 1, 1, 1)
    labels = {name: [f"rack=r{index // 2}"] for index, name in enumerate("abcd")}
    job.introduce(labels=labels)
    job.start_workers()
    job.step_until(lambda: all(job.kept()))
    placed = place(Topology(labels), 1)
    for rank, node in enumerate(job.nodes):
        (target,) = placed[node.name]
        (keeper,) = [other for other in job.nodes if any(i.replica and i.rank == rank for i in held(other))]
        assert keeper.name == target
        assert labels[target] != labels[node.name]


def test_a_copy_that_was_damaged_in_memory_is_named_and_the_other_one_is_read(
    cluster: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Long after it was verified on arrival, and its original is gone; nobody is given the flipped bit."""
    job = cluster(1, 1, 1, 1)
    job.introduce()
    job.start_workers(copies=2)
    kept = job.settle(rows=40_000)
    holders = place(Topology({node.name: [] for node in job.nodes}), 2)["a"]
    reader = next(node for node in job.nodes[1:] if node.name not in holders)
    # The one that is asked first.
    damaged = min((node for node in job.nodes if node.name in holders), key=lambda node: node.endpoint)
    (copy,) = [image for image in held(damaged) if image.replica and image.rank == 0 and image.key == kept]
    wait_until(lambda: copy.slot in damaged.deposits, "the deposit")
    memory = Memory(damaged.deposits[copy.slot][0])
    memory.map[copy.size // 2] ^= 1
    memory.close()
    job.lose(job.nodes[0])
    with MemorySource(reader.workers[0].link).open(Candidate(key=kept)) as images:
        (entry,) = images.reader(0).entries()
        assert torch.equal(images.reader(0).tensor(entry), rows_of(0, 4, kept.step, 40_000))
    assert f"{damaged.endpoint} serves damaged bytes; reading rank 0's image elsewhere" in caplog.text


@pytest.mark.parametrize("where", ["header", "data"])
def test_where_this_nodes_own_memory_is_damaged_a_copy_is_read(
    cluster: Make, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """By however many threads at once; without a copy it is an error."""
    job = cluster(1, 1)
    job.introduce()
    job.start_workers(copies=1)
    kept = job.settle(rows=400_000)
    (slot,) = [slot for slot in job.nodes[0].workers[0].slots.all() if slot.key == kept]
    for at in (300,) if where == "header" else range(slot.memory.size // 4, slot.memory.size // 4 * 3, 1 << 20):
        slot.memory.map[at] ^= 1
    source = MemorySource(job.nodes[0].workers[0].link)
    target = torch.empty(400_000, 5)
    with source.open(Candidate(key=kept)) as images, ThreadPoolExecutor(8) as pool:
        reader = images.reader(0)
        (entry,) = reader.entries()
        wanted = Range(reader.start(entry), entry.nbytes, target.data_ptr())
        for done in [pool.submit(task) for task in reader.fetching([wanted])]:
            done.result()
    assert torch.equal(target, rows_of(0, 2, kept.step, 400_000))
    assert "reading a copy elsewhere" in caplog.text
    job.lose(job.nodes[1])
    with (
        pytest.raises(CheckpointDamaged, match="memory of rank"),
        source.open(Candidate(key=kept, without=(1,))) as images,
    ):
        images.reader(0).tensor(entry)


# ---- transfers that break -------------------------------------------------------------------------------------------


@pytest.fixture
def node() -> Iterator[Node]:
    """A node that has one image, and takes copies of it in another's name."""
    made = Node("a", 1)
    (worker,) = made.start_workers()
    assert worker.publish(Key(1, 3), 0, 2, ROWS, COLUMNS)
    yield made
    made.close()


def whole(node: Node) -> tuple[HeldImage, bytes]:
    (image,) = held(node)
    peer = Peer(node.endpoint, KEY)
    data = bytes(peer.read(image, 0, image.size))
    peer.close()
    return image, data


def request(image: HeldImage, step: int = 3, keep: list[int] | None = None) -> Put:
    return Put(source="b/0", lineage=1, step=step, rank=0, world=2, size=image.size, keep=keep)


def send_part(node: Node, put: Put, data: bytes, upto: int) -> int:
    """Send an image up to some byte and hang up; from where the other end wanted it."""
    wire = connect(node.endpoint, KEY, 5.0)
    wire.patience(20.0)
    wire.send(put)
    begin = wire.expect(Ready).offset
    wire.send_bytes([memoryview(data)[begin:upto]])
    wire._socket.shutdown(socket.SHUT_WR)
    with pytest.raises(LinkLost):  # The other end has taken everything in.
        wire.receive()
    wire.close()
    return begin


def send_rest(node: Node, put: Put, data: bytes) -> int:
    """Send an image; how many bytes that took."""
    sent: list[int] = []
    wire = connect(node.endpoint, KEY, 5.0)
    try:
        put_bytes(wire, put, [memoryview(data)], sent.append, 1 << 20)
    finally:
        wire.close()
    return sum(sent)


def test_a_transfer_that_broke_goes_on_where_it_stopped(node: Node) -> None:
    """Twice; what arrives in the end is listed and is what was sent.  Sent once more, it is there already."""
    image, data = whole(node)
    assert send_part(node, request(image), data, 5 << 20) == 0
    second = send_part(node, request(image), data, 13 << 20)
    assert 3 << 20 <= second <= 5 << 20
    assert send_rest(node, request(image), data) <= len(data) - (8 << 20)
    (copy,) = [other for other in held(node) if other.replica]
    peer = Peer(node.endpoint, KEY)
    reader = RemoteImage(0, [(peer, copy)]).reader
    assert torch.equal(reader.tensor(reader.entries()[0]), rows_of(0, 2, 3, ROWS, COLUMNS))
    peer.close()
    assert send_rest(node, request(image), data) == 0


def test_what_arrived_damaged_before_a_transfer_broke_is_found(node: Node) -> None:
    """The first part is not verified less than the rest; after that the whole is sent again."""
    image, data = whole(node)
    at = 2 << 20
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    send_part(node, request(image), damaged, 6 << 20)
    with pytest.raises(PeerDeclined, match="checksum"):
        send_rest(node, request(image), data)
    assert not any(other.replica for other in held(node))
    assert send_rest(node, request(image), data) == len(data)


def test_another_state_does_not_go_on_with_the_bytes_of_one_that_broke(node: Node) -> None:
    """It begins anew."""
    image, data = whole(node)
    send_part(node, request(image), data, 9 << 20)
    wire = connect(node.endpoint, KEY, 5.0)
    wire.patience(20.0)
    wire.send(request(image, step=4))
    assert wire.expect(Ready).offset == 0
    wire.close()


def test_who_comes_again_need_not_wait_for_its_silent_connection_to_end(node: Node) -> None:
    """Nobody here has heard that it is gone: a network that was cut tells nobody."""
    image, data = whole(node)
    silent = connect(node.endpoint, KEY, 5.0)
    silent.patience(20.0)
    silent.send(request(image))
    silent.expect(Ready)
    silent.send_bytes([memoryview(data)[: 9 << 20]])
    began = time.monotonic()
    send_rest(node, request(image), data)
    assert time.monotonic() - began < 8.0
    with pytest.raises(LinkLost):
        silent.receive()
    silent.close()


def test_a_transfer_resumes_behind_a_silent_connection_though_the_other_slot_is_taken(node: Node) -> None:
    """Whoever received is done with the slot as soon as it has given up."""
    image, data = whole(node)
    send_rest(node, request(image), data)
    (worker,) = node.workers
    assert worker.publish(Key(1, 4), 0, 2, ROWS, COLUMNS)
    (newer,) = [other for other in held(node) if other.key.step == 4]
    peer = Peer(node.endpoint, KEY)
    data = bytes(peer.read(newer, 0, newer.size))
    peer.close()
    with ExitStack() as stack:
        for _ in range(12):
            silent = connect(node.endpoint, KEY, 5.0)
            stack.callback(silent.close)
            silent.patience(20.0)
            silent.send(request(newer, step=4, keep=[1, 3]))
            begin = silent.expect(Ready).offset  # And not that both slots are in use.
            silent.send_bytes([memoryview(data)[begin : begin + 100_000]])
        send_rest(node, request(newer, step=4, keep=[1, 3]), data)
    assert {other.key.step for other in held(node) if other.replica} == {3, 4}


class Cutter:
    """Stands between two keepers, and cuts every connection after so many bytes."""

    def __init__(self, target: str, after: int) -> None:
        self._target = target
        self._after = after
        self.cuts = 0
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            host, port = self._target.split(":")
            far = socket.create_connection((host, int(port)))
            self._sockets += [near, far]
            threading.Thread(target=self._pass, args=(far, near, 1 << 60), daemon=True).start()
            threading.Thread(target=self._pass, args=(near, far, self._after), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, most: int) -> None:
        try:
            while most > 0 and (data := source.recv(min(1 << 18, most))):
                sink.sendall(data)
                most -= len(data)
        except OSError:
            pass
        self.cuts += most <= 0
        for sock in (source, sink):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        for sock in (self._server, *self._sockets):
            sock.close()


def test_a_state_is_kept_over_a_network_that_cuts_every_connection(cluster: Make) -> None:
    """None of which lasts for a whole image: without going on where it stopped it would never arrive."""
    job = cluster(1, 1)
    cutter = Cutter(job.nodes[1].endpoint, 7 << 20)
    job.introduce(endpoints={"b": cutter.endpoint})
    job.start_workers()
    try:
        job.step_until(lambda: all(job.kept()), rows=4_500_000 // 5)
    finally:
        cutter.close()
    assert cutter.cuts >= 2


# ---- bandwidth ------------------------------------------------------------------------------------------------------


def test_copies_are_sent_at_the_agreed_rate(cluster: Make) -> None:
    """At 4 MB/s an image of 2 MB takes half a second, and not much more."""
    job = cluster(1, 1)
    job.introduce()
    job.start_workers(rate=4_000_000)
    rows = 100_000
    last = job.step_until(lambda: all(job.kept()), rows=rows)
    seen: list[tuple[float, Key]] = []
    for step in range(last + 1, last + 80):
        job.step(Key(1, step), rows)
        key = job.kept()[0]
        if key is not None and (not seen or seen[-1][1] != key):
            seen.append((time.monotonic(), key))
        time.sleep(0.05)
    # The first is the one that was kept before.
    (begin, _), (end, _) = seen[1], seen[-1]
    rate = (len(seen) - 2) * rows * 20 / (end - begin)
    assert 0.5e6 < rate < 4.4e6
