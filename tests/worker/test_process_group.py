"""Groups are formed, aborted and forgotten without touching what is not theirs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
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


def test_an_abort_frees_a_formation_that_waits_for_a_rank_to_connect(port: int) -> None:
    """A rank that died after it had said where it listens, and before it connected: nobody will ever connect, and torch
    would wait for five times its timeout."""
    groups = ProcessGroups(60.0)
    groups.form(generation=1, rank=0, size=1, host="127.0.0.1", port=port, backend="gloo")
    (key,) = (key for key in map(_text, _KEPT[-1].list_keys()) if key.startswith("generation/1/") and key[-2:] == "/0")
    groups.dissolve()
    peer = subprocess.Popen([sys.executable, "-c", _PEER, str(port)])
    dist.ProcessGroupGloo(dist.PrefixStore("theirs", _KEPT[-1]), 0, 2)
    assert peer.wait() == 0
    (address,) = (_KEPT[-1].get(k) for k in map(_text, _KEPT[-1].list_keys()) if "theirs" in k and k[-2:] == "/1")
    # Whose port is higher is the one to connect.
    address = re.sub(rb"\x02\x00..\x7f\x00\x00\x01", b"\x02\x00\xff\xfe\x7f\x00\x00\x01", address, flags=re.DOTALL)
    _KEPT[-1].set(key.replace("generation/1/", "generation/2/")[:-1] + "1", address)

    failed = threading.Event()

    def abort() -> None:
        while not failed.wait(0.2):
            groups.abort()

    aborting = threading.Thread(target=abort)
    aborting.start()
    try:
        with pytest.raises((RuntimeError, dist.DistError)) as caught:
            groups.form(generation=2, rank=0, size=2, host="127.0.0.1", port=port, backend="gloo")
    finally:
        failed.set()
        aborting.join()
    assert is_communication_error(caught.value)
    groups.dissolve()
    groups.form(generation=3, rank=0, size=1, host="127.0.0.1", port=port, backend="gloo")
    groups.dissolve()


_PEER = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False, wait_for_workers=False)
dist.ProcessGroupGloo(dist.PrefixStore("theirs", store), 1, 2)
"""


def _text(key: str | bytes) -> str:
    return key if isinstance(key, str) else key.decode()


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
