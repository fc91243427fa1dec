"""The global batch: constant, cut evenly, in an order that depends on seed and step only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.plan.batch import passes, permute, sample

SIZES = st.integers(1, 60)


@given(st.integers(1, 300), st.integers(0, 1 << 32))
def test_permute_is_a_permutation(length: int, key: int) -> None:
    """Every element once."""
    assert sorted(permute(i, length, key) for i in range(length)) == list(range(length))


@given(SIZES, st.integers(1, 9), st.integers(1, 9))
def test_ranks_make_equally_many_passes_and_use_every_sample_once(batch: int, micro: int, ranks: int) -> None:
    """All ranks together compute the global batch, with weights that make the averaged gradient its mean."""
    shares = [passes(batch, micro, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    real = [each for share in shares for each in share if each.unit >= 0]
    used = [i for each in real for i in range(each.begin, each.begin + each.count)]
    assert sorted(used) == list(range(batch))
    assert all(each.last == (i == len(share) - 1) for share in shares for i, each in enumerate(share))
    # Averaged over ranks, each sample counts 1 / batch.
    for each in real:
        assert each.weight / ranks / each.count == pytest.approx(1 / batch)
    fillers = [each for share in shares for each in share if each.unit < 0]
    assert all(each.weight == 0 and each.count == min(micro, batch) for each in fillers)


@given(SIZES, SIZES, st.integers(0, 5))
def test_each_epoch_uses_every_sample_once(length: int, batch: int, seed: int) -> None:
    """Whatever the sizes, epochs are permutations one after the other."""
    steps = -(-2 * length // batch)
    order = [
        sample(s, i, length=length, global_batch=batch, seed=seed, shuffle=True)
        for s in range(steps)
        for i in range(batch)
    ]
    assert sorted(order[:length]) == list(range(length))
    assert sorted(order[length : 2 * length]) == list(range(length))


def test_epochs_and_seeds_differ() -> None:
    """Reshuffled every epoch, and by every seed."""
    orders = [
        [sample(s, 0, length=50, global_batch=1, seed=seed, shuffle=True) for s in range(start, start + 50)]
        for seed, start in ((0, 0), (0, 50), (1, 0))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert [sample(s, 0, length=5, global_batch=1, seed=0, shuffle=False) for s in range(7)] == [0, 1, 2, 3, 4, 0, 1]
