"""Framed messages with descriptors over abstract Unix sockets.

Abstract addresses need no file, so nothing is left behind however a process ends.  They are open to every user of the
machine, so both ends check that the other runs as the same user.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

from resilient_train.errors import LinkLost
from resilient_train.spec.messages import MAX_MESSAGE, Message, decode, encode

_HEADER = struct.Struct("<IH")
"""Length of the message in bytes; number of descriptors that belong to it."""
_MAX_DESCRIPTORS = 250
# The kernel takes at most 253 in one message.


class Channel:
    """One connection.  `send` may be called from any thread; `receive` from one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._unsent = bytearray()
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one message; descriptors are duplicated to the receiver.

        Raises:
            LinkLost: if the other end is gone.
        """
        body = encode(message)
        data = memoryview(_HEADER.pack(len(body), len(descriptors)) + body)
        with self._sending:
            try:
                if self._unsent:
                    self._socket.sendall(self._unsent)
                    self._unsent.clear()
                if descriptors:
                    sent = socket.send_fds(self._socket, [data], list(descriptors))
                    data = data[sent:]
                if data:  # Even sending nothing fails once the peer has read its message and hung up.
                    self._socket.sendall(data)
            except OSError as error:
                raise LinkLost(f"the other end of a local connection is gone: {error}") from error

    def post(self, message: Message) -> None:
        """Send without ever waiting; what the other end does not take now goes with later calls of `push`.

        Raises:
            LinkLost: if the other end is gone, or has not read for so long that too much is waiting for it.
        """
        body = encode(message)
        self._unsent += _HEADER.pack(len(body), 0) + body
        if len(self._unsent) > MAX_MESSAGE:
            raise LinkLost("the other end of a local connection does not read")
        self.push()

    def push(self) -> bool:
        """Send what `post` could not; whether nothing is left."""
        with self._sending:
            while self._unsent:
                try:
                    sent = self._socket.send(self._unsent, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return False
                except OSError:
                    # Whoever reads from it will hear that it is gone.
                    self._unsent.clear()
                    return True
                del self._unsent[:sent]
        return True

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors, which become the caller's; None after ``timeout`` seconds.

        Raises:
            LinkLost: if the other end is gone.
            FormatError: if it sent something that is no message.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self._take()
            if message is not None:
                return message
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._fill(left):
                return None

    def pending(self) -> list[tuple[Message, list[int]]]:
        """Every message that has arrived, without waiting.

        Raises:
            LinkLost: if the other end is gone and nothing is left to read.
        """
        messages = []
        while True:
            message = self._take()
            if message is not None:
                messages.append(message)
                continue
            try:
                if not self._fill(0.0):
                    return messages
            except LinkLost:
                if messages:
                    return messages
                raise

    def _take(self) -> tuple[Message, list[int]] | None:
        if len(self._buffer) < _HEADER.size:
            return None
        length, count = _HEADER.unpack_from(self._buffer)
        if length > MAX_MESSAGE:
            raise LinkLost(f"a local peer announced a message of {length} bytes")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        message = decode(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        # The kernel may deliver a plain frame together with the descriptors of the one behind it.
        descriptors, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        if len(descriptors) < count:
            raise LinkLost("a local peer's descriptors were lost: too many files are open")
        return message, descriptors

    def _fill(self, timeout: float | None) -> bool:
        # The socket stays blocking, because another thread may be sending; only this read must not wait.
        try:
            if timeout is not None and not self._readable(timeout):
                return False
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 20, _MAX_DESCRIPTORS)
        except (OSError, ValueError) as error:
            raise LinkLost(f"the other end of a local connection is gone: {error}") from error
        self._descriptors += descriptors
        if not data:
            raise LinkLost("the other end of a local connection is gone")
        self._buffer += data
        return True

    def _readable(self, timeout: float) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(timeout * 1000))

    def close(self) -> None:
        """Hang up, which also frees a thread blocked in `receive`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class Listener:
    """Accepts connections of the same user at an abstract address."""

    def __init__(self, name: str) -> None:
        """Raises:
        LinkLost: if somebody else listens there.
        """
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_address(name))
        except OSError as error:
            self._socket.close()
            raise LinkLost(f"cannot listen at {name}: {error}") from error
        self._socket.listen(128)

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def accept(self) -> Channel | None:
        """The next connection; None if it came from another user, is gone, or there is no descriptor left for it."""
        try:
            sock, _ = self._socket.accept()
        except OSError:
            return None  # It stays in the queue, if it is there still.
        if not _same_user(sock):
            sock.close()
            return None
        return Channel(sock)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def connect(name: str, timeout: float) -> Channel:
    """Connect to a `Listener`, waiting up to ``timeout`` seconds for it to appear.

    Raises:
        LinkLost: if nobody of this user listens there.
    """
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(_address(name))
        except OSError as error:
            sock.close()
            if time.monotonic() >= deadline:
                raise LinkLost(f"nobody listens at {name}: {error}") from error
            # An abstract address cannot be watched for: the listener is about to appear, so ask again shortly.
            threading.Event().wait(0.01)
            continue
        if not _same_user(sock):
            sock.close()
            raise LinkLost(f"{name} belongs to another user")
        return Channel(sock)


def _address(name: str) -> str:
    return "\0resilient_train/" + name


def _same_user(sock: socket.socket) -> bool:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1]) == os.getuid()
