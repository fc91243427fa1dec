"""Parity groups: who is in one, and that any one node's images can be made again from what the others hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.errors import FormatError
from resilient_train.plan.parity import cut, groups, restorable, terms
from resilient_train.spec.parity import Parity, Part, parse_redundancy
from resilient_train.spec.topology import Topology


@given(st.integers(0, 80), st.integers(2, 9))
def test_groups_are_of_one_size_and_hold_everybody_once(count: int, most: int) -> None:
    """Two at least, the wanted number at most (but three, where nobody may be left over)."""
    made = groups(Topology({f"n{i}": [] for i in range(count)}), most)
    assert sorted(node for group in made for node in group) == sorted(f"n{i}" for i in range(count) if count > 1)
    sizes = {len(group) for group in made}
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert all(2 <= size <= max(most, 3) for size in sizes)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=2, max_size=60), st.integers(2, 6))
def test_what_stands_together_is_spread_over_the_groups(places: list[tuple[int, int]], most: int) -> None:
    """At every level: no group has more of one domain than it must, so one rack's loss is one node of each group's."""
    labels = {f"n{i}": [f"zone=z{zone}", f"rack=r{rack}"] for i, (zone, rack) in enumerate(places)}
    topology = Topology(labels)
    made = groups(topology, most)
    for level in (1, 2):
        for domain in {topology.domains(node)[level] for node in topology.nodes}:
            counts = [sum(topology.domains(node)[level] == domain for node in group) for group in made]
            assert max(counts) - min(counts) <= 1


@given(st.data())
def test_any_one_node_can_be_made_again(data: st.DataObject) -> None:
    """Every byte of it, by ranges; of nodes with any number of ranks, whose images are of any size."""
    nodes = data.draw(st.integers(2, 6))
    seed = data.draw(st.integers(0, 1 << 30))
    print(f"seed {seed}")
    rng = random.Random(seed)
    held: dict[str, dict[int, bytes]] = {}
    for node in range(nodes):
        ranks = range(10 * node, 10 * node + rng.randint(1, 3))
        held[f"n{node}"] = {rank: rng.randbytes(rng.choice([0, 1, 4096, rng.randint(1, 30_000)])) for rank in ranks}
    pieces = {
        node: dict(
            zip(
                [other for other in held if other != node],
                cut([(rank, len(image)) for rank, image in images.items()], nodes - 1),
                strict=True,
            )
        )
        for node, images in held.items()
    }
    everything = {rank: image for images in held.values() for rank, image in images.items()}
    parities, folded = {}, {}
    for holder in held:
        parity = Parity(pieces={node: pieces[node][holder] for node in held if node != holder})
        parities[holder] = Parity.from_json(parity.to_json())
        folded[holder] = _folded(parity, everything)
        largest = max(sum(map(len, images.values())) for images in held.values())
        assert len(folded[holder]) <= -(-largest // (nodes - 1)) + 4096
    lost = f"n{rng.randrange(nodes)}"
    left = {rank: image for node, images in held.items() if node != lost for rank, image in images.items()}
    there = [parity for holder, parity in parities.items() if holder != lost]
    bytes_there = [parity for holder, parity in folded.items() if holder != lost]
    can = restorable(there, left.keys())
    for rank, image in held[lost].items():
        if not image:
            continue
        assert can[rank] == len(image)
        begin = rng.randrange(len(image))
        for first, last in ((0, len(image)), (begin, rng.randint(begin, len(image)))):
            assert _made(there, bytes_there, left, rank, first, last) == image[first:last]


def test_two_lost_nodes_of_a_group_are_too_many() -> None:
    """That is said, and nothing is made of what is left."""
    size, names = 40_000, ["a", "b", "c", "d"]
    rank = {name: index for index, name in enumerate(names)}
    cuts = {name: cut([(rank[name], size)], 3) for name in names}
    parities = {
        holder: Parity(
            pieces={
                name: cuts[name][[other for other in names if other != name].index(holder)]
                for name in names
                if name != holder
            }
        )
        for holder in names
    }
    assert restorable([parities[name] for name in "bcd"], {1, 2, 3}) == {0: size}
    assert restorable([parities[name] for name in "cd"], {2, 3}) == {}
    assert restorable([parities[name] for name in "cd"], {1, 2, 3}) == {}


def _folded(parity: Parity, images: dict[int, bytes]) -> bytes:
    size = max(sum(part.size for part in parts) for parts in parity.pieces.values())
    value = 0
    for parts in parity.pieces.values():
        piece = b"".join(images[part.rank][part.begin : part.end] for part in parts)
        value ^= int.from_bytes(piece.ljust(size, b"\0"), "little")
    return value.to_bytes(size, "little")


def _made(
    parities: list[Parity], folded: list[bytes], images: dict[int, bytes], rank: int, begin: int, end: int
) -> bytes:
    made = bytearray(end - begin)
    filled = 0
    for term in terms(parities, images.keys() - {rank}, rank, begin, end):
        value = bytearray(folded[term.parity][term.begin : term.begin + term.size])
        assert len(value) == term.size
        for at, part in term.others:
            for index in range(part.size):
                value[at + index] ^= images[part.rank][part.begin + index]
        made[term.target : term.target + term.size] = value
        filled += term.size
    assert filled == end - begin
    return bytes(made)


def test_what_no_parity_covers_is_an_error() -> None:
    """Never bytes of something else."""
    half = Parity(pieces={"a": (Part(rank=0, image=10, begin=0, end=5),), "b": ()})
    assert restorable([half], []) == {}
    with pytest.raises(ValueError, match="byte 5 of rank 0"):
        terms([half], [], 0, 2, 8)


def test_a_parity_of_which_more_is_lost_is_passed_over() -> None:
    """Another one has the same bytes."""
    piece = (Part(rank=0, image=4, begin=0, end=4),)
    useless = Parity(pieces={"a": piece, "b": (Part(rank=9, image=4, begin=0, end=4),)})
    useful = Parity(pieces={"a": piece, "c": (Part(rank=1, image=4, begin=0, end=4),)})
    for parities in ([useless, useful], [useful, useless]):
        assert restorable(parities, [1]) == {0: 4}
        (term,) = terms(parities, [1], 0, 0, 4)
        assert parities[term.parity] is useful


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"a": 1}, {"a": [[1, 2, 3]]}, {"a": [[0, 5, 3, 2]]}, {"a": [[0, 5, 3, 6]]}, {"a": [[0, "5", 3, 4]]}],
)
def test_nonsense_is_refused(value: object) -> None:
    """What came from another node's memory."""
    with pytest.raises(FormatError):
        Parity.from_json(value)


def test_redundancy_is_written_as_documented() -> None:
    """``xor:N``."""
    assert parse_redundancy("xor:4") == 4
    for text in ("", "xor", "xor:", "xor:1", "xor:65", "xor:-4", "raid:4", "xor:4 "):
        with pytest.raises(ValueError, match="'xor:N', with N from 2 to 64"):
            parse_redundancy(text)
