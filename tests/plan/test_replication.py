"""The conductor names states that everybody can copy, and never takes for kept what is not copied everywhere."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_train.plan.replication import (
    CALM,
    LEAD,
    MOST_LEAD,
    STALL,
    Progress,
    State,
    heard,
    lost,
    persist,
)
from resilient_train.spec.world import Key

TWO = State(generation=1, nodes=("a", "b"))


def at(step: int, **more: object) -> Progress:
    return replace(Progress(lineage=1, slowest=step, furthest=step, published=step, every=1), **more)  # type: ignore[arg-type]


def both(state: State, progress: Progress, now: float = 0.0) -> State:
    return heard(heard(state, "a", progress, now), "b", progress, now)


def test_the_newest_state_that_all_have_published_is_named_once_all_have_reported() -> None:
    """Not before."""
    state = heard(TWO, "a", at(6), 0.0)
    assert state.pending is None
    assert heard(state, "b", at(5), 0.0).pending == Key(1, 5)


def test_when_the_newest_is_kept_the_next_snapshot_is_named() -> None:
    """Before anybody has it; nothing is copied that nobody would have taken anyway."""
    state = both(TWO, at(7, every=10, published=0))
    assert state.pending == Key(1, 10)
    state = both(state, at(17, every=10, published=10, done=Key(1, 10)))
    assert (state.kept, state.pending) == (Key(1, 10), Key(1, 20))


def test_who_hears_of_a_state_too_late_is_told_of_one_ahead_of_it_for_a_while() -> None:
    """Until enough of them were kept."""
    state = both(TWO, at(5))
    state = heard(state, "a", at(9, missed=Key(1, 5)), 0.0)
    assert state.lead == LEAD
    step = 9
    for count in range(CALM):
        assert state.lead == LEAD, count
        state = both(state, at(step), state.pause_until)
        assert state.pending == Key(1, step + LEAD)
        step += LEAD
        state = both(state, at(step, published=step, done=state.pending))
        step += 1
        if state.pending is not None and state.lead:
            state = replace(state, pending=None)
    assert state.lead == 0


def test_nothing_is_named_for_one_node_or_while_lineages_differ() -> None:
    """There is nobody to copy to, or no state that all of them compute."""
    assert heard(State(generation=1, nodes=("a",)), "a", at(3), 0.0).pending is None
    assert heard(heard(TWO, "a", at(3), 0.0), "b", at(3, lineage=2), 0.0).pending is None
    assert heard(heard(TWO, "a", at(3), 0.0), "b", at(3, lineage=0), 0.0).pending is None


def test_a_state_is_kept_when_everybody_has_copied_it() -> None:
    """Then the next one is named; one node's word is not enough."""
    state = both(TWO, at(5))
    named = state.pending
    state = heard(state, "a", at(9, done=named), 1.0)
    assert (state.pending, state.kept) == (named, None)
    state = heard(state, "b", at(8, done=named), 1.1)
    assert state.kept == named
    assert state.pending == Key(1, 8)


def test_a_state_that_somebody_missed_is_given_up_for_one_further_ahead() -> None:
    """After a pause that grows, up to a bound."""
    state, now = both(TWO, at(5)), 0.0
    pauses = []
    for _ in range(20):
        pending = state.pending
        state = heard(state, "b", at(5, missed=pending), now)
        assert state.pending is None
        assert "b" in state.reason
        pauses.append(state.pause_until - now)
        assert heard(state, "a", at(5), now).pending is None
        now = state.pause_until
        state = both(state, at(5), now)
        assert state.pending is not None
    assert pauses == sorted(pauses)
    assert state.lead == MOST_LEAD
    assert state.pending == Key(1, 5 + MOST_LEAD)


def test_a_state_that_nobody_copies_any_more_is_given_up() -> None:
    """As long as bytes move it is not."""
    state = both(TWO, at(5))
    pending = state.pending
    for tick in range(10):
        now = (tick + 1) * 0.9 * STALL
        state = heard(state, "a", at(9, moved=tick + 1), now)
        assert state.pending == pending
    state = heard(state, "a", at(9, moved=10), now + STALL + 1)
    assert state.pending != pending
    assert "a, b" in state.reason


def test_no_state_is_named_while_a_node_is_not_connected() -> None:
    """It would not hear of it in time."""
    state = both(TWO, at(5))
    named = state.pending
    state = lost(state, "b")
    state = heard(state, "a", at(9, done=named), 1.0)
    assert (state.pending, state.kept) == (named, None)
    state = heard(state, "b", at(9, done=named), 2.0)
    assert state.kept == named


def test_a_new_conductor_learns_from_the_reports_what_is_kept() -> None:
    """The one before may have told only some of them; of an earlier lineage it says nothing."""
    state = heard(TWO, "a", at(30, kept=Key(1, 20)), 0.0)
    assert state.kept == Key(1, 20)
    state = heard(state, "b", at(30, kept=Key(1, 10)), 0.0)
    assert state.kept == Key(1, 20)
    assert heard(TWO, "a", at(30, lineage=2, kept=Key(1, 20)), 0.0).kept is None


def test_strangers_are_not_heard() -> None:
    """A node that is not of this world has no say in it."""
    assert heard(TWO, "c", at(5), 0.0) == TWO


def test_one_step_is_made_durable_everywhere() -> None:
    """Ahead of everybody; not while somebody is still writing; not another one before it is passed."""
    assert persist(TWO).persist_at == 0
    state = persist(both(TWO, at(5)))
    assert state.persist_at == 5 + LEAD
    assert persist(both(state, at(6))).persist_at == 5 + LEAD
    assert persist(both(state, at(20, saving=True))).persist_at == 5 + LEAD
    assert persist(both(state, at(20))).persist_at == 20 + LEAD


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30), nodes=st.integers(2, 4))
def test_with_lost_reports_and_dying_conductors_only_what_is_copied_counts(seed: int, nodes: int) -> None:
    """Whatever reaches the conductor and the nodes, and however often the conductor is replaced: no node is told that a
    state is kept before all have copied it, what is kept only grows, and in the end states are kept again."""
    chance = random.Random(seed)
    names = tuple("abcd"[:nodes])
    state = State(generation=1, nodes=names)
    told: dict[str, tuple[Key | None, Key | None]] = dict.fromkeys(names, (None, None))
    steps = dict.fromkeys(names, 0)
    copied: dict[str, set[Key]] = {name: set() for name in names}
    done: dict[str, Key | None] = dict.fromkeys(names)
    missed: dict[str, Key | None] = dict.fromkeys(names)
    moved = dict.fromkeys(names, 0)
    now, best = 0.0, Key(0, 0)
    for turn in range(400):
        quiet = turn > 200
        now += 0.05 if quiet else chance.choice([0.01, 0.1, 5.0])
        slowest = min(steps.values())
        for name in names:
            # Collectives keep the ranks within a step of each other.
            if steps[name] <= slowest and (quiet or chance.random() < 0.7):
                steps[name] += 1
            pending, kept = told[name]
            if pending is not None and done[name] != pending and missed[name] != pending:
                if steps[name] > pending.step + 2 and (not quiet and chance.random() < 0.2):
                    missed[name] = pending
                elif steps[name] >= pending.step and (quiet or chance.random() < 0.5):
                    copied[name].add(pending)
                    done[name] = pending
                    moved[name] += 1
            if quiet or chance.random() < 0.7:
                report = at(steps[name], done=done[name], missed=missed[name], moved=moved[name], kept=kept)
                state = heard(state, name, report, now)
            if state.kept is not None:
                assert all(state.kept in copies for copies in copied.values())
                assert state.kept >= best
                best = state.kept
            if quiet or chance.random() < 0.7:
                told[name] = (state.pending, state.kept or kept)
        if not quiet and chance.random() < 0.05:
            state = State(generation=1, nodes=names)
            best = Key(0, 0)
        if not quiet and chance.random() < 0.1:
            state = lost(state, chance.choice(names))
        if turn == 200:
            before = max((kept for _, kept in told.values() if kept), default=Key(0, 0))
    assert state.kept is not None
    assert state.kept > before


@pytest.mark.parametrize("nodes", [2, 3])
def test_without_faults_one_state_after_the_other_is_kept(nodes: int) -> None:
    """Nothing is skipped: as soon as one is copied the next is named."""
    names = tuple("abc"[:nodes])
    state, kept = State(generation=1, nodes=names), set()
    for step in range(100):
        for name in names:
            pending = state.pending
            done = pending if pending is not None and step >= pending.step else state.kept
            state = heard(state, name, at(step, done=done), step * 0.1)
        if state.kept:
            kept.add(state.kept.step)
    assert len(kept) > 90
    assert state.lead == 0
