"""A proxy before a real HTTP server that refuses, hangs up or stalls as it is told."""

from __future__ import annotations

import re
import selectors
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

Fault = Callable[[str, str], "str | None"]
"""(method, target) -> None to pass the request on, a status such as ``503 Slow Down`` to answer with that,
``drop`` to hang up in the middle of it, ``stall`` to say nothing until the proxy closes or the fault ends."""
_PIECE = 1 << 16


class FaultyServer:
    """A context manager; ``url`` leads through it.

    Args:
        upstream: host:port of the real server.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.removeprefix("http://").rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._healthy = threading.Event()
        self._healthy.set()
        self._fault: Fault = _no_fault
        self._threads: list[threading.Thread] = []
        self.hurt = 0
        """Requests that were not passed on as they came."""
        self.answered = 0
        """Bytes that came from the real server, heads of answers included."""
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def break_with(self, fault: Fault) -> None:
        """From now on."""
        self._healthy.clear()
        self._fault = fault

    def heal(self) -> None:
        """Pass everything on; who is stalled is hung up on."""
        self._fault = _no_fault
        self._healthy.set()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._healthy.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10.0)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                self._request(client)
            except OSError:
                return  # Either end has hung up, which ends the exchange.

    def _request(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = client.recv(_PIECE)
            if not piece:
                return
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        fault = self._fault(method, target)
        self.hurt += fault is not None
        if fault == "stall":
            self._healthy.wait()
            return
        if fault is not None and fault != "drop":
            _refuse(client, fault)
            return
        # One request a connection: what comes after it must be judged anew.
        head = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.IGNORECASE) + b"\r\nConnection: close\r\n\r\n"
        with socket.create_connection(self._upstream) as server:
            if fault == "drop" and re.search(rb"\r\nexpect:", head, re.IGNORECASE):
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body += client.recv(_PIECE)
            server.sendall(head + body)
            if fault != "drop":
                self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while not self._over.is_set():
                for key, _ in selector.select(0.5):
                    source, other = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    data = source.recv(_PIECE)
                    if not data:
                        return
                    self.answered += len(data) if source is server else 0
                    other.sendall(data)


def _no_fault(method: str, target: str) -> str | None:
    del method, target
    return None


def _refuse(client: socket.socket, status: str) -> None:
    code = status.split(" ", 1)[1].replace(" ", "")
    body = f"<Error><Code>{code}</Code><Message>{status}</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    client.sendall(head.encode() + b"\r\n" + body)
    # Closing with unread data would reset the connection before the answer is read.
    client.shutdown(socket.SHUT_WR)
    client.settimeout(1.0)
    while client.recv(_PIECE):
        continue
