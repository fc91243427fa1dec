"""Groups are formed, aborted and forgotten without touching what is not theirs."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from resilient_train.worker.process_group import ProcessGroups, _address, _shut_down, is_communication_error


@pytest.fixture
def port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    _KEPT.append(store)
    return int(store.port)


_KEPT: list[dist.TCPStore] = []


def test_an_abort_frees_a_formation_that_waits_for_a_missing_rank(port: int) -> None:
    """The main thread waits for a rank that died; another thread frees it, and the next generation can be formed."""
    groups = ProcessGroups(60.0)
    timer = threading.Timer(0.5, groups.abort)
    timer.start()
    with pytest.raises((RuntimeError, dist.DistError)) as caught:
        groups.form(generation=1, rank=0, size=2, host="127.0.0.1", port=port, backend="gloo")
    timer.join()
    assert is_communication_error(caught.value)
    groups.dissolve()
    groups.form(generation=2, rank=0, size=1, host="127.0.0.1", port=port, backend="gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 1
    groups.dissolve()
    assert not dist.is_initialized()


def test_connections_to_other_hosts_are_not_shut_down() -> None:
    """A logger's or a data set's connection, opened while a group was being formed, is the script's own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        # Another address of this machine stands for another host.
        with socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0)) as mine:
            theirs, _ = listener.accept()
            inode = os.fstat(mine.fileno()).st_ino
            assert not _shut_down(mine.fileno(), inode, {"10.0.0.1"})
            mine.sendall(b"alive")
            assert theirs.recv(5) == b"alive"
            assert _shut_down(mine.fileno(), inode, {"127.0.0.1"})
            theirs.close()


def test_mapped_addresses_are_what_they_stand_for() -> None:
    """torch's store speaks IPv6 even where its peer does not."""
    assert _address(("::ffff:127.0.0.1", 1, 0, 0)) == "127.0.0.1"
    assert _address(("::1", 1, 0, 0)) == "::1"
