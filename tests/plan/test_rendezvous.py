"""Which nodes form the next round of plain torchrun's rendezvous."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.plan.rendezvous import (
    STUCK,
    TURN,
    Say,
    Terms,
    View,
    announcement,
    closing,
    gathered,
    nodes_waiting,
    step,
)
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord

TERMS = Terms(minimum=1, maximum=3, last_call=5.0)


def node(order: int, waiting: bool = True, acknowledged: int = 0) -> NodeInfo:
    return announcement(f"n{order}", order, f"h{order}:1", waiting, acknowledged)


def named(*orders: int, generation: int = 1) -> WorldRecord:
    members = tuple(f"n{order}" for order in orders)
    return WorldRecord(revision=generation, generation=generation, members=members, bootstrap="h0:1", reason="test")


def view(me: int, nodes: list[NodeInfo], record: WorldRecord | None = None, left: int = 0) -> View:
    mine = next((one.workers[0].acknowledged for one in nodes if one.order == me), left)
    return View(me=f"n{me}", left=left, acknowledged=mine, record=record, nodes=nodes)


def test_the_first_round_waits_for_a_last_call() -> None:
    """With the fewest nodes so long, with the most not at all; the first in line proposes, the next a turn later."""
    two = [node(0), node(1)]
    assert step(view(0, two), TERMS, 0.0).until == TERMS.last_call
    said = step(view(0, two), TERMS, TERMS.last_call)
    assert said.record == replace(named(0, 1), reason="2 nodes met", proposer="n0")
    assert step(view(1, two), TERMS, TERMS.last_call).until == TERMS.last_call + TURN
    assert step(view(1, two), TERMS, TERMS.last_call + TURN).say is Say.PROPOSE
    three = [*two, node(2)]
    assert step(view(0, three), TERMS, 0.0).say is Say.PROPOSE


def test_too_few_wait() -> None:
    """For as long as it takes."""
    assert step(view(0, [node(0)]), Terms(minimum=2, maximum=2, last_call=0.0), 1e9).say is Say.WAIT


def test_a_round_begins_when_all_acknowledged_it() -> None:
    """First each says that it has seen it."""
    record = named(0, 1)
    assert step(view(0, [node(0), node(1)], record), TERMS, 0.0).say is Say.ACKNOWLEDGE
    assert step(view(0, [node(0, False, 1), node(1)], record), TERMS, 0.0).say is Say.WAIT
    assert step(view(0, [node(0, False, 1), node(1, False, 1)], record), TERMS, 0.0).say is Say.BEGIN


@pytest.mark.parametrize("other", [[], [node(1, True, 1)]], ids=["gone", "waits again"])
def test_a_round_that_lost_a_member_before_it_began_is_given_up(other: list[NodeInfo]) -> None:
    """And the next is formed by those who are there."""
    record = named(0, 1)
    assert step(view(0, [node(0, False, 1), *other], record), TERMS, 0.0).say is Say.GIVE_UP
    said = step(view(0, [node(0, True, 1), *other], record, left=1), TERMS, 0.0)
    assert said.record is not None
    assert (said.record.generation, len(said.record.members)) == (2, 1 + len(other))


def test_a_broken_round_is_waited_for_while_its_nodes_stop_their_workers() -> None:
    """They come within a time; then the others go on at once."""
    record = named(0, 1, 2)
    nodes = [node(0, True, 1), node(1, False, 1)]
    assert step(view(0, nodes, record, left=1), TERMS, 0.0).until == STUCK
    assert step(view(0, nodes, record, left=1), TERMS, STUCK).say is Say.PROPOSE
    back = [node(0, True, 1), node(1, True, 1)]
    assert step(view(0, back, record, left=1), TERMS, 0.0).say is Say.PROPOSE


def test_a_newcomer_leaves_a_round_that_is_well_alone() -> None:
    """However long: its nodes come if there is room."""
    record = named(0, 1)
    nodes = [node(0, False, 1), node(1, False, 1), node(2)]
    assert step(view(2, nodes, record), TERMS, 1e9).say is Say.WAIT
    assert nodes_waiting(view(0, nodes, record), TERMS, {}, 1.0) == 1
    assert nodes_waiting(view(0, nodes, record), replace(TERMS, maximum=2), {}, 1.0) == 0, "a spare waits"


def test_a_newcomer_leaves_a_round_alone_that_is_about_to_begin() -> None:
    """Its nodes wait, but not for the newcomer."""
    nodes = [node(0), node(1), node(2)]
    assert gathered(view(2, nodes, named(0, 1))) == (("n2",), ("n0", "n1"))
    assert step(view(2, nodes, named(0, 1)), TERMS, 1e9).say is Say.WAIT


def test_a_lost_node_stops_the_others_after_some_patience() -> None:
    """One that came back is none; one that waits again counts at once."""
    record = named(0, 1)
    nodes = [node(0, False, 1)]
    assert nodes_waiting(view(0, nodes, record), TERMS, {"n1": 0.5}, 1.0) == 0
    assert nodes_waiting(view(0, nodes, record), TERMS, {"n1": 1.0}, 1.0) == 1
    assert nodes_waiting(view(0, [*nodes, node(1, False, 1)], record), TERMS, {}, 1.0) == 0
    assert nodes_waiting(view(0, [*nodes, node(1, True, 1)], record), TERMS, {}, 1.0) == 1


def test_a_node_that_the_others_left_out_comes_again() -> None:
    """It was frozen, say, and a newer round does not name it."""
    record = named(1, generation=2)
    assert nodes_waiting(view(0, [node(0, False, 1), node(1, False, 2)], record), TERMS, {}, 1.0) == 1


def test_closed_is_closed() -> None:
    """Whoever waits ends; nobody stops for it."""
    nodes = [node(0), node(1, False, 1)]
    for record in (closing(None), closing(named(0, 1))):
        assert step(view(0, nodes, record), TERMS, 0.0).say is Say.CLOSED
        assert nodes_waiting(view(1, nodes, record), TERMS, {}, 1.0) == 0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=6),
    st.none() | st.sets(st.integers(0, 5), min_size=1),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_proposals_are_sound(
    states: list[tuple[bool, int]], members: set[int] | None, minimum: int, extra: int
) -> None:
    """Whatever is seen: a proposal names its proposer, nodes that wait, and as many as were asked for."""
    terms = Terms(minimum=minimum, maximum=minimum + extra, last_call=0.0)
    nodes = [node(order, waiting, acknowledged) for order, (waiting, acknowledged) in enumerate(states)]
    record = None if members is None else named(*sorted(members), generation=2)
    for me in range(len(nodes)):
        said = step(view(me, nodes, record, left=states[me][1]), terms, 1e9)
        if said.record is not None:
            assert f"n{me}" in said.record.members
            assert set(said.record.members) <= set(gathered(view(me, nodes, record))[0])
            assert minimum <= len(said.record.members) <= minimum + extra
            assert said.record.generation == (3 if record else 1)
