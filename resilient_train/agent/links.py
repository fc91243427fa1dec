"""Lines between agents: whether the others are there, heard at once when they end and soon when they fall silent.

One TCP connection for each pair that wants to hear from each other, in the agent's event loop, never blocking.  Both
ends prove that they know the job's secret; then each says a byte now and then.  When a line breaks the other end is
called again at once: a refusal tells a dead agent from a torn connection.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import secrets
import selectors
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_NONCE = 16
_NAME = 64
_HELLO = _NONCE + _NAME
_PROOF = 32
_BEAT = b"."
_PATIENCE = 3
"""Beats after which a line on which nothing comes is given up: across a mended network a new one is faster."""
_STRANGERS = 64
"""Callers that may be about to prove themselves; the oldest makes room for the next."""


@dataclass
class _Line:
    """One connection; ``node`` is empty until the other end has proved who it is."""

    sock: socket.socket
    called: str
    """The node that was called; empty if it called us."""
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE))
    received: bytearray = field(default_factory=bytearray)
    greeting: bytes = b""
    node: str = ""
    quiet: int = 0
    """Beats of ours since something came; until the other end has proved itself, since the line began."""


class Links:
    """This agent's lines to others."""

    def __init__(
        self,
        me: str,
        host: str,
        secret: str,
        selector: selectors.BaseSelector,
        heard: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> None:
        """Listens.

        Args:
            me: this node's id, at most 64 bytes.
            host: the address to listen at.
            secret: the job's.
            selector: the event loop's; its keys' data are called.
            heard: told of a sign of life of a node.
            refused: told that nobody of this job listens where a node's agent did.

        Raises:
            OSError: if the address is not this machine's.
        """
        self._me = me.encode()[:_NAME]
        self._key = bytes.fromhex(secret)
        self._selector = selector
        self._heard = heard
        self._refused = refused
        self._lines: list[_Line] = []
        self._wanted: dict[str, str] = {}
        self._refusing: set[str] = set()
        self._listener = socket.create_server((host, 0), backlog=128)
        self._listener.setblocking(False)
        self._accepting = False
        self._listen()
        self.address = f"{host}:{self._listener.getsockname()[1]}"

    def want(self, nodes: Mapping[str, str]) -> None:
        """Keep lines to these nodes (id to host:port), and let go of those to nodes that we have called and others."""
        self._wanted = dict(nodes)
        for line in [line for line in self._lines if line.called and line.called not in nodes]:
            self._drop(line)
        self._call_missing()

    def beat(self) -> None:
        """Say that this agent lives, and call again whoever has no line."""
        self._refusing.clear()
        self._listen()
        for line in list(self._lines):
            line.quiet += 1
            if line.quiet > _PATIENCE:
                self._drop(line)
            elif line.node:
                self._send(line, _BEAT)
        self._call_missing()

    def close(self) -> None:
        """Hang up."""
        self._wanted = {}
        for line in list(self._lines):
            self._drop(line)
        self._pause()
        self._listener.close()

    # ---- calling ----------------------------------------------------------------------------------------------------

    def _call_missing(self) -> None:
        known = {line.node for line in self._lines} | {line.called for line in self._lines}
        for node, address in self._wanted.items():
            if node not in known and node not in self._refusing:
                self._call(node, address)

    def _call(self, node: str, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        except OSError:
            self._refusing.add(node)  # Too many files are open; perhaps fewer at the next beat.
            return
        sock.setblocking(False)
        line = _Line(sock, node)
        self._lines.append(line)
        try:
            result = sock.connect_ex((host, int(port)))
        except (OSError, ValueError):
            result = errno.EINVAL
        if result not in (0, errno.EINPROGRESS):
            self._failed(line, result)
            return
        self._selector.register(sock, selectors.EVENT_WRITE, lambda: self._connected(line))

    def _connected(self, line: _Line) -> None:
        if line not in self._lines:
            return  # Dropped by what else happened in the same moment.
        result = line.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if result:
            self._selector.unregister(line.sock)
            self._failed(line, result)
            return
        self._begin(line)

    def _failed(self, line: _Line, result: int) -> None:
        self._lines.remove(line)
        line.sock.close()
        # Not again before the next beat: whoever wants it asks again at once, and it would be refused at once.
        self._refusing.add(line.called)
        if result == errno.ECONNREFUSED and line.called in self._wanted:
            self._refused(line.called)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._pause()  # The caller waits in the queue; without this the loop would turn for nothing but it.
            return
        strangers = [line for line in self._lines if not line.called and not line.node]
        for line in strangers[: max(0, len(strangers) - _STRANGERS + 1)]:
            self._drop(line)
        sock.setblocking(False)
        line = _Line(sock, "")
        self._lines.append(line)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._read(line))
        self._begin(line, registered=True)

    def _listen(self) -> None:
        if not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._accepting = True

    def _pause(self) -> None:
        """Take no calls before the next beat."""
        if self._accepting:
            self._selector.unregister(self._listener)
            self._accepting = False

    def _begin(self, line: _Line, registered: bool = False) -> None:
        if not registered:
            self._selector.modify(line.sock, selectors.EVENT_READ, lambda: self._read(line))
        line.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send(line, line.nonce + self._me.ljust(_NAME, b"\0"))

    # ---- talking ----------------------------------------------------------------------------------------------------

    def _send(self, line: _Line, data: bytes) -> None:
        try:
            line.sock.send(data)
        except BlockingIOError:
            # It has not read for a long time; what it would read is old news.
            return
        except OSError:
            self._broke(line)

    def _read(self, line: _Line) -> None:
        if line not in self._lines:
            return
        try:
            data = line.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._broke(line)
            return
        if line.node:
            line.quiet = 0
            self._heard(line.node)
            return
        line.received += data
        self._shake_hands(line)

    def _shake_hands(self, line: _Line) -> None:
        """Each end proves that it knows the secret, for the nonce that the other one chose."""
        if not line.greeting and len(line.received) >= _HELLO:
            line.greeting = bytes(line.received[:_HELLO])
            self._send(line, self._proof(line.greeting[:_NONCE], self._me, caller=bool(line.called)))
        if line in self._lines and line.greeting and len(line.received) >= _HELLO + _PROOF:
            name = line.greeting[_NONCE:].rstrip(b"\0")
            given = bytes(line.received[_HELLO : _HELLO + _PROOF])
            right = self._proof(line.nonce, name, caller=not line.called)
            node = name.decode(errors="replace")
            if not hmac.compare_digest(given, right) or (line.called and node != line.called):
                # Somebody else's port by now.
                called = line.called
                self._drop(line)
                if called:
                    self._refused(called)
                return
            line.node, line.quiet = node, 0
            self._drop_double(line)
            self._heard(node)

    def _drop_double(self, proved: _Line) -> None:
        """Where both ends called each other at once, the line stays that the one with the smaller name called."""
        ours = self._me.decode(errors="replace") < proved.node
        if bool(proved.called) == ours:
            for line in list(self._lines):
                if proved.node in (line.node, line.called) and bool(line.called) != ours:
                    self._drop(line)

    def _proof(self, nonce: bytes, name: bytes, *, caller: bool) -> bytes:
        return hmac.new(self._key, (b"caller" if caller else b"called") + nonce + name, hashlib.sha256).digest()

    def _broke(self, line: _Line) -> None:
        """The other end hung up or ended: call it again, which tells."""
        if line not in self._lines:
            return
        node = line.node
        self._drop(line)
        if node in self._wanted and not any(node in (other.node, other.called) for other in self._lines):
            self._call(node, self._wanted[node])

    def _drop(self, line: _Line) -> None:
        if line in self._lines:
            self._lines.remove(line)
            with contextlib.suppress(KeyError):
                self._selector.unregister(line.sock)
            line.sock.close()
