"""Connections between nodes: who does not know the secret hears nothing, and garbage ends one connection."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from resilient_train.errors import FormatError, LinkLost
from resilient_train.spec.peers import MAX_HEAD, Held, ListHeld, Range
from resilient_train.storage.wire import Wire, accept, address_of, connect

SECRET = b"secret of this job"


@contextmanager
def serving(act: Callable[[socket.socket], None]) -> Iterator[str]:
    """One connection is taken and handed to ``act`` on a thread; what it raises is not of interest."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            sock, _ = server.accept()
            with sock:
                try:
                    act(sock)
                except (LinkLost, FormatError, OSError):
                    return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(20)
        assert not thread.is_alive()


def test_messages_and_bytes_arrive_in_order_in_whatever_pieces() -> None:
    """More than a call takes, in many buffers, into other buffers."""
    data = os.urandom(20 << 20)

    def act(sock: socket.socket) -> None:
        wire = accept(sock, SECRET, 5.0)
        assert wire.expect(ListHeld) == ListHeld()
        cuts = range(0, len(data), 7001)
        wire.send(Range(size=len(data)), [memoryview(data)[at : at + 7001] for at in cuts])

    with serving(act) as endpoint:
        wire = connect(endpoint, SECRET, 5.0)
        wire.patience(0.0)
        wire.send(ListHeld())
        assert wire.expect(Range).size == len(data)
        got = bytearray(len(data))
        view = memoryview(got)
        wire.fill([view[at : at + 9000] for at in range(0, len(data), 9000)])
        assert got == data
        wire.close()


def test_neither_end_talks_to_one_that_does_not_know_the_secret() -> None:
    """A client with another secret is hung up on; a server with another one is not believed."""
    heard: list[str] = []

    def act(sock: socket.socket) -> None:
        accept(sock, SECRET, 5.0)
        heard.append("authenticated")

    with serving(act) as endpoint, pytest.raises(LinkLost):
        connect(endpoint, b"another", 5.0)

    def lie(sock: socket.socket) -> None:
        sock.sendall(os.urandom(32))
        sock.sendall(os.urandom(32))
        time.sleep(0.1)

    with serving(lie) as endpoint, pytest.raises(LinkLost, match="secret"):
        connect(endpoint, SECRET, 5.0)
    assert heard == []


def test_a_proof_cannot_be_sent_back_to_its_maker() -> None:
    """A server that only echoes a client's own proof does not pass for one."""

    def echo(sock: socket.socket) -> None:
        sock.recv(23 + 32, socket.MSG_WAITALL)
        sock.sendall(os.urandom(32))
        sock.sendall(sock.recv(32, socket.MSG_WAITALL))
        time.sleep(0.1)

    with serving(echo) as endpoint, pytest.raises(LinkLost, match="secret"):
        connect(endpoint, SECRET, 5.0)


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, os.urandom(4096)])
def test_a_stranger_hears_nothing_of_use(first: bytes) -> None:
    """Neither a silent one nor one that sends garbage; both are let go of after a bounded time."""

    def act(sock: socket.socket) -> None:
        accept(sock, SECRET, 0.3)

    with serving(act) as endpoint, socket.create_connection(address_of(endpoint)) as stranger:
        stranger.sendall(first)
        stranger.settimeout(20)
        try:
            answer = stranger.recv(100)
        except ConnectionResetError:
            answer = b""
        assert answer == b""


def test_a_message_of_unbounded_length_is_not_read() -> None:
    """Nor is one that is not known."""

    def huge(sock: socket.socket) -> None:
        accept(sock, SECRET, 5.0)
        sock.sendall((MAX_HEAD + 1).to_bytes(4, "little"))
        sock.recv(1)

    def unknown(sock: socket.socket) -> None:
        accept(sock, SECRET, 5.0)
        body = b'{"type": "Adopt", "slots": []}'
        sock.sendall(len(body).to_bytes(4, "little") + body)
        sock.recv(1)

    for act in (huge, unknown):
        with serving(act) as endpoint:
            wire = connect(endpoint, SECRET, 5.0)
            with pytest.raises(FormatError):
                wire.receive()
            wire.close()


def test_a_silent_peer_is_lost_in_a_bounded_time() -> None:
    """And so is one that hangs up in the middle of something."""

    def silent(sock: socket.socket) -> None:
        accept(sock, SECRET, 5.0)
        sock.recv(1)

    def short(sock: socket.socket) -> None:
        wire = accept(sock, SECRET, 5.0)
        wire.send(Range(size=100), [memoryview(b"x" * 50)])

    with serving(silent) as endpoint:
        wire = connect(endpoint, SECRET, 5.0)
        wire.patience(0.2)
        with pytest.raises(LinkLost, match="silent"):
            wire.expect(Held)
        wire.close()
    with serving(short) as endpoint:
        wire = connect(endpoint, SECRET, 5.0)
        wire.expect(Range)
        with pytest.raises(LinkLost):
            wire.fill([memoryview(bytearray(100))])
        wire.close()


def test_what_is_said_without_waiting_never_waits() -> None:
    """A peer that does not read is lost, and holds nobody up."""
    done = threading.Event()

    def act(sock: socket.socket) -> None:
        accept(sock, SECRET, 5.0)
        done.wait(20)

    with serving(act) as endpoint:
        wire: Wire = connect(endpoint, SECRET, 5.0)
        message = Held(images=[[0] * 7] * 1000, chosen=None)
        with pytest.raises(LinkLost):
            _offer_for_ever(wire, message)
        done.set()
        wire.close()


def _offer_for_ever(wire: Wire, message: Held) -> None:
    for _ in range(100_000):
        wire.offer(message)


def test_endpoints() -> None:
    """With names, numbers, and IPv6 in brackets."""
    assert address_of("host:12") == ("host", 12)
    assert address_of("[::1]:12") == ("::1", 12)
    with pytest.raises(ValueError, match="invalid"):
        address_of("host")
