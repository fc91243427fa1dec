"""Which keepers a keeper is told of."""

from __future__ import annotations

from dataclasses import replace

from resilient_train.plan.ring import peers_of
from resilient_train.plan.view import Limits, View
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord


def node(name: str, keeper: str) -> NodeInfo:
    return NodeInfo(node=name, order=int(name[1:]), endpoint="h:1", slots=2, keeper=keeper)


def view(me: str, members: tuple[str, ...], *nodes: NodeInfo) -> View:
    record = WorldRecord(revision=1, generation=4, members=members, bootstrap="h:1", reason="test")
    return View(me=me, limits=Limits(), nodes={info.node: info for info in nodes}, record=record)


MEMBERS = ("n0/0.0", "n0/1.0", "n2/0.0", "n2/1.3")


def test_a_keeper_is_told_where_the_others_stand() -> None:
    """Those that say so, of the world's nodes."""
    nodes = (replace(node("n0", "h:10"), labels=("rack=r1",)), replace(node("n1", "h:1"), labels=("rack=r9",)))
    peers = peers_of(view("n2", MEMBERS, *nodes, node("n2", "h:12")))
    assert peers is not None
    assert peers.labels == {"n0": ["rack=r1"]}


def test_the_worlds_nodes_follow_the_ranks_and_others_are_told_apart() -> None:
    """Nodes without a member may hold images, and are sent none."""
    nodes = (node("n0", "h:10"), node("n1", "h:11"), node("n2", "h:12"))
    peers = peers_of(view("n2", MEMBERS, *nodes))
    assert peers is not None
    assert (peers.node, peers.generation, peers.slots) == ("n2", 4, [0, 1])
    assert peers.keepers == [["n0", "h:10"], ["n2", "h:12"]]
    assert peers.others == [["n1", "h:11"]]
    spare = peers_of(view("n1", MEMBERS, *nodes))
    assert spare is not None
    assert spare.slots == []
    assert spare.keepers == peers.keepers


def test_there_is_no_ring_while_a_members_node_is_missing() -> None:
    """Without its images nothing that is copied is a whole state; the others may be asked all the same."""
    for nodes in ((node("n0", "h:10"),), (node("n0", "h:10"), node("n2", ""))):
        peers = peers_of(view("n0", MEMBERS, *nodes))
        assert peers is not None
        assert peers.keepers == []
        assert peers.others == [["n0", "h:10"]]


def test_without_a_world_there_is_nothing_to_tell() -> None:
    """Before the first record."""
    assert peers_of(View(me="n0", limits=Limits())) is None
