"""Who founds a job's own etcd, and who joins it."""

from __future__ import annotations

from itertools import combinations

import pytest

from resilient_train.plan.founding import GRACE, Begin, begin


def test_one_alone_founds_at_once() -> None:
    """A list of one."""
    assert begin(0, 1, [], False, 0.0) is Begin.FOUND


def test_all_found_at_once_and_the_first_offers() -> None:
    """The others wait for its offer."""
    assert begin(0, 3, [1, 2], False, 0.0) is Begin.FOUND
    assert begin(1, 3, [0, 2], False, 0.0) is Begin.WAIT
    assert begin(2, 3, [0, 1], False, 0.0) is Begin.WAIT


def test_a_majority_waits_for_a_while() -> None:
    """Whoever is late joins."""
    assert begin(1, 3, [2], False, GRACE / 2) is Begin.WAIT
    assert begin(1, 3, [2], False, GRACE) is Begin.FOUND


def test_a_minority_never_founds() -> None:
    """The others may have a cluster that cannot be seen from here."""
    assert begin(0, 3, [], False, 1e9) is Begin.WAIT


@pytest.mark.parametrize("waiting", [[], [1], [1, 2]])
def test_a_cluster_is_joined(waiting: list[int]) -> None:
    """Whoever else waits."""
    assert begin(0, 3, waiting, True, 1e9) is Begin.JOIN


def test_one_of_those_who_see_each_other_founds() -> None:
    """Never two, always one in the end."""
    for present in [*combinations(range(3), 2), (0, 1, 2)]:
        said = [begin(me, 3, [other for other in present if other != me], False, GRACE) for me in present]
        assert said.count(Begin.FOUND) == 1
