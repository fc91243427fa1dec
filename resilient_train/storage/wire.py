"""Connections between nodes: both ends prove that they know the job's secret, then JSON messages and raw bytes.

Nothing but random numbers is said before the other end has proved itself, and nothing of unbounded length is read.  The
bytes are neither encrypted nor signed: whoever can change packets on the way is not kept out, and checksums find what
went wrong by accident.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import TypeVar

from resilient_train.errors import FormatError, LinkLost
from resilient_train.spec.messages import Message, decode, encode
from resilient_train.spec.peers import MAX_HEAD, TYPES

_MAGIC = b"resilient_train/peer/1\n"
_NONCE = 32
_PROOF = hashlib.sha256().digest_size
_LENGTH = struct.Struct("<I")
_MOST_BUFFERS = 512
"""The kernel takes 1,024 at once."""
_PIECE = 8 << 20
"""Bytes that are sent or received in one call, within one timeout."""
_M = TypeVar("_M", bound=Message)


class Wire:
    """One authenticated connection; used by one thread at a time."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Args:
        sock: connected and authenticated.
        name: what errors call the other end.
        """
        self._socket = sock
        self.name = name

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def patience(self, seconds: float) -> None:
        """How long a single send or receive may take; 0 for any time."""
        _patience(self._socket, seconds)

    def send(self, message: Message, data: Sequence[memoryview] = ()) -> None:
        """Send a message and the raw bytes that belong to it.

        Raises:
            LinkLost: if the other end is gone or does not read.
        """
        head = encode(message)
        self.send_bytes([memoryview(_LENGTH.pack(len(head)) + head), *data])

    def send_bytes(self, buffers: Sequence[memoryview]) -> None:
        """Send raw bytes.

        Raises:
            LinkLost: if the other end is gone or does not read.
        """
        try:
            for piece in _pieces(buffers):
                left = piece
                while left:
                    left = _behind(left, self._socket.sendmsg(left[:_MOST_BUFFERS]))
        except OSError as error:
            raise LinkLost(f"{self.name} is gone: {error}") from error

    def offer(self, message: Message) -> None:
        """Send a short message without ever waiting.

        Raises:
            LinkLost: if the other end is gone or does not read.
        """
        head = encode(message)
        data = _LENGTH.pack(len(head)) + head
        try:
            if self._socket.send(data, socket.MSG_DONTWAIT) != len(data):
                raise LinkLost(f"{self.name} does not read")
        except OSError as error:
            raise LinkLost(f"{self.name} is gone: {error}") from error

    def receive(self) -> Message:
        """The next message.

        Raises:
            LinkLost: if the other end is gone or silent.
            FormatError: if it says something that is no message.
        """
        prefix = bytearray(_LENGTH.size)
        self.fill([memoryview(prefix)])
        (length,) = _LENGTH.unpack(prefix)
        if length > MAX_HEAD:
            raise FormatError(f"{self.name} announced a message of {length} bytes")
        head = bytearray(length)
        self.fill([memoryview(head)])
        return decode(bytes(head), TYPES)

    def expect(self, kind: type[_M]) -> _M:
        """The next message, which has to be a ``kind``.

        Raises:
            LinkLost: if the other end is gone or silent.
            FormatError: if it says anything else.
        """
        message = self.receive()
        if not isinstance(message, kind):
            raise FormatError(f"{self.name} answered {message!r:.200}")
        return message

    def fill(self, buffers: Sequence[memoryview]) -> None:
        """Receive raw bytes until the buffers are full.

        Raises:
            LinkLost: if the other end is gone or silent.
        """
        _fill(self._socket, buffers, self.name)

    def hang_up(self) -> None:
        """Free a thread that waits for the other end, and will `close`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # It has hung up already.

    def close(self) -> None:
        """Hang up and forget the connection."""
        self.hang_up()
        self._socket.close()


def connect(endpoint: str, secret: bytes, timeout: float) -> Wire:
    """Connect to a keeper at ``host:port`` and prove each other's knowledge of the secret.

    Raises:
        LinkLost: if nobody is there, or somebody else.
    """
    try:
        sock = socket.create_connection(address_of(endpoint), timeout)
    except (OSError, ValueError) as error:
        raise LinkLost(f"no keeper at {endpoint}: {error}") from error
    try:
        _prepare(sock, timeout)
        deadline = time.monotonic() + timeout
        mine = os.urandom(_NONCE)
        _send(sock, _MAGIC + mine, endpoint)
        theirs = _receive(sock, _NONCE, endpoint, deadline)
        _send(sock, _proof(secret, b"client", mine, theirs), endpoint)
        if not hmac.compare_digest(_receive(sock, _PROOF, endpoint, deadline), _proof(secret, b"server", mine, theirs)):
            raise LinkLost(f"{endpoint} does not know this job's secret")
        _patience(sock, timeout)
    except BaseException:
        sock.close()
        raise
    return Wire(sock, f"the keeper at {endpoint}")


def accept(sock: socket.socket, secret: bytes, timeout: float) -> Wire:
    """The other end's part of `connect`; takes ``timeout`` seconds at the most, however slowly the client talks.

    Raises:
        LinkLost: if the client is gone, or is none of this job.
    """
    name = "a client"
    _prepare(sock, timeout)
    deadline = time.monotonic() + timeout
    if _receive(sock, len(_MAGIC), name, deadline) != _MAGIC:
        raise LinkLost(f"{name} speaks another language")
    theirs, mine = _receive(sock, _NONCE, name, deadline), os.urandom(_NONCE)
    _send(sock, mine, name)
    if not hmac.compare_digest(_receive(sock, _PROOF, name, deadline), _proof(secret, b"client", theirs, mine)):
        raise LinkLost(f"{name} does not know this job's secret")
    _patience(sock, timeout)
    _send(sock, _proof(secret, b"server", theirs, mine), name)
    return Wire(sock, name)


def address_of(endpoint: str) -> tuple[str, int]:
    """(host, port) of ``host:port``, where an IPv6 host stands in brackets.

    Raises:
        ValueError: if it is anything else.
    """
    host, _, port = endpoint.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _proof(secret: bytes, who: bytes, client: bytes, server: bytes) -> bytes:
    return hmac.digest(secret, _MAGIC + who + client + server, "sha256")


def _prepare(sock: socket.socket, timeout: float) -> None:
    sock.settimeout(None)
    _patience(sock, timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A node that vanished leaves no connection behind that waits for ever.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _patience(sock: socket.socket, seconds: float) -> None:
    # The kernel's own timeouts: Python's cost another call for each one, and keep it from waiting for all of it.
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, value)


def _send(sock: socket.socket, data: bytes, name: str) -> None:
    try:
        sock.sendall(data)
    except OSError as error:
        raise LinkLost(f"{name} is gone: {error}") from error


def _receive(sock: socket.socket, size: int, name: str, deadline: float) -> bytes:
    data = b""
    try:
        while len(data) < size:
            left = deadline - time.monotonic()
            if left < 0.001:
                raise LinkLost(f"{name} is silent")
            _patience(sock, left)
            more = sock.recv(size - len(data))
            if not more:
                raise LinkLost(f"{name} hung up")
            data += more
    except BlockingIOError as error:
        raise LinkLost(f"{name} is silent") from error
    except OSError as error:
        raise LinkLost(f"{name} is gone: {error}") from error
    return data


def _fill(sock: socket.socket, buffers: Sequence[memoryview], name: str) -> None:
    try:
        for piece in _pieces(buffers):
            left = piece
            while left:
                count, _, _, _ = sock.recvmsg_into(left[:_MOST_BUFFERS], 0, socket.MSG_WAITALL)
                if not count:
                    raise LinkLost(f"{name} hung up")
                left = _behind(left, count)
    except BlockingIOError as error:
        raise LinkLost(f"{name} is silent") from error
    except OSError as error:
        raise LinkLost(f"{name} is gone: {error}") from error


def _pieces(buffers: Sequence[memoryview]) -> list[list[memoryview]]:
    """The buffers in groups, none of much more than `_PIECE` bytes."""
    groups: list[list[memoryview]] = [[]]
    room = _PIECE
    for buffer in buffers:
        for at in range(0, len(buffer), _PIECE):
            part = buffer[at : at + _PIECE]
            if len(part) > room:
                groups.append([])
                room = _PIECE
            groups[-1].append(part)
            room -= len(part)
    return [group for group in groups if group]


def _behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers behind their first ``count`` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
