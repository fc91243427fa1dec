"""The embedded store passes the conformance suite, and says so when its server is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from torch.distributed import TCPStore

from resilient_train.control.store import ControlStore
from resilient_train.control.tcp import TcpControlStore, serve
from resilient_train.errors import StoreGone, StoreLost
from resilient_train.testing.control import ControlStoreConformance, record, wait_for


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


def test_closing_twice_waits_for_nothing() -> None:
    """A call that waits for this store's patience would take longer than this test may."""
    server = serve("127.0.0.1", 0)
    store = TcpControlStore("127.0.0.1", server.port, "job", ttl=10_000.0)
    store.close()
    store.close()
    with pytest.raises(StoreLost, match="was closed"):
        store.beat()


def test_a_version_that_was_deleted_long_ago_is_not_won() -> None:
    """Whoever wins a revision may die before it deletes an old one; an agent that slept meanwhile wins nothing."""
    server = serve("127.0.0.1", 0)
    store, sleeper = (TcpControlStore("127.0.0.1", server.port, "job") for _ in range(2))
    for revision in range(1, 19):
        store.swap(record(revision))
    # What the winner of 19 does before it is killed.
    server.compare_set("resilient_train/job/record/19", "", json.dumps(record(19).to_json()))
    server.set("resilient_train/job/record/3", json.dumps(record(3).to_json()))
    for revision in range(20, 24):
        store.swap(record(revision))
    assert not server.check(["resilient_train/job/record/3"])
    server.set("resilient_train/job/record/3", json.dumps(record(3).to_json()))
    assert sleeper.swap(record(4, reason="late")) == record(23)
    assert sleeper.look().record == record(23)
    assert TcpControlStore("127.0.0.1", server.port, "job").look().record == record(23)
    assert store.swap(record(24)) == record(24)


def test_a_server_that_is_stopped_is_lost_soon_and_found_again() -> None:
    """A call ends after about twice the ttl; those behind it too; when the server goes on, so do the calls.

    Only when its process has ended it is gone for good.
    """
    code = (
        "from resilient_train.control.tcp import serve as s; x = s('127.0.0.1', 0); print(x.port, flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        store = TcpControlStore("127.0.0.1", int(process.stdout.readline()), "job", ttl=0.5)
        assert store.join() == 0
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # It has stopped.
        for _ in range(2):
            with pytest.raises(StoreLost, match="nothing for 2 s") as silent:
                store.swap(record(1))
            assert not isinstance(silent.value, StoreGone)
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: answers(lambda: store.swap(record(1)) == record(1)), 30.0)
        process.kill()
        process.wait()
        with pytest.raises(StoreGone, match="nobody listens there any more"):
            store.look()
        with pytest.raises(StoreGone):
            store.watch(0, 30.0)
        with pytest.raises(StoreGone):
            store.revision()


def answers(call: Callable[[], bool]) -> bool:
    """What a call returns; False if the store does not answer."""
    try:
        return call()
    except StoreLost:
        return False


def test_a_change_whose_teller_died_over_it_is_heard_all_the_same() -> None:
    """It was counted, and nobody was woken for it: a watch that waits for its key alone would be deaf from then on."""
    server = serve("127.0.0.1", 0)
    store = TcpControlStore("127.0.0.1", server.port, "job", ttl=1.0)
    number = store.look().number
    raw = TCPStore("127.0.0.1", server.port, None, False)
    raw.add("resilient_train/job/news", 1)
    store.swap(record(1))
    news = store.watch(number, 60.0)
    assert news is not None
    assert news.record is not None
    assert news.number == number + 2
    assert store.watch(news.number, 0.1) is None
    store.close()
