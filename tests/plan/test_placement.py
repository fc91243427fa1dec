"""Copies are as far away as there is anybody, evenly spread, and stay where they are when others come and go."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_train.plan.placement import distance, place
from resilient_train.spec.topology import NODE, Topology

Targets = Mapping[str, tuple[str, ...]]


def racks(nodes: int, count: int, without: int = -1) -> Topology:
    """Nodes dealt out to so many racks; 0 for no labels."""
    return Topology({f"n{i}": [f"rack=r{i % count}"] if count else [] for i in range(nodes) if i != without})


def load(targets: Targets) -> Counter[str]:
    return Counter(target for found in targets.values() for target in found)


@st.composite
def trees(draw: st.DrawFn) -> Topology:
    """Small worlds; some nodes say less of where they stand than others."""
    labels = {}
    for index in range(draw(st.integers(2, 9))):
        named = [(level, draw(st.sampled_from(["", "1", "2", "3"]))) for level in ("zone", "rack", "switch")]
        labels[f"n{index}"] = [f"{level}={name}" for level, name in named if name]
    return Topology(labels)


@settings(max_examples=300, deadline=None)
@given(tree=trees(), copies=st.integers(0, 4))
def test_every_copy_is_as_far_away_as_there_is_anybody(tree: Topology, copies: int) -> None:
    """Against a search of all nodes: from the node first, then from the copies placed before.  So a copy is never in
    its node's rack while there is another rack."""
    for node, found in place(tree, copies).items():
        assert len(found) == len(set(found)) == min(copies, len(tree.nodes) - 1)
        for index, target in enumerate(found):
            before = found[:index]
            others = [other for other in tree.nodes if other != node and other not in before]
            assert target in others
            best = min(distance(tree, node, before, other) for other in others)
            assert distance(tree, node, before, target) == best


@settings(max_examples=150, deadline=None)
@given(tree=trees())
def test_no_node_keeps_more_than_one_copy_too_many(tree: Topology) -> None:
    """Against the least that any placement as far away can do, found by matching."""
    targets = place(tree, 1)
    far = {
        node: [t for t in tree.nodes if t != node and tree.apart(node, t) == tree.apart(node, found[0])]
        for node, found in targets.items()
    }
    least = next(most for most in itertools.count(1) if _matching(far, most) == len(far))
    assert max(load(targets).values()) <= least + 1


def _matching(choices: Mapping[str, list[str]], most: int) -> int:
    """How many nodes find a place if every place takes ``most``: augmenting paths."""
    takers: dict[str, list[str]] = {}

    def seat(node: str, seen: set[str]) -> bool:
        for target in choices[node]:
            if target not in seen:
                seen.add(target)
                there = takers.setdefault(target, [])
                if len(there) < most:
                    there.append(node)
                    return True
                for index, other in enumerate(there):
                    if seat(other, seen):
                        there[index] = node
                        return True
        return False

    return sum(seat(node, set()) for node in choices)


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize(("nodes", "count"), [(2, 0), (4, 0), (64, 0), (8, 4), (64, 2), (64, 8), (60, 12)])
def test_equal_racks_keep_equally_much(nodes: int, count: int, copies: int) -> None:
    """Each node keeps as many copies as are kept of it, give or take one."""
    kept = load(place(racks(nodes, count), copies))
    assert max(kept.values()) <= min(copies, nodes - 1) + 1


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("nodes", "count"), [(64, 0), (64, 8), (60, 12), (1000, 50)])
def test_a_lost_node_moves_few_copies_and_none_two_to_one_node(nodes: int, count: int, copies: int) -> None:
    """Only copies that the lost node kept, and a few that make room, are made anew; no survivor gets two of them, and
    none keeps more than it should."""
    before = place(racks(nodes, count), copies)
    moved = []
    for lost in random.Random(7).sample(range(nodes), 12):
        after = place(racks(nodes, count, without=lost), copies)
        new = Counter(target for node in after for target in after[node] if target not in before[node])
        moved.append(sum(new.values()))
        assert max(new.values(), default=0) <= 2
        assert max(load(after).values()) <= copies + 1
    # The lost node kept `copies` of them, which cannot stay.
    assert copies * 0.5 <= sum(moved) / len(moved) <= 4 * copies


@pytest.mark.parametrize(("nodes", "count"), [(64, 0), (60, 12)])
def test_a_node_that_joins_moves_few_copies(nodes: int, count: int) -> None:
    """The same the other way round."""
    before, after = place(racks(nodes, count, without=nodes - 1), 1), place(racks(nodes, count), 1)
    assert sum(after[node] != before[node] for node in before) <= 4


def test_a_large_rack_shares_its_copies_out_evenly() -> None:
    """Nine in one rack, three in the other: three copies each, and none of the nine's in their own rack."""
    tree = Topology({f"n{i}": ["rack=r1" if i < 9 else "rack=r2"] for i in range(12)})
    targets = place(tree, 1)
    assert all(tree.apart(node, found[0]) < NODE for node, found in targets.items())
    assert {node: load(targets)[node] for node in ("n9", "n10", "n11")} == {"n9": 3, "n10": 3, "n11": 3}


@pytest.mark.parametrize("sizes", [[10_000], [5000, 5000], [9000, 1000], [33] * 303 + [1]])
def test_ten_thousand_nodes_are_placed_within_a_second(sizes: list[int]) -> None:
    """Of this thread's processor time; in one rack, two, two of different sizes, three hundred."""
    racks = [rack for rack, size in enumerate(sizes) for _ in range(size)]
    began = time.thread_time()
    targets = place(Topology({f"n{index}": [f"rack={rack}"] for index, rack in enumerate(racks)}), 1)
    assert time.thread_time() - began < 1.0
    assert len(targets) == 10_000


def test_the_order_in_which_nodes_are_named_does_not_matter() -> None:
    """Every keeper comes to the same result."""
    labels = {f"n{i}": [f"rack=r{i % 3}"] for i in range(20)}
    backwards = dict(reversed(labels.items()))
    assert place(Topology(labels), 2) == place(Topology(backwards), 2)
