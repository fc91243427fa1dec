"""Whose fault it is that a job stands still: verdicts on what the ranks report, without processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.plan.culprit import AtWork, Culprit, Deadlock, judge
from resilient_train.spec.rank import RankReport, Where

MEMBERS = tuple(f"n{rank // 2}/{rank % 2}.0" for rank in range(4))
C, U, E, S = Where.COMMUNICATION, Where.UNCLEAR, Where.ELSEWHERE, Where.SILENT


def reports(*said: tuple[Where, int], **more: object) -> dict[str, RankReport]:
    """(where, operations entered) of each rank."""
    return {
        member: RankReport(
            member=member, generation=1, step=7, where=where, frame=f"train.py:{rank}", counts=(("0", n),), **more
        )
        for rank, (member, (where, n)) in enumerate(zip(MEMBERS, said, strict=True))
    }


def verdict(said: dict[str, RankReport]) -> tuple[type, str]:
    found = judge(MEMBERS, said)
    return type(found), found.member if isinstance(found, Culprit) else ""


def culprit(rank: int) -> tuple[type, str]:
    return Culprit, MEMBERS[rank]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # It does not come to communicate, and the others wait for it.
        ([(C, 8), (C, 8), (E, 7), (C, 8)], culprit(2)),
        # Counts of point-to-point operations differ anyway; the stack decides.
        ([(C, 8), (C, 4), (E, 7), (C, 5)], culprit(2)),
        # Backward waits in native code: where a rank is ahead of another, it waits.
        ([(U, 8), (E, 7), (U, 8), (U, 8)], culprit(1)),
        ([(U, 8), (U, 7), (U, 8), (U, 8)], culprit(1)),
        # All in backward, nobody ahead: a long one.
        ([(U, 8), (U, 8), (U, 8), (U, 8)], (AtWork, "")),
        # One is at something else, but the others do not wait yet.
        ([(U, 8), (U, 8), (E, 8), (U, 8)], (AtWork, "")),
        # Nobody waits: an evaluation that nobody announced.
        ([(E, 8), (E, 8), (E, 7), (E, 8)], (AtWork, "")),
        # Of two that work, only one has not entered what the others wait in.
        ([(C, 8), (E, 7), (C, 8), (E, 8)], culprit(1)),
        ([(C, 8), (E, 7), (C, 8), (E, 7)], (Deadlock, "")),
        # All wait, whatever the counts: a mismatch.
        ([(C, 8), (C, 8), (C, 8), (C, 8)], (Deadlock, "")),
        ([(C, 8), (C, 8), (C, 7), (C, 8)], (Deadlock, "")),
        # No answer.
        ([(C, 8), (C, 8), (C, 8), (S, 0)], culprit(3)),
        ([(C, 8), (C, 8), (S, 0), (S, 0)], (Deadlock, "")),
        ([(E, 8), (E, 8), (E, 8), (S, 0)], (AtWork, "")),
        ([(C, 8), (C, 8), (S, 0), (Where.STOPPED, 0)], culprit(3)),
        # Somebody compiles.
        ([(C, 8), (C, 8), (C, 8), (Where.COMPILING, 7)], (AtWork, "")),
    ],
)
def test_verdicts(said: list[tuple[Where, int]], expected: tuple[type, str]) -> None:
    """A table of situations on four ranks."""
    assert verdict(reports(*said)) == expected


def test_on_devices_counts_decide() -> None:
    """The host of a device waits in whatever line needs a result, so who is behind is the culprit."""
    assert verdict(reports((E, 8), (E, 8), (E, 7), (E, 8), device=True)) == culprit(2)
    assert verdict(reports((E, 8), (E, 8), (E, 8), (E, 8), device=True)) == (AtWork, "")


def test_counts_of_different_groups_are_not_compared() -> None:
    """A rank that is in fewer groups is not behind for it."""
    said = reports((U, 8), (U, 8), (E, 8), (U, 8))
    said[MEMBERS[0]] = replace(said[MEMBERS[0]], counts=(("0", 8), ("7", 90)))
    assert verdict(said) == (AtWork, "")


def test_counts_of_different_generations_are_not_compared() -> None:
    """On the way to a planned change some ranks are in the next generation already, whose counts begin anew."""
    said = reports((C, 2), (C, 2), (E, 900), (U, 900))
    for member in MEMBERS[:2]:
        said[member] = replace(said[member], generation=2)
    assert verdict(said) == (Deadlock, "")
    said[MEMBERS[3]] = replace(said[MEMBERS[3]], where=C)
    assert verdict(said) == culprit(2)


def test_after_the_last_boundary_nobody_hangs() -> None:
    """What a script does after its last step takes as long as it takes."""
    said = reports((C, 8), (C, 8), (E, 8), (C, 8), finished=True)
    assert verdict(said) == (AtWork, "")


def test_reasons_are_for_people() -> None:
    """They name the rank, the line and what it is waited for; of a mismatch, who waits elsewhere."""
    found = judge(MEMBERS, reports((C, 8), (C, 8), (E, 7), (C, 8)))
    text = "rank 2 has not entered operation 8 of process group 0, for which ranks 0, 1, 3 wait; it is at train.py:2"
    assert found.reason == text
    said = {m: replace(r, frame="train.py:5") for m, r in reports((C, 8), (C, 8), (C, 8), (C, 8)).items()}
    said[MEMBERS[1]] = replace(said[MEMBERS[1]], frame="train.py:9")
    text = "all ranks wait in communication: rank 1 at train.py:9, the others at train.py:5"
    assert judge(MEMBERS, said).reason == text


any_report = st.tuples(st.sampled_from(list(Where)), st.integers(0, 3))


@given(st.lists(any_report, min_size=4, max_size=4), st.permutations(range(4)), st.booleans())
def test_who_waits_is_never_the_culprit(said: list[tuple[Where, int]], order: list[int], device: bool) -> None:
    """Whatever is reported, in whatever order of the ranks: nobody is ended who waits in communication, and nobody but
    a stopped process unless somebody waits."""
    found = reports(*said, device=device)
    one = judge(MEMBERS, found)
    if isinstance(one, Culprit):
        where = found[one.member].where
        assert where is not C
        waiting = [r for r in found.values() if r.where in (C, U) or r.device]
        assert where is Where.STOPPED or waiting
    other = judge([MEMBERS[i] for i in order], found)
    assert type(one) is type(other)
    if isinstance(one, Culprit) and found[one.member].where is not Where.STOPPED:
        assert isinstance(other, Culprit)
        assert one.member == other.member
