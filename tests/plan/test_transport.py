"""By which way bytes go from node to node: what is tried, who hands over, which way was faster."""

from __future__ import annotations

from collections import Counter

import pytest

from resilient_train.plan.transport import LEAST, MOST_TRIED, Sample, rate, servers, stages, worth_trying


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


def test_it_is_tried_only_where_somebody_gets_much() -> None:
    """However little the others get."""
    assert worth_trying({0: 0, 1: LEAST})
    assert not worth_trying({0: LEAST - 1, 1: LEAST - 1})
    assert not worth_trying({})


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
