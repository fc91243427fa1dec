"""Incidents as the agent tells them: what is measured from when, and when there is something to say."""

from __future__ import annotations

from resilient_train.agent.timeline import FRESH, Timeline, count_ranks
from resilient_train.events import ListSink
from resilient_train.spec.messages import Resumed, Stage
from resilient_train.spec.world import WorldRecord


def record(generation: int, *members: str, reason: str = "lost rank 1") -> WorldRecord:
    return WorldRecord(revision=generation, generation=generation, members=members, bootstrap="h:1", reason=reason)


def resumed(generation: int, text: str) -> Resumed:
    return Resumed(generation=generation, lineage=1, source=(1, 41), text=text)


def test_one_line_once_the_last_rank_of_this_node_has_made_a_step() -> None:
    """Counted from the first reason, to the last local rank; ranks of other nodes are theirs to tell of."""
    line = Timeline(ListSink(), "a")
    line.detected(10.0, "rank 1 was ended by signal 9", "b/0.0")
    line.detected(10.015, "rank 2 was ended by signal 9", "b/1.0")
    line.agreed(record(2, "a/0.0", "a/1.0", "c/0.0"), 10.030)
    assert line.heard("a/0.0", resumed(2, "step 41 from memory"), 10.05) is None
    # "aborted" is said of the generation that ended.
    for member, at in (("a/0.0", 10.04), ("a/1.0", 10.06)):
        assert line.heard(member, Stage(generation=1, stage="aborted", at=at), at) is None
    assert line.heard("a/0.0", Stage(generation=2, stage="first_step", at=10.2), 10.2) is None
    said = line.heard("a/1.0", Stage(generation=2, stage="first_step", at=10.15), 10.25)
    assert said == (
        "generation 2 runs on 3 ranks, resumed step 41 from memory (agreed 30 ms, aborted 60 ms, first step 200 ms)"
    )
    assert line.heard("a/1.0", Stage(generation=2, stage="first_step", at=10.3), 10.3) is None, "it was said"


def test_a_planned_change_begins_with_the_agreement() -> None:
    """No loss was noticed: the clock starts when the record has it; and a loss before the last change is forgotten."""
    line = Timeline(ListSink(), "a")
    line.detected(1.0, "rank 1 exited", "a/1.0")
    line.agreed(record(2, "a/0.0"), 1.1)
    line.agreed(record(3, "a/0.0", "a/1.1", reason="joined by 1 worker"), 9.0)
    line.heard("a/0.0", Stage(generation=3, stage="first_step", at=9.5), 9.5)
    said = line.heard("a/1.1", Stage(generation=3, stage="first_step", at=9.4), 9.5)
    assert said == "generation 3 runs on 2 ranks (agreed 0 ms, first step 500 ms)"


def test_stages_of_a_generation_that_is_over_do_not_count() -> None:
    """They are recorded; the line of the present generation waits for its own ranks."""
    sink = ListSink()
    line = Timeline(sink, "a")
    line.agreed(record(2, "a/0.0"), 1.0)
    line.agreed(record(3, "a/0.0"), 2.0)
    assert line.heard("a/0.0", Stage(generation=2, stage="first_step", at=2.1), 2.1) is None
    assert [(event.kind, event.generation) for event in sink.events][-1] == ("first_step", 2)
    assert line.heard("a/0.0", Stage(generation=3, stage="first_step", at=2.5), 2.5) is not None


def test_a_node_without_ranks_says_nothing() -> None:
    """A spare node hears of generations, and has no step to report."""
    line = Timeline(ListSink(), "spare")
    line.agreed(record(2, "a/0.0"), 1.0)
    assert line.heard("spare/0.0", Stage(generation=2, stage="first_step", at=2.0), 2.0) is None
    assert [text for _, text in line.incidents] == ["generation 2: lost rank 1; 1 rank"]


def test_a_job_that_had_nothing_to_do_says_so_at_the_end() -> None:
    """All steps were done before: restored, and no first step; not where one was made, nor where none was restored."""
    line = Timeline(ListSink(), "a")
    line.agreed(record(1, "a/0.0"), 1.0)
    assert line.unsaid() is None
    line.heard("a/0.0", resumed(1, "step 41 from disk"), 1.1)
    assert line.unsaid() == "nothing was left to do, resumed step 41 from disk"
    line.heard("a/0.0", resumed(1, FRESH), 1.1)
    assert line.unsaid() == f"nothing was left to do, {FRESH}"
    line.heard("a/0.0", Stage(generation=1, stage="first_step", at=2.0), 2.0)
    assert line.unsaid() is None


def test_incidents_are_kept_for_status_and_not_for_ever() -> None:
    """The last twenty, oldest first."""
    line = Timeline(ListSink(), "a")
    for generation in range(1, 31):
        line.agreed(record(generation, "a/0.0"), float(generation))
    assert [at for at, _ in line.incidents] == [float(n) for n in range(11, 31)]
    assert count_ranks(1) == "1 rank"
