"""This machine's addresses, by which agents know whose connections are whose."""

from __future__ import annotations

import pytest

from resilient_train.agent.addresses import own_addresses
from resilient_train.control.endpoint import towards_any
from resilient_train.errors import ConfigError


def test_the_address_towards_somebody_is_one_of_ours() -> None:
    """For IPv4; the loopback interface is always there."""
    assert "127.0.0.1" in own_addresses()
    assert towards_any(["no-such-host.invalid:1", "127.0.0.1:2379"]) == "127.0.0.1"
    assert towards_any(["localhost:0"]) in own_addresses()


def test_no_way_is_an_error() -> None:
    """Of several hosts one that is known is enough; if none is, the error says what can be done."""
    with pytest.raises(ConfigError, match="--local-addr"):
        towards_any(["no-such-host.invalid:2379", "nor-this.invalid:1"])
