"""A job of several nodes, without its agents and its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from nodes import Cluster


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes nodes with so many workers each."""
    made: list[Cluster] = []

    def make(*workers: int) -> Cluster:
        made.append(Cluster(*workers))
        return made[-1]

    yield make
    for one in made:
        one.close()
