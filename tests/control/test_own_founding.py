"""Members without data find each other, and take one offer."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from etcd_cluster import free_ports

from resilient_train.control.own_founding import Offer, Waiting, waits

ONE, OTHER = Offer(token="a", members=(0, 1)), Offer(token="b", members=(0, 2))


@pytest.fixture
def address() -> tuple[str, int]:
    return "127.0.0.1", free_ports(1)[0]


@pytest.fixture
def waiting(address: tuple[str, int]) -> Iterator[Waiting]:
    waiting = Waiting(address)
    yield waiting
    waiting.close()


def test_the_first_offer_is_taken(address: tuple[str, int], waiting: Waiting) -> None:
    """And no other, its own neither."""
    assert waits(address)
    assert waiting.taken() is None
    assert waits(address, ONE)
    assert not waits(address)
    assert not waits(address, OTHER)
    assert waiting.taken() == ONE
    assert waiting.taken(OTHER) == ONE


def test_its_own_offer_is_one(address: tuple[str, int], waiting: Waiting) -> None:
    """Whoever offers takes part in nothing else."""
    assert waiting.taken(ONE) is ONE
    assert not waits(address, OTHER)


@pytest.mark.parametrize(
    "junk",
    [
        *(b"", b"PRI * HTTP/2.0\r\n", b"[]\n", b'{"offer": 1}\n', b'{"offer": {}}\n', b"\xff\n", b"[" * 4000),
        b'{"offer": {"token": "x", "members": [1e999]}}\n',
    ],
)
def test_strangers_change_nothing(address: tuple[str, int], waiting: Waiting, junk: bytes) -> None:
    """Whatever they say."""
    with socket.create_connection(address) as stranger:
        stranger.sendall(junk)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(30.0)
        assert stranger.recv(100) == b""
    assert waits(address)


def test_nobody_waits(address: tuple[str, int]) -> None:
    """A closed port, one that answers with something else, and one that no longer waits."""
    assert not waits(address)
    waiting = Waiting(address)
    waiting.close()
    assert not waits(address)
    with socket.create_server(address):
        assert not waits(address)
