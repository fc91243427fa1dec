"""Which losses use up a job's budgets, and which of them are one event."""

from __future__ import annotations

from dataclasses import replace

from resilient_train.plan import events as ev
from resilient_train.plan.suspicion import AGENT_GONE
from resilient_train.plan.view import Timing
from resilient_train.spec.node import ExitInfo
from resilient_train.spec.world import Phase

from .membership_bench import LIMITS, Bench, node, training, worker

MANY = replace(LIMITS, max_nodes=20)


def lose(bench: Bench, order: int, why: str = AGENT_GONE, fading: tuple[str, ...] = ()) -> None:
    """A node is gone; the others stay as they are."""
    nodes = [info for info in bench.state.view.nodes.values() if info.node not in (f"n{order}", "n0")]
    bench.feed(ev.NodesSeen(nodes=tuple(nodes), lost={f"n{order}": why}, fading=frozenset(fading)))


def test_nodes_lost_one_after_the_other_use_up_no_budget() -> None:
    """However many, and though no generation between them ever resumed: the script has no part in it."""
    bench = training(0, *range(1, 12), limits=MANY)
    for order in range(1, 12):
        lose(bench, order)
        bench.run_for(0.1)
        assert (bench.record.phase, bench.record.generation) == (Phase.RUNNING, 1 + order)
    assert bench.record.stalls == 0


def killed(bench: Bench, order: int, formed: int, code: int = -9) -> None:
    """A worker of another node ends; the others have formed a generation so far."""
    gone = ExitInfo(member=f"n{order}/0.0", code=code, elastic=True, acknowledged=1, done=0)
    others = [o for o in range(1, 12) if f"n{o}" in bench.state.view.nodes]
    infos = []
    for other in others:
        before = bench.state.view.nodes[f"n{other}"]
        dead = (*before.exits, *((gone,) if other == order else ()))
        alive = () if dead else (worker(f"n{other}/0.0", formed),)
        infos.append(node(other, *alive, exits=dead))
    bench.feed(ev.NodesSeen(nodes=tuple(infos)))
    bench.run_for(0.1)


def test_kills_count_once_their_generation_had_formed() -> None:
    """Several killed one after the other while the rest still forms are one event; what crashes by itself counts."""
    bench = training(0, *range(1, 12), limits=MANY)
    for order, stalls in ((1, 1), (2, 1), (3, 1)):
        killed(bench, order, formed=1)
        assert bench.record.stalls == stalls
    killed(bench, 4, formed=bench.record.generation)
    assert bench.record.stalls == 2
    killed(bench, 5, formed=1, code=-6)
    assert bench.record.phase is Phase.FAILED


def test_nodes_that_fall_silent_together_are_one_change() -> None:
    """A rack without power: while more of it is about to be lost, the first loss waits, for a bounded time."""
    bench = training(0, 1, 2, 3)
    lose(bench, 1, "nothing was heard from it for 5 s", fading=("n2",))
    bench.run_for(1.0)
    assert bench.record.generation == 1
    lose(bench, 2, "nothing was heard from it for 5 s", fading=())
    bench.run_for(0.001)
    assert bench.record.members == ("n0/0.0", "n3/0.0")


def test_a_node_that_stays_on_the_brink_is_not_waited_for_for_long() -> None:
    """It may have lost one line only."""
    bench = training(0, 1, 2, 3)
    lose(bench, 1, "nothing was heard from it for 5 s", fading=("n2",))
    bench.run_for(Timing().fellows + 0.1)
    assert bench.record.members == ("n0/0.0", "n2/0.0", "n3/0.0")


def test_a_refused_node_waits_for_no_other() -> None:
    """What is known at once is agreed at once, whoever else has not been heard for a moment."""
    bench = training(0, 1, 2, 3)
    lose(bench, 1, fading=("n2",))
    bench.run_for(0.021)
    assert bench.record.members == ("n0/0.0", "n2/0.0", "n3/0.0")
