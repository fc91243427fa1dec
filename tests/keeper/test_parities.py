"""Parity groups on several nodes: one lost node of each group is made again, for a fraction of the memory of copies."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nodes import SECRET, Cluster, Node, rows_of, wait_until

from resilient_train.errors import CheckpointDamaged, LinkLost
from resilient_train.image.native import checksum
from resilient_train.spec.messages import Policy
from resilient_train.spec.peers import Fold, Ready
from resilient_train.spec.shard import BLOCK
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.storage.peer import HeldBy, Peer, PeerDeclined, ask_held, put_bytes
from resilient_train.storage.wire import connect
from resilient_train.worker.images import open_image
from resilient_train.worker.sources import Candidate, MemorySource

pytestmark = pytest.mark.timeout(180)
KEY = bytes.fromhex(SECRET)
Make = Callable[..., Cluster]


def held(node: Node) -> HeldBy:
    return ask_held(node.endpoint, KEY, 5.0)


def restored(node: Node, world: int, rows: int = 4, columns: int = 5) -> Key:
    """Read the newest state from a node's point of view and compare every rank's part; which it was."""
    source = MemorySource(node.workers[0].link)
    newest = source.candidates({})[0]
    assert newest.without == ()
    with source.open(newest) as images:
        for rank, reader in enumerate(images.all()):
            assert torch.equal(reader.tensor(reader.entries()[0]), rows_of(rank, world, newest.key.step, rows, columns))
    return newest.key


@pytest.mark.parametrize("lost", range(3))
def test_any_node_of_a_group_can_be_lost(cluster: Make, lost: int) -> None:
    """With nodes of one and of two ranks; what is called kept is whole for every survivor, bit for bit."""
    job = cluster(1, 2, 1)
    job.introduce()
    job.start_workers(group=3)
    last = job.step_until(lambda: all(job.kept()), rows=30_000)
    job.step_until(lambda: min(key.step for key in job.kept() if key) > last, first=last + 1, rows=30_000)
    kept = min(key for key in job.kept() if key)
    assert not any(image.replica for node in job.nodes for image in held(node).images)
    image = max(image.size for node in job.nodes for image in held(node).images)
    for node in job.nodes:
        (parity, *others) = [one for one in held(node).parities if one.key == kept] or held(node).parities
        assert len(others) <= 1
        sizes = [sum(part.size for part in parts) for parts in parity.parity.pieces.values()]
        assert max(sizes) <= 2 * image // 2 + 4096, "two others share what a node with two ranks has"
    job.lose(job.nodes[lost])
    for node in job.nodes:
        assert restored(node, 4, 30_000) >= kept


def test_one_node_of_each_group_can_be_lost(cluster: Make) -> None:
    """Five nodes in groups of at most three stand in racks: both lost ones are of one rack, and nothing is lost."""
    job = cluster(1, 1, 1, 1, 1)
    job.introduce(labels={name: [f"rack=r{index // 2}"] for index, name in enumerate("abcde")})
    job.start_workers(group=3)
    job.step_until(lambda: all(job.kept()))
    kept = min(key for key in job.kept() if key)
    job.lose(*job.nodes[:2])
    for node in job.nodes:
        assert restored(node, 5) >= kept


def test_the_only_node_that_is_left_has_both_parts(cluster: Make, tmp_path: Path) -> None:
    """Of a group of two; with nobody else to ask, it restores the state and makes it durable."""
    job = cluster(1, 1)
    job.introduce()
    (worker, _) = job.start_workers(group=4)
    worker.link.set_policy(Policy(url=str(tmp_path), every_steps=10**6, every_seconds=0.0, keep_last=3))
    job.step_until(lambda: all(job.kept()), rows=20_000)
    kept = min(key for key in job.kept() if key)
    job.nodes.pop().kill()
    job.generation = 2
    job.introduce()
    (node,) = job.nodes
    assert restored(node, 2, 20_000) >= kept
    worker.close()
    node.workers = []
    node.flush()
    wait_until(lambda: node.flushed is not None, "Flushed")
    assert node.flushed is not None
    assert node.flushed.text == "", job.report()
    tier = FilesystemTier(str(tmp_path))
    (key,), _ = listing(tier)
    manifest = read_manifest(tier, key)
    for rank, file in enumerate(manifest.files):
        reader = open_image(tier, manifest, file)
        assert torch.equal(reader.tensor(reader.entries()[0]), rows_of(rank, 2, key.step, 20_000))
    assert len(manifest.files) == 2


def begin_a_piece(node: Node, step: int, others: list[str]) -> None:
    """Have a node begin a parity with a piece of b's that never comes to its end."""

    def begun() -> bool:
        wire = connect(node.endpoint, KEY, 5.0)
        try:
            wire.send(piece("b", ONE, step=step, others=others))
            wire.expect(Ready)
        except LinkLost:
            return False  # The real one has come in between: one source, one transfer.
        finally:
            wire.close()
        return True

    wait_until(begun, "a piece that is taken")


def test_who_is_left_alone_lets_go_of_parities(cluster: Make) -> None:
    """With its next complete state, and of what the lost one had begun; they take as much memory as its images."""
    job = cluster(1, 1)
    job.introduce()
    job.start_workers(group=4)
    last = job.step_until(lambda: all(job.kept()), rows=20_000)
    begin_a_piece(job.nodes[0], last + 1000, ["b"])
    job.lose(job.nodes[1])
    job.generation = 2
    job.introduce()
    (node,) = job.nodes
    node.workers[0].generation = 2
    node.workers[0].past = {1: last, 2: None}
    assert any("parity" in owner for _, owner in node.deposits.values())

    def gone() -> bool:
        return not any("parity" in owner for _, owner in node.deposits.values())

    job.step_until(gone, lineage=2, first=last + 1, rows=20_000)


def test_what_was_begun_for_a_former_group_is_let_go(cluster: Make) -> None:
    """A node dies in the middle of its piece; a successor's keeper too knows parities from workers' images."""
    job = cluster(1, 1, 1, 1)
    job.introduce()
    job.start_workers(group=4)
    last = job.step_until(lambda: all(job.kept()), rows=20_000)

    begin_a_piece(job.nodes[0], last + 1000, ["b", "c", "d"])
    job.nodes[1].replace_keeper()
    job.lose(job.nodes[3])
    job.generation = 2
    job.introduce()
    for node in job.nodes:
        node.workers[0].generation = 2
        node.workers[0].past = {1: last, 2: None}
        node.workers[0].link.board.report_published(0, None)

    def only_of_this_group() -> bool:
        owners = [{owner for _, owner in node.deposits.values() if "parity" in owner} for node in job.nodes]
        return [len(found) for found in owners] == [1, 1, 1] and not any("d" in next(iter(o))[9:] for o in owners)

    job.step_until(only_of_this_group, lineage=2, first=last + 1, rows=20_000)


def test_two_lost_nodes_of_one_group_are_not_made_up(cluster: Make) -> None:
    """No state is offered, rather than one with somebody's bytes missing."""
    job = cluster(1, 1, 1)
    job.introduce()
    job.start_workers(group=3)
    job.step_until(lambda: all(job.kept()))
    job.lose(job.nodes[0], job.nodes[2])
    source = MemorySource(job.nodes[0].workers[0].link)
    assert source.candidates({}) == []


def test_what_is_made_of_damaged_bytes_is_refused(cluster: Make) -> None:
    """A bit that flips in a survivor's image, long after it was folded: found by the lost image's own checksums."""
    job = cluster(1, 1, 1)
    job.introduce()
    job.start_workers(group=3)
    job.step_until(lambda: all(job.kept()), rows=60_000)
    job.lose(job.nodes[0])
    source = MemorySource(job.nodes[1].workers[0].link)
    newest = source.candidates({})[0].key
    (slot,) = [slot for slot in job.nodes[0].workers[0].slots.all() if slot.key == newest]
    for at in range(8192, slot.memory.size - 8192, 50_000):
        slot.memory.map[at] ^= 1
    with source.open(Candidate(key=newest)) as images:
        reader = images.reader(0)
        with pytest.raises(CheckpointDamaged):
            reader.tensor(reader.entries()[0])


def test_another_world_goes_on_with_groups_of_its_own(cluster: Make) -> None:
    """After a loss the survivors form new groups; the old state stays until a new one is kept, then its parities go."""
    job = cluster(1, 1, 1, 1)
    job.introduce()
    job.start_workers(group=2)
    job.step_until(lambda: all(job.kept()))
    job.lose(job.nodes[3])
    first = restored(job.nodes[0], 4)
    job.generation = 2
    job.introduce()
    for node in job.nodes:
        node.workers[0].generation = 2
        node.workers[0].past = {1: first.step, 2: None}
        node.workers[0].link.board.report_published(0, None)

    def gone() -> bool:
        kept = [key for key in job.kept() if key and key.lineage == 2]
        return len(kept) == 3 and all(one.key.lineage == 2 for node in job.nodes for one in held(node).parities)

    job.step_until(gone, lineage=2, first=first.step + 1)
    job.lose(job.nodes[1])
    assert restored(job.nodes[0], 3).lineage == 2


def test_a_keeper_that_dies_over_a_parity_delays_and_does_no_harm(cluster: Make) -> None:
    """Its successor serves the parities that were complete, and makes new ones."""
    job = cluster(1, 1, 1)
    job.introduce()
    job.start_workers(group=3)
    last = job.step_until(lambda: all(job.kept()), rows=20_000)
    complete = {one.key for one in held(job.nodes[1]).parities}
    job.nodes[1].replace_keeper()
    job.introduce()
    assert {one.key for one in held(job.nodes[1]).parities} & complete
    job.step_until(lambda: min(key.step for key in job.kept() if key) > last, first=last + 1, rows=20_000)
    kept = min(key for key in job.kept() if key)
    job.lose(job.nodes[0])
    assert restored(job.nodes[1], 3, 20_000) >= kept


# ---- pieces that arrive ---------------------------------------------------------------------------------------------


@pytest.fixture
def node(cluster: Make) -> Node:
    """One whose keeper makes parities of a and b."""
    return cluster(1).nodes[0]


def piece(of: str, data: bytes, step: int = 1, **changes: object) -> Fold:
    fields: dict[str, object] = {
        "node": of,
        "lineage": 1,
        "step": step,
        "world": 3,
        "others": ["a", "b"],
        "parts": [[0 if of == "a" else 1, len(data), 0, len(data)]],
        "sums": [checksum(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)],
        "keep": None,
    }
    return Fold(**{**fields, **changes})


def fold(node: Node, request: Fold, data: bytes, upto: int | None = None) -> int:
    """Send a piece, or a part of it and hang up; how many bytes the other end had already."""
    wire = connect(node.endpoint, KEY, 5.0)
    wire.patience(20.0)
    try:
        if upto is None:
            sent: list[int] = []
            put_bytes(wire, request, [memoryview(data)], sent.append)
            return len(data) - sum(sent)
        wire.send(request)
        begin = wire.expect(Ready).offset
        wire.send_bytes([memoryview(data)[begin:upto]])
        wire._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkLost):  # The other end has taken everything in.
            wire.receive()
        return begin
    finally:
        wire.close()


def folded(node: Node) -> bytes:
    """The only parity that is complete."""
    (one,) = held(node).parities
    peer = Peer(node.endpoint, KEY)
    try:
        size = max(sum(part.size for part in parts) for parts in one.parity.pieces.values())
        return bytes(peer.read(one.as_image(), one.begin, size))
    finally:
        peer.close()


def xor(one: bytes, other: bytes) -> bytes:
    size = max(len(one), len(other))
    pair = (int.from_bytes(data.ljust(size, b"\0"), "little") for data in (one, other))
    return (next(pair) ^ next(pair)).to_bytes(size, "little")


ONE, OTHER = (random.Random(seed).randbytes(size) for seed, size in ((1, 3 * BLOCK + 777), (2, 5 * BLOCK - 3)))


def test_a_piece_that_broke_goes_on_where_it_stopped(node: Node) -> None:
    """Nothing is folded twice, which would take it out again; a longer piece finds room; sent again, it is there."""
    assert fold(node, piece("a", ONE), ONE, upto=2 * BLOCK + 5) == 0
    assert fold(node, piece("b", OTHER), OTHER) == 0
    assert held(node).parities == [], "one piece is not whole"
    assert fold(node, piece("a", ONE), ONE) == 2 * BLOCK
    assert folded(node) == xor(ONE, OTHER)
    assert fold(node, piece("a", ONE), ONE) == len(ONE)
    assert folded(node) == xor(ONE, OTHER)


def test_a_damaged_piece_is_not_folded(node: Node) -> None:
    """Its connection ends; what came before it is in, and the next goes on from there."""
    damaged = ONE[:BLOCK] + bytes([ONE[BLOCK] ^ 1]) + ONE[BLOCK + 1 :]
    with pytest.raises(LinkLost):
        fold(node, piece("a", ONE), damaged)
    assert fold(node, piece("a", ONE), ONE) == BLOCK
    fold(node, piece("b", OTHER), OTHER)
    assert folded(node) == xor(ONE, OTHER)


def test_a_newer_state_takes_the_place_of_one_that_is_not_complete(node: Node) -> None:
    """And what is left of the older one finds no room; the parity that counts stays."""
    for data, of in ((ONE, "a"), (OTHER, "b")):
        fold(node, piece(of, data), data)
    fold(node, piece("a", ONE, step=2, keep=[1, 1]), ONE)
    fold(node, piece("a", OTHER, step=3, keep=[1, 1]), OTHER)
    with pytest.raises(PeerDeclined, match="no room"):
        fold(node, piece("b", OTHER, step=2, keep=[1, 1]), OTHER)
    assert [one.key for one in held(node).parities] == [Key(1, 1)]
    fold(node, piece("b", ONE, step=3, keep=[1, 1]), ONE)
    assert sorted(one.key for one in held(node).parities) == [Key(1, 1), Key(1, 3)]


@pytest.mark.parametrize(
    "changes",
    [
        {"others": ["b", "c"]},
        {"others": "ab"},
        {"parts": [[0, 5, 3, 9]]},
        {"parts": None},
        {"sums": []},
        {"world": 0},
        {"step": -1},
    ],
)
def test_nonsense_ends_its_connection_and_nothing_else(node: Node, changes: dict[str, object]) -> None:
    """The next piece is folded as ever."""
    wire = connect(node.endpoint, KEY, 5.0)
    wire.patience(20.0)
    wire.send(piece("a", ONE, **changes))
    with pytest.raises(LinkLost):
        wire.receive()
    wire.close()
    for data, of in ((ONE, "a"), (OTHER, "b")):
        fold(node, piece(of, data), data)
    assert folded(node) == xor(ONE, OTHER)
