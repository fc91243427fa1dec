"""Where nodes stand: labels, and at which level two nodes are apart."""

from __future__ import annotations

import pytest

from resilient_train.errors import FormatError
from resilient_train.spec.topology import NODE, Topology, parse_labels


def test_labels_are_put_in_order_widest_first() -> None:
    """However they were given, and once each."""
    assert parse_labels(["switch=s3", "zone=z", "rack=r=1", "switch=s3"]) == ("zone=z", "rack=r=1", "switch=s3")
    assert parse_labels([]) == ()


@pytest.mark.parametrize("wrong", ["rack", "rack=", "=r1", "shelf=7", "Rack=r1"])
def test_what_is_no_label_is_refused_by_name(wrong: str) -> None:
    """A misspelt one would otherwise put copies into the same rack in silence."""
    with pytest.raises(FormatError, match="zone=NAME, rack=NAME, switch=NAME"):
        parse_labels([wrong])


def test_a_node_stands_in_one_rack() -> None:
    """Two are a mistake."""
    with pytest.raises(FormatError, match="one rack"):
        parse_labels(["rack=r1", "rack=r2"])


def test_nodes_are_apart_at_the_widest_level_that_differs() -> None:
    """A switch of the same name in another rack is another; who has no label is together with its like."""
    tree = Topology(
        {"a": ["rack=r1", "switch=s1"], "b": ["rack=r1", "switch=s2"], "c": ["rack=r2", "switch=s1"], "d": [], "e": []}
    )
    zone, rack, switch = range(NODE)
    assert tree.apart("a", "b") == switch
    assert tree.apart("a", "c") == rack
    assert tree.apart("a", "d") == rack
    assert tree.apart("d", "e") == NODE
    assert tree.apart("a", "a") == NODE + 1
    assert zone not in {tree.apart(one, other) for one in "abcde" for other in "abcde"}


def test_domains_are_counted() -> None:
    """At every level, within any wider domain."""
    labels = {f"n{i}": [f"rack=r{i % 2}", f"switch=s{i // 2}"] for i in range(6)}
    tree = Topology(labels)
    job, zone, rack, switch, node = tree.domains("n0")
    assert [tree.count(job, level) for level in range(NODE + 1)] == [1, 2, 6, 6]
    assert [tree.count(rack, level) for level in range(1, NODE + 1)] == [1, 3, 3]
    assert tree.count(switch, NODE) == tree.count(node, NODE) == 1
    assert tree.count(zone, 0) == 1
