"""The conductor's ears and voice: who is told what, and what becomes of keepers that go."""

from __future__ import annotations

from typing import Any, cast

import pytest

from resilient_train.errors import FormatError, LinkLost
from resilient_train.keeper.conduct import Conductor
from resilient_train.plan.replication import STALL
from resilient_train.spec.messages import Peers
from resilient_train.spec.peers import Orders, Report
from resilient_train.storage.wire import Wire

KEEPERS = [["a", "h:1"], ["b", "h:2"]]


class Line:
    """A connection to a keeper: what it was told."""

    def __init__(self) -> None:
        self.told: list[Orders] = []
        self.broken = self.hung_up = False

    def offer(self, orders: Orders) -> None:
        if self.broken:
            raise LinkLost("gone")
        self.told.append(orders)

    def hang_up(self) -> None:
        self.hung_up = True


class Bench:
    """A conductor on node a, and lines to a and b."""

    def __init__(self) -> None:
        self.time, self.said, self.lines = 10.0, cast(list[str], []), {"a": Line(), "b": Line()}
        self.conductor = Conductor(lambda: self.time, self.said.append)
        self.lead(1)

    def lead(self, generation: int, keepers: list[list[str]] = KEEPERS) -> None:
        self.conductor.lead(Peers(node="a", generation=generation, slots=[0], keepers=keepers, others=[]))

    def report(self, node: str, step: int, generation: int = 1, **changes: Any) -> None:
        fields = {"lineage": generation, "slowest": step, "furthest": step, "every": 1, "done": None, "missed": None}
        fields |= {"moved": 0, "kept": None, "saving": False, "published": step} | changes
        self.conductor.heard(cast(Wire, self.lines[node]), Report(node=node, generation=generation, **fields))

    def last(self, node: str = "b") -> Orders:
        return self.lines[node].told[-1]


def test_a_state_is_named_to_all_once_all_have_reported_and_kept_once_all_have_copied_it() -> None:
    """The newest that all have published; everybody is told each change once."""
    bench = Bench()
    bench.report("a", 5)
    assert bench.last("a").pending is None
    bench.report("b", 6)
    pending = bench.last().pending
    assert pending is not None
    assert pending == [1, 5]
    assert bench.last("a").pending == pending
    bench.report("a", 6, done=pending)
    assert bench.last().kept is None
    bench.report("b", 6, done=pending)
    assert bench.last().kept == pending == bench.last("a").kept
    told = len(bench.lines["b"].told)
    bench.report("b", 6, done=pending)
    assert len(bench.lines["b"].told) == told, "nothing has changed"


def test_who_connects_anew_is_told_again() -> None:
    """A keeper that was replaced knows nothing of what the one before it was told."""
    bench = Bench()
    bench.report("a", 5)
    bench.report("b", 5)
    named = bench.last().pending
    bench.conductor.hang_up(cast(Wire, bench.lines["b"]))
    bench.lines["b"] = Line()
    bench.report("b", 5)
    assert bench.last().pending == named


def test_nothing_is_named_while_a_node_is_not_connected() -> None:
    """It could not keep its images of it."""
    bench = Bench()
    bench.report("a", 5)
    bench.report("b", 5)
    named = bench.last().pending
    bench.report("a", 9, missed=named)
    bench.conductor.hang_up(cast(Wire, bench.lines["b"]))
    bench.time += STALL
    bench.report("a", 20)
    assert bench.last("a").pending is None


def test_reports_that_are_here_before_their_world_count_in_it() -> None:
    """Who has told the conductor before it was one does not say the same again; who is gone by then does not count."""
    bench = Bench()
    bench.report("b", 5, generation=2)
    bench.lead(2)
    bench.report("a", 5, generation=2)
    assert bench.last().pending == [2, 5]
    bench.report("a", 5, generation=3)
    bench.report("b", 5, generation=3)
    bench.conductor.hang_up(cast(Wire, bench.lines["b"]))
    bench.lead(3)
    assert bench.last("a").pending is None


def test_reports_of_another_world_do_not_count() -> None:
    """Nor those that come to a keeper that does not conduct."""
    bench = Bench()
    bench.report("a", 5, generation=2)
    assert bench.lines["a"].told == []
    bench.lead(2, [["b", "h:2"], ["a", "h:1"]])
    bench.report("b", 5, generation=2)
    assert bench.lines["b"].told == []


def test_a_line_that_broke_does_not_keep_the_others_from_their_orders() -> None:
    """It is hung up, and its thread hears of that."""
    bench = Bench()
    bench.report("a", 5)
    bench.lines["a"].broken = True
    bench.report("b", 5)
    assert bench.lines["a"].hung_up
    assert bench.last("b").pending is not None


def test_a_row_of_states_that_were_given_up_is_worth_a_word_and_one_is_not() -> None:
    """Said once; said again only if it began anew after a success."""
    bench = Bench()
    bench.report("a", 5)
    for number in range(1, 12):
        bench.time += STALL
        bench.report("a", 5 + number)
        bench.report("b", 5 + number)
        bench.report("b", 5 + number, missed=bench.last().pending)
        assert len(bench.said) == (1 if number >= 6 else 0), number
    assert "6 states in a row were not copied to other nodes; the last: b cannot copy" in bench.said[0]


@pytest.mark.parametrize("nonsense", [{"slowest": -1}, {"furthest": "7"}, {"moved": True}, {"done": [1]}])
def test_nonsense_is_refused_and_changes_nothing(nonsense: dict[str, Any]) -> None:
    """The sender is hung up by whoever reads; the others' state goes on."""
    bench = Bench()
    bench.report("a", 5)
    with pytest.raises(FormatError):
        bench.report("b", 5, **nonsense)
    assert bench.lines["b"].told == []
    bench.report("b", 5)
    assert bench.last().pending is not None


def test_a_step_to_make_durable_is_ahead_of_everybody() -> None:
    """The same for all nodes, whatever they have reached."""
    bench = Bench()
    bench.report("a", 50)
    bench.report("b", 47)
    bench.conductor.persist()
    assert bench.last("a").persist_at == bench.last("b").persist_at > 50
