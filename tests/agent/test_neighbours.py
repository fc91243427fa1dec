"""The other nodes as an agent follows them: told of changes only, woken when a silence becomes too long."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

from resilient_train.agent.neighbours import BEATS, Neighbours
from resilient_train.plan.events import NodesSeen
from resilient_train.spec.node import NodeInfo

WITHIN = 5.0


class Lines:
    """What an agent asks of its lines."""

    def __init__(self) -> None:
        self.wanted: Mapping[str, str] = {}
        self.beats = 0
        self.closed = False

    def want(self, nodes: Mapping[str, str]) -> None:
        self.wanted = nodes

    def beat(self) -> None:
        self.beats += 1

    def close(self) -> None:
        self.closed = True


class Bench:
    """An agent's neighbours, its clock and its timers."""

    def __init__(self) -> None:
        self.time, self.seen, self.lines = 50.0, cast(list[NodesSeen], []), Lines()
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.neighbours = Neighbours(info(0), WITHIN, self, self.at, self.seen.append)
        self.neighbours.begin(cast(Any, self.lines))

    def now(self) -> float:
        return self.time

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (when, next(self.numbers), action))

    def run_for(self, seconds: float, *hears: str) -> None:
        end = self.time + seconds
        while self.timers and self.timers[0][0] <= end:
            self.time, _, action = heapq.heappop(self.timers)
            action()
            for node in hears:
                self.neighbours.heard(node)
        self.time = end


def info(order: int, **changes: Any) -> NodeInfo:
    return NodeInfo(node=f"n{order}", order=order, endpoint="h:1", slots=1, link=f"h:{order}", **changes)


def test_it_beats_and_keeps_lines_to_whom_it_wants_to_hear() -> None:
    """A few signs of life within the time after which it would be a suspect itself."""
    bench = Bench()
    bench.neighbours.announced((info(0), info(1), info(2)))
    assert bench.lines.wanted == {"n1": "h:1", "n2": "h:2"}
    before = bench.lines.beats
    bench.run_for(WITHIN, "n1", "n2")
    assert bench.lines.beats - before == BEATS


def test_signs_of_life_are_no_news() -> None:
    """The agent's machine hears of the nodes once, and again when something about them has changed."""
    bench = Bench()
    bench.neighbours.announced((info(0), info(1)))
    bench.run_for(0.1, "n1")
    told = len(bench.seen)
    bench.run_for(60.0, "n1")
    assert len(bench.seen) == told
    bench.neighbours.announced((info(0), info(1, progress=(1, 7))))
    assert len(bench.seen) == told + 1
    assert [node.progress for node in bench.seen[-1].nodes] == [(1, 7)]


def test_a_silence_is_noticed_when_it_is_long_enough_and_not_a_beat_later() -> None:
    """A timer of its own looks at the very time; the next beat would be up to a fifth of it too late."""
    bench = Bench()
    bench.neighbours.announced((info(0), info(1)))
    bench.run_for(1.5, "n1")
    # Between two beats, so that they do not happen to come at the right time.
    bench.time += 0.37
    bench.neighbours.heard("n1")
    heard_at, found = bench.time, None
    while found is None:
        bench.run_for(0.01)
        found = bench.time if "n1" in bench.seen[-1].suspects else None
        assert bench.time < heard_at + 2 * WITHIN
    assert WITHIN <= found - heard_at < WITHIN + 0.05
    bench.neighbours.heard("n1")
    assert "n1" not in bench.seen[-1].suspects


def test_a_refusal_is_told_at_once() -> None:
    """Nobody listens there: lost, and no line is wanted to it any more when its announcement is gone, too."""
    bench = Bench()
    bench.neighbours.announced((info(0), info(1), info(2)))
    bench.run_for(0.1, "n1", "n2")
    bench.neighbours.refused("n1")
    assert dict(bench.seen[-1].lost) == {"n1": "its agent is gone"}
    bench.neighbours.announced((info(0), info(2)))
    bench.run_for(1.0, "n2")
    assert set(bench.lines.wanted) == {"n2"}


def test_it_hangs_up() -> None:
    """After `close` it beats no more."""
    bench = Bench()
    bench.neighbours.close()
    assert bench.lines.closed
    before = bench.lines.beats
    bench.run_for(30.0)
    assert bench.lines.beats == before
