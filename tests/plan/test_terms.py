"""A node that was started unlike the others takes no part: it would decide for all by its own numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilient_train.errors import ExitCode
from resilient_train.plan import events as ev
from resilient_train.plan.terms import conflict
from resilient_train.spec.node import NodeInfo, Terms

from .membership_bench import Bench, node, training, worker

TERMS = Terms(min_nodes=1, max_nodes=4, within=5.0)


@pytest.mark.parametrize(
    "other", [Terms(min_nodes=2, max_nodes=4, within=5.0), Terms(min_nodes=1, max_nodes=4, within=2.0)]
)
def test_who_comes_later_is_told_of_both(other: Terms) -> None:
    """The flags of both are named; who was there first goes on, and so does everybody who says nothing."""
    first, second = node(0, terms=other), node(1, terms=TERMS)
    assert f"{TERMS}, node n0 of this job with {other}" in conflict(second, [first])
    assert conflict(first, [second]) == ""
    assert conflict(node(1, terms=other), [first]) == ""
    assert conflict(second, [node(0)]) == ""
    assert conflict(node(1), [first]) == ""


def test_a_node_that_is_unlike_the_others_ends_by_itself() -> None:
    """With 2, and before it proposes anything."""
    bench = Bench(3)
    view = replace(bench.state.view, nodes={"n3": node(3, terms=TERMS)})
    bench.state = replace(bench.state, view=view)
    bench.sees(node(0, worker("n0/0.0"), terms=Terms(min_nodes=1, max_nodes=2, within=5.0)))
    (end,) = bench.taken(ev.End)
    assert end.code is ExitCode.USAGE
    assert "--nnodes=1:4 --detect-within=5" in end.text
    assert "--nnodes=1:2" in end.text
    bench.run_for(100.0)
    assert not bench.taken(ev.Swap)


def test_the_others_do_not_mind() -> None:
    """Of a job that trains nobody ends because of somebody who comes."""
    bench = training(0, 1)
    other = Terms(min_nodes=1, max_nodes=1, within=1.0)
    bench.sees(node(1, worker("n1/0.0"), terms=TERMS), node(7, terms=other))
    assert not bench.taken(ev.End)


def test_terms_are_announced() -> None:
    """They survive JSON, and what an older version announces has none."""
    info = node(1, terms=TERMS)
    assert NodeInfo.from_json(info.to_json()) == info
    older = info.to_json()
    del older["terms"]
    assert NodeInfo.from_json(older).terms is None
