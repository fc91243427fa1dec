"""By which way bytes go from node to node: what is tried, who hands over, which way was faster."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.plan.transport import (
    MOST_FLOWS,
    MOST_TRIED,
    Flow,
    Sample,
    first_rounds,
    rate,
    servers,
    stages,
    turns,
)


@pytest.mark.parametrize("runs", [0, 1, 7, 8, 15, 16, 32, 64, 1000, 10**6])
def test_little_of_a_flow_is_tried(runs: int) -> None:
    """As much each way, a few runs at most and three eighths of all; what opens connections counts for neither."""
    tried = stages(runs)
    assert tried.keepers == tried.group <= MOST_TRIED
    assert sum(tried) <= runs * 3 / 8
    assert tried.opening == (1 if tried.group else 0)
    assert (tried.group > 0) == (runs >= 8)


def test_all_ranks_are_done_when_the_last_one_is() -> None:
    """A rank that gets nothing is no measure; without any there is none."""
    assert rate([Sample(100, 2.0), Sample(300, 4.0), Sample(0, 0.0)]) == 100.0
    assert rate([]) == 0.0
    assert rate([Sample(0, 0.0)]) == 0.0


def test_an_image_is_handed_over_by_a_rank_next_to_it() -> None:
    """Whoever wants it."""
    near = [[0, 1], [0, 1], [2, 3], [2, 3], []]
    for rank in range(5):
        for image, server in servers([0, 1, 2, 3], near, rank).items():
            assert image in near[server]


def test_what_stands_next_to_nobody_is_handed_over_by_nobody() -> None:
    """A copy on a node without ranks, or what is made again of parities."""
    assert servers([1, 7], [[0], [1]], 0) == {1: 1}


def test_the_ranks_of_a_node_share_what_is_asked_of_it() -> None:
    """One image that all want, and all images that one wants."""
    near = [[rank - rank % 8 + i for i in range(8)] for rank in range(16)]
    by_all = Counter(servers([3], near, rank)[3] for rank in range(8, 16))
    by_one = Counter(servers(range(8), near, 9).values())
    assert by_all == by_one == dict.fromkeys(range(8), 1)


@given(st.sets(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=200))
def test_no_rank_has_too_much_on_its_way(pairs: set[tuple[int, int]]) -> None:
    """Neither to send nor to receive, and no turn is left out by a rank that has something for it."""
    flows = [Flow(server, receiver, 5) for server, receiver in pairs]
    when = turns(flows)
    assert when.keys() == set(flows)
    for side in (0, 1):
        busy = Counter((flow[side], turn) for flow, turn in when.items())
        assert all(count <= MOST_FLOWS for count in busy.values())
    most = max(Counter(flow.server for flow in flows).values(), default=0)
    most = max(most, *Counter(flow.receiver for flow in flows).values(), 0)
    assert max(when.values(), default=-1) < 2 * -(-most // MOST_FLOWS) + 1
    assert turns(reversed(flows)) == when, "all ranks agree"


def test_a_turn_takes_as_many_rounds_as_its_longest_flow() -> None:
    """The next one begins behind it; empty ones take none."""
    assert first_rounds([(0, 3), (0, 5), (2, 1), (1, 0), (3, 4)]) == [0, 5, 5, 6]
    assert first_rounds([]) == [0]


def test_flows_of_many_ranks_are_dealt_out_in_time() -> None:
    """Every rank does it for all: 16,384 with three flows each, and one that all want something of."""
    flows = [Flow((rank * 7 + i) % 16384, rank, 9) for rank in range(16384) for i in range(3)]
    assert max(turns(flows).values()) <= 1
    assert max(turns([Flow(0, rank, 9) for rank in range(1, 16385)]).values()) == 16384 // MOST_FLOWS - 1
