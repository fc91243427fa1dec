"""This machine's addresses, by which agents know whose connections are whose."""

from __future__ import annotations

import pytest

from resilient_train.agent.addresses import address_towards, own_addresses


def test_the_address_towards_somebody_is_one_of_ours() -> None:
    """For IPv4; the loopback interface is always there."""
    assert "127.0.0.1" in own_addresses()
    assert address_towards("127.0.0.1", 2379) == "127.0.0.1"
    assert address_towards("localhost", 0) in own_addresses()


def test_no_way_is_an_error() -> None:
    """A name that nobody knows is an OSError, as the docstring says."""
    with pytest.raises(OSError, match=r".+"):
        address_towards("no-such-host.invalid", 2379)
