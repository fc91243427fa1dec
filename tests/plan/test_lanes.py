"""Lanes: who reads which shard, and that shards take turns."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.plan.lanes import count_lanes, turns
from resilient_train.spec.sharding import Cut, held_box

NUMBERS = st.tuples(st.integers(1, 12), st.integers(1, 6), st.booleans()).map(
    lambda two: (two[0] * two[1], two[0]) if two[2] else (two[0], two[0] * two[1])
)


@given(NUMBERS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 50))
def test_every_unit_is_someones_and_comes_from_a_shard_of_his(
    numbers: tuple[int, int], outer: int, inner: int, step: int
) -> None:
    """On any mesh every unit of a step is computed once, ranks make equally many turns, nobody reads another's shard,
    and the weights of all are those of a mean."""
    shards, units = numbers
    lanes = count_lanes(shards, units)
    ranks = outer * inner
    owned: list[set[int]] = []
    found = []
    for i in range(outer):
        for j in range(inner):
            box = held_box((lanes,), (Cut(0, outer, inner), Cut(0, inner, 1)), i * inner + j)
            first, count = box.offset[0], box.shape[0]
            owned.append({shard for lane in range(first, first + count) for shard in range(lane, shards, lanes)})
            found.append(turns(step, shards=shards, units=units, first=first, count=count, ranks=ranks))
    assert sorted(shard for mine in owned for shard in mine) == list(range(shards))
    assert len({len(share) for share in found}) == 1
    assert all([turn.last for turn in share] == [False] * (len(share) - 1) + [True] for share in found)
    for mine, share in zip(owned, found, strict=True):
        assert all(turn.shard in mine for turn in share if turn.unit >= 0)
        assert all((turn.shard, turn.weight) == (-1, 0) for turn in share if turn.unit < 0)
    assert sorted(turn.unit for share in found for turn in share if turn.unit >= 0) == list(range(units))
    assert sum(turn.weight for share in found for turn in share) / ranks == pytest.approx(1)


@given(NUMBERS)
def test_shards_take_turns(numbers: tuple[int, int]) -> None:
    """No shard is ever more than one batch ahead of another at a boundary, whatever the numbers."""
    shards, units = numbers
    lanes = count_lanes(shards, units)
    read: Counter[int] = Counter(dict.fromkeys(range(shards), 0))
    for step in range(20):
        read.update(t.shard for t in turns(step, shards=shards, units=units, first=0, count=lanes, ranks=1))
        assert max(read.values()) - min(read.values()) <= 1


@pytest.mark.parametrize(("shards", "units"), [(6, 4), (4, 6), (0, 4), (4, 0)])
def test_numbers_that_do_not_divide_are_refused(shards: int, units: int) -> None:
    """Or a shard would have to change its rank from step to step."""
    with pytest.raises(ValueError, match="must divide the other"):
        count_lanes(shards, units)
