"""The embedded store passes the conformance suite, and says so when its server is gone."""

from __future__ import annotations

import pytest

from resilient_train.control.store import ControlStore
from resilient_train.control.tcp import TcpControlStore, serve
from resilient_train.errors import StoreLost
from resilient_train.testing.control import ControlStoreConformance, record


class TestTcpControlStore(ControlStoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self) -> None:
        self.server = serve("127.0.0.1", 0)

    def store(self, job: str = "job") -> ControlStore:
        return TcpControlStore("127.0.0.1", self.server.port, job, self.ttl)

    def test_jobs_do_not_see_each_other(self) -> None:
        """Two jobs on one server have two records."""
        self.store("one").swap(record(1))
        assert self.store("other").look().record is None


def test_a_missing_server_is_an_error_with_its_address() -> None:
    """Nobody listens: StoreLost names where."""
    server = serve("127.0.0.1", 0)
    port = server.port
    del server
    with pytest.raises(StoreLost, match=str(port)):
        TcpControlStore("127.0.0.1", port, "job", timeout=1.0)
