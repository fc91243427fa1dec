"""A keeper's images, read from other nodes: by who is of the job, as they are, and elsewhere if they are not."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from nodes import SECRET, Cluster, Node, rows_of, wait_until

from resilient_train.errors import CheckpointDamaged, LinkLost
from resilient_train.image.fetch import Range as Wanted
from resilient_train.image.native import engine
from resilient_train.image.reader import ImageReader
from resilient_train.plan.placement import place
from resilient_train.spec.peers import (
    MOST_GATHERED,
    MOST_ROWS,
    Gather,
    Gathered,
    Held,
    ListHeld,
    Put,
    Range,
    Read,
    Ready,
    rows_within,
)
from resilient_train.spec.topology import Topology
from resilient_train.spec.world import Key
from resilient_train.storage.peer import HeldImage, Peer, PeerDeclined, ask_held, put_bytes
from resilient_train.storage.wire import Wire, accept, address_of, connect
from resilient_train.worker.remote import RemoteImage
from resilient_train.worker.sources import Candidate, MemorySource

pytestmark = pytest.mark.timeout(180)
KEY = bytes.fromhex(SECRET)
ROWS, COLUMNS = 700, 1000
"""Almost 3 MiB: three blocks."""


@pytest.fixture
def node() -> Iterator[Node]:
    """A node that serves."""
    made = Node("a", 2)
    yield made
    made.close()


def publish(node: Node, step: int = 3) -> None:
    for rank, worker in enumerate(node.start_workers()):
        assert worker.publish(Key(1, step), rank, 2, ROWS, COLUMNS)


def held(node: Node) -> list[HeldImage]:
    return sorted(ask_held(node.endpoint, KEY, 5.0).images, key=lambda image: image.rank)


def test_every_image_is_listed_and_read_as_it_is(node: Node) -> None:
    """In ranges, side by side."""
    publish(node)
    images = held(node)
    assert [(image.key, image.rank, image.world, image.replica) for image in images] == [
        (Key(1, 3), 0, 2, False),
        (Key(1, 3), 1, 2, False),
    ]
    peer = Peer(node.endpoint, KEY)
    for rank, image in enumerate(images):
        reader = RemoteImage(rank, [(peer, image)]).reader
        (entry,) = reader.entries()
        assert torch.equal(reader.tensor(entry), rows_of(rank, 2, 3, ROWS, COLUMNS))
    peer.close()


def test_what_is_not_there_is_declined_and_the_connection_goes_on(node: Node) -> None:
    """Another state, another slot, bytes beyond the end, too many of them."""
    publish(node)
    (image, _) = held(node)
    wire = connect(node.endpoint, KEY, 5.0)
    for slot, step, offset, size in (
        (image.slot, 4, 0, 8),
        (99, 3, 0, 8),
        (image.slot, 3, image.size - 4, 8),
        (image.slot, 3, -8, 8),
        (image.slot, 3, 0, -8),
        (image.slot, 3, 0, 1 << 40),
    ):
        wire.send(Read(slot=slot, lineage=1, step=step, offset=offset, size=size))
        assert "Declined" in repr(wire.receive())
    wire.send(Read(slot=image.slot, lineage=1, step=3, offset=0, size=8))
    assert wire.expect(Range).size == 8
    wire.close()


def columns_of(reader: ImageReader, first: int, count: int) -> torch.Tensor:
    """Some columns of an image's only tensor, fetched as rows."""
    (entry,) = reader.entries()
    whole = torch.zeros(entry.shape)
    begin, size = 4 * first, 4 * (COLUMNS * (ROWS - 1) + count)
    wanted = Wanted(reader.start(entry) + begin, size, whole.data_ptr() + begin, 4 * count, 4 * COLUMNS)
    for fetch in reader.fetching([wanted]):
        fetch()
    return whole[:, first : first + count]


def test_columns_of_a_tensor_are_read_and_little_else_is(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of every row; the bytes that arrive are these."""
    publish(node)
    image = held(node)[1]
    peer = Peer(node.endpoint, KEY)
    reader = RemoteImage(1, [(peer, image)]).reader
    arrived = []
    fill = Wire.fill

    def counted(wire: Wire, buffers: list[memoryview]) -> None:
        arrived.append(sum(map(len, buffers)))
        fill(wire, buffers)

    monkeypatch.setattr(Wire, "fill", counted)
    assert torch.equal(columns_of(reader, 200, 333), rows_of(1, 2, 3, ROWS, COLUMNS)[:, 200:533])
    assert 4 * ROWS * 333 <= sum(arrived) <= 1.01 * 4 * ROWS * 333
    peer.close()


def test_rows_that_are_not_there_are_declined_and_the_connection_goes_on(node: Node) -> None:
    """Another state, another slot, ranges and rows outside, overlapping, endless or nonsense."""
    publish(node)
    (image, _) = held(node)
    wire = connect(node.endpoint, KEY, 5.0)

    def ask(rows: object, *, slot: int = image.slot, step: int = 3, offset: int = 4096, size: int = 1 << 20) -> str:
        wire.send(Gather(slot=slot, lineage=1, step=step, offset=offset, size=size, rows=rows))  # type: ignore[arg-type]
        answer = wire.receive()
        if isinstance(answer, Gathered):
            wire.fill([memoryview(bytearray(answer.size))])
        return type(answer).__name__

    some = [[0, 8, 8, 1]]
    assert ask(some) == "Gathered"
    assert ask(some, slot=99) == ask(some, step=4) == "Declined"
    for offset, size in (
        (-8, 100),
        (0, -100),
        (0, MOST_GATHERED + 1),
        (image.size - 4, 8),
        (1 << 70, 8),
        (0, 1 << 70),
    ):
        assert ask(some, offset=offset, size=size) == "Declined"
    most = 1 << 20
    for rows in (
        "rows",
        None,
        [7],
        [["a", 1, 1, 1]],
        [[0, 1, 1]],
        [[0.0, 1, 1, 1]],
        [[True, 1, 1, 1]],
        [[-1, 1, 1, 1]],
        [[0, 0, 8, 1]],
        [[0, -1, 8, 1]],
        [[0, 1, 1, 0]],
        [[0, 1, 1, -1]],
        [[most, 1, 1, 1]],
        [[0, most + 1, most + 1, 1]],
        [[0, 8, 7, 2]],
        [[0, 8, -8, 2]],
        [[0, 8, 8, most]],
        [[0, 1, 1, 1 << 70]],
        [[0, 1, 1 << 70, 2]],
        [[1 << 70, 1, 1, 1]],
        [[0, 8, 8, 2], [15, 1, 1, 1]],
        [[100, 8, 8, 1], [0, 8, 8, 1]],
        [[i, 1, 1, 1] for i in range(MOST_ROWS + 1)],
    ):
        assert ask(rows) == "Declined", repr(rows)[:100]
    assert ask([[0, 1, 1 << 70, 1]]) == "Gathered", "the stride of a single row does not matter"
    assert ask([]) == ask([[0, most, most, 1]]) == ask(some, size=MOST_GATHERED // 16 - 5) == "Gathered"
    wire.close()


def test_strangers_and_garbage_do_a_keeper_no_harm(node: Node) -> None:
    """A wrong secret, noise, nonsense from who knows the secret, more silent connections than there are places."""
    publish(node)
    with pytest.raises(LinkLost):
        ask_held(node.endpoint, b"wrong", 5.0)
    strangers = [socket.create_connection(address_of(node.endpoint)) for _ in range(40)]
    for stranger in strangers[:5]:
        stranger.sendall(os.urandom(10_000))
    for stranger in strangers:
        stranger.close()
    for nonsense in (b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b'\x13\x00\x00\x00{"type":"ListHeld" '):
        wire = connect(node.endpoint, KEY, 5.0)
        wire._socket.sendall(nonsense)
        with pytest.raises(LinkLost):
            wire.receive()
        wire.close()
    for request in (
        Put(source="b/0", lineage=1, step=3, rank=0, world=1, size=-1, keep=None),
        Put(source="b/0", lineage=1, step=3, rank=0, world=1, size=1 << 60, keep=None),
        Put(source="b/0", lineage=1, step=3, rank=0, world=1, size=8192, keep=["x"]),  # type: ignore[list-item]
        Read(slot="one", lineage=1, step=3, offset=0, size=1),  # type: ignore[arg-type]
        Gather(slot=0, lineage=1, step=3, offset="0", size=1, rows=[]),  # type: ignore[arg-type]
        Gather(slot=0, lineage=1, step=3, offset=0.5, size=1, rows=[]),  # type: ignore[arg-type]
        Held(images=[], chosen=None),
    ):
        wire = connect(node.endpoint, KEY, 5.0)
        wire.send(request)
        try:
            assert "Declined" in repr(wire.receive())
        except LinkLost:
            pass
        wire.close()
    assert len(held(node)) == 2
    assert node.process.poll() is None


def test_silent_strangers_keep_nobody_out(node: Node) -> None:
    """More than there are places for, and they stay: the oldest makes room."""
    publish(node)
    strangers = [socket.create_connection(address_of(node.endpoint)) for _ in range(40)]
    try:
        assert len(held(node)) == 2
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_stranger_that_talks_slowly_is_soon_gone() -> None:
    """There is one time for all of the handshake, however many bytes come one by one."""
    ended = threading.Event()

    def talk() -> None:
        while not ended.wait(0.05):
            with contextlib.suppress(OSError):
                slow.send(b"r")

    talker = threading.Thread(target=talk)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as slow,
        server.accept()[0] as taken,
    ):
        talker.start()
        try:
            with pytest.raises(LinkLost, match="silent"):
                accept(taken, KEY, 0.5)
        finally:
            ended.set()
            talker.join()


def test_a_copy_is_kept_only_if_it_arrives_whole(node: Node) -> None:
    """Flipped bits, another rank's image, half an image: nothing of it is listed; the whole one is."""
    publish(node)
    image = held(node)[0]
    peer = Peer(node.endpoint, KEY)
    whole = bytes(peer.read(image, 0, image.size))
    peer.close()

    def put(data: bytes, rank: int = 0, step: int = 3) -> None:
        request = Put(source="b/0", lineage=1, step=step, rank=rank, world=2, size=image.size, keep=None)
        wire = connect(node.endpoint, KEY, 5.0)
        try:
            put_bytes(wire, request, [memoryview(data)], lambda nbytes: None)
        finally:
            wire.close()

    for at in (5000, len(whole) // 2, len(whole) - 5000):
        with pytest.raises(PeerDeclined, match="checksum"):
            put(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(PeerDeclined):
        put(whole, rank=1)
    with pytest.raises(PeerDeclined):
        put(whole, step=4)
    wire = connect(node.endpoint, KEY, 5.0)
    wire.send(Put(source="b/0", lineage=1, step=3, rank=0, world=2, size=image.size, keep=None))
    wire.expect(Ready)
    wire.send_bytes([memoryview(whole)[: len(whole) // 2]])
    wire.close()
    assert not any(other.replica for other in held(node))
    wait_until(lambda: _tried(lambda: put(whole)), "the slot is free again")
    (replica,) = [other for other in held(node) if other.replica]
    assert (replica.key, replica.rank, replica.world, replica.size) == (Key(1, 3), 0, 2, image.size)
    wait_until(lambda: sum("replica" in owner for _, owner in node.deposits.values()) in (1, 2), "the deposit")


def _tried(action: Callable[[], None]) -> bool:
    try:
        action()
    except PeerDeclined:
        return False
    return True


def test_a_node_without_memory_declines(node: Node) -> None:
    """And says why; it serves as before."""
    wire = connect(node.endpoint, KEY, 5.0)
    wire.send(Put(source="b/0", lineage=1, step=3, rank=0, world=1, size=1 << 45, keep=None))
    answer = wire.receive()
    assert "no shared memory" in repr(answer)
    wire.send(ListHeld())
    assert wire.expect(Held).images == []
    wire.close()


class Liar:
    """Serves one real keeper's image with some of its bytes changed, or hangs up in the middle of a range."""

    def __init__(
        self, truth: Peer, image: HeldImage, damage: range, *, hang_up: bool = False, late: bool = False
    ) -> None:
        self._truth = truth
        self._image = image
        self._damage = damage
        self._hang_up = hang_up
        self._late = late
        """Gathered rows are changed, and not the bytes that they are gathered from."""
        self.asked = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            wire = accept(sock, KEY, 5.0)
            wire.patience(0.0)
            while True:
                request = wire.receive()
                self.asked += 1
                if isinstance(request, Gather):
                    if self._gather(wire, request):
                        continue
                    return
                assert isinstance(request, Read)
                data = self._truth.read(self._image, request.offset, request.size)
                for at in self._damage:
                    if request.offset <= at < request.offset + request.size:
                        data[at - request.offset] ^= 0xFF
                        if self._hang_up:
                            wire.send(Range(size=request.size), [memoryview(data)[: len(data) // 2]])
                            return
                wire.send(Range(size=request.size), [memoryview(data)])
        except LinkLost:
            return
        finally:
            sock.close()

    def _gather(self, wire: Wire, request: Gather) -> bool:
        """Answer it; False to hang up."""
        data = np.frombuffer(self._truth.read(self._image, request.offset, request.size), dtype=np.uint8).copy()
        here = [at - request.offset for at in self._damage if 0 <= at - request.offset < request.size]
        if not self._late:
            data[here] ^= 0xFF
        rows = rows_within(request.rows, request.size)
        gathered = np.empty(sum(row[1] * row[3] for row in rows), dtype=np.uint8)
        gaps = engine.gather_rows(data.ctypes.data, request.size, rows, gathered.ctypes.data)
        if self._late:
            gathered[-1] ^= 0xFF
        sent = gathered.data[: len(gathered) // 2] if self._hang_up and here else gathered.data
        wire.send(Gathered(size=len(gathered), gaps=gaps), [sent])
        return len(sent) == len(gathered)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@pytest.mark.parametrize("hang_up", [False, True])
@pytest.mark.parametrize("where", ["header", "data", "table"])
def test_another_holder_is_read_when_one_lies_or_dies(
    node: Node, where: str, hang_up: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the damage is, what is read is what was written, and who lied is named; with no other holder it is an
    error."""
    publish(node)
    image = held(node)[1]
    truth = Peer(node.endpoint, KEY)
    layout = RemoteImage(1, [(truth, image)]).reader.layout
    at = {"header": 300, "data": layout.data_start + (1 << 20) + 5, "table": layout.crc_start + 5}[where]
    liar = Liar(truth, image, range(at, at + 1), hang_up=hang_up)
    lying = Peer(liar.endpoint, KEY)
    reader = RemoteImage(1, [(lying, image), (truth, image)]).reader
    (entry,) = reader.entries()
    assert torch.equal(reader.tensor(entry), rows_of(1, 2, 3, ROWS, COLUMNS))
    assert liar.asked > 0
    assert liar.endpoint in caplog.text
    assert "reading rank 1's image elsewhere" in caplog.text
    with pytest.raises(CheckpointDamaged):
        RemoteImage(1, [(lying, image)]).reader.tensor(entry)
    for peer in (lying, truth):
        peer.close()
    liar.close()


@pytest.mark.parametrize("how", ["row", "gap", "late", "hang up"])
def test_rows_are_read_from_another_holder_when_one_lies_or_dies(
    node: Node, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its memory is damaged in a row or between rows, it sends other bytes than it read, it dies meanwhile: it is named
    and left; with no other holder it is an error."""
    publish(node)
    image = held(node)[1]
    truth = Peer(node.endpoint, KEY)
    layout = RemoteImage(1, [(truth, image)]).reader.layout
    column = {"gap": 600}.get(how, 250)
    at = layout.data_start + 4 * (COLUMNS * 400 + column) + 1
    liar = Liar(truth, image, range(at, at + 1), hang_up=how == "hang up", late=how == "late")
    lying = Peer(liar.endpoint, KEY)
    reader = RemoteImage(1, [(lying, image), (truth, image)]).reader
    assert torch.equal(columns_of(reader, 200, 333), rows_of(1, 2, 3, ROWS, COLUMNS)[:, 200:533])
    assert liar.endpoint in caplog.text
    assert "reading rank 1's image elsewhere" in caplog.text
    with pytest.raises(CheckpointDamaged, match="memory of rank 1"):
        columns_of(RemoteImage(1, [(lying, image)]).reader, 200, 333)
    for peer in (lying, truth):
        peer.close()
    liar.close()


@pytest.mark.parametrize("gaps", [[], [0], [0] * 4, [1 << 32] * 3, [-1] * 3, ["0"] * 3, "abc", None])
def test_an_answer_without_its_numbers_is_nonsense(node: Node, gaps: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are blocks, each of 32 bits, or the peer is left."""
    publish(node)
    image = held(node)[1]
    truth = Peer(node.endpoint, KEY)
    liar = Liar(truth, image, range(0))
    monkeypatch.setattr(
        liar, "_gather", lambda wire, _: wire.send(Gathered(size=10, gaps=gaps), [memoryview(bytes(10))])
    )
    lying = Peer(liar.endpoint, KEY)
    with pytest.raises(LinkLost, match="talks nonsense"):
        lying.gather(image, 4096, (2 << 20) + 1, [(0, 10, 10, 1)], memoryview(bytearray(10)))
    for peer in (lying, truth):
        peer.close()
    liar.close()


def test_a_keeper_that_dies_while_it_is_read_is_replaced_by_the_next_holder(
    cluster: Callable[..., Cluster],
) -> None:
    """The reader notices nothing; when no holder is left the state counts as damaged."""
    job = cluster(1, 1, 1)
    job.introduce()
    job.start_workers()
    kept = job.settle(rows=40_000)
    keeps = place(Topology({node.name: [] for node in job.nodes}), 1)
    first = job.nodes[0]
    second = next(node for node in job.nodes if node.name in keeps["a"])
    third = next(node for node in job.nodes if node not in (first, second))
    source = MemorySource(third.workers[0].link)
    with source.open(Candidate(key=kept)) as images:
        readers = images.all()
        # Rank 0's original is with the first node, its copy with the second.
        first.kill()
        for rank, reader in enumerate(readers):
            (entry,) = reader.entries()
            assert torch.equal(reader.tensor(entry), rows_of(rank, 3, kept.step, 40_000))
        second.kill()
        (entry,) = readers[0].entries()
        with pytest.raises(CheckpointDamaged, match="rank 0"):
            readers[0].tensor(entry)
