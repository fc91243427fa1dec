"""Announcing long operations."""

from __future__ import annotations

import pytest

from resilient_train.errors import ConfigError, LinkLost
from resilient_train.spec.messages import Busy
from resilient_train.worker.operations import LongOperations


def test_nested_operations() -> None:
    """The innermost is named, the strictest bound counts, and the outer one goes on when the inner ends."""
    said: list[Busy] = []
    operations = LongOperations(said.append)
    with operations.announce("evaluate", 100), operations.announce("load"), operations.announce("part", 200):
        pass
    assert [busy.name for busy in said] == ["evaluate", "load", "part", "load", "evaluate", ""]
    assert all(99 < busy.seconds <= 100 for busy in said[:-1])


def test_an_error_ends_the_operation() -> None:
    """Leaving by an exception says so, and raises it as it is, even if the agent is gone."""
    said: list[Busy] = []

    def tell(busy: Busy) -> None:
        if not busy.name:
            said.append(busy)
            raise LinkLost("gone")

    with pytest.raises(ValueError, match="mine"), LongOperations(tell).announce("evaluate"):
        raise ValueError("mine")
    assert said == [Busy(name="")]


@pytest.mark.parametrize(
    ("name", "seconds"), [("", None), (3, None), ("x", 0), ("x", -1.0), ("x", float("inf")), ("x", True)]
)
def test_malformed_announcements(name: str, seconds: float | None) -> None:
    """A name, and a positive number of seconds."""
    with pytest.raises(ConfigError), LongOperations(print).announce(name, seconds):
        pass
