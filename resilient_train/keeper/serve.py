"""Serve this node's images to other nodes, from threads of its own.

A connection that has not proved that it is of this job gets a short time and one of a few places, which it loses to
the next that comes; whatever it sends ends it at most.  A range is sent straight from shared memory, under the
slot's lock.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from resilient_train.errors import FormatError, LinkLost, OutsideError
from resilient_train.keeper.conduct import Conductor
from resilient_train.keeper.gather import answer_rows
from resilient_train.keeper.parities import Parities
from resilient_train.keeper.replicas import Replicas
from resilient_train.keeper.shelf import Shelf
from resilient_train.spec.peers import Declined, Fold, Gather, Held, ListHeld, Put, Range, Read, Report
from resilient_train.spec.world import Key
from resilient_train.storage.wire import Wire, accept

logger = logging.getLogger(__name__)

_PROOF_TIMEOUT = 5.0
"""Seconds for a client to prove itself."""
_STRANGERS = 32
"""Clients that may be about to prove themselves at the same time."""
_SEND_TIMEOUT = 15.0
"""Seconds for a client to take 8 MiB."""
_MOST_BYTES = 64 << 20
"""Bytes that can be asked for at once."""


class PeerServer:
    """Listens until the process ends."""

    def __init__(
        self,
        host: str,
        secret: bytes,
        shelf: Shelf,
        replicas: Replicas,
        parities: Parities,
        conductor: Conductor,
        chosen: Callable[[], Key | None],
    ) -> None:
        """Args:
        host: the address that other nodes know this one by.
        secret: the job's.
        shelf: what to serve.
        replicas: takes copies in.
        parities: takes pieces for parities in.
        conductor: hears reports.
        chosen: the state that this node makes durable at the end, once there is one.

        Raises:
            LinkLost: if nothing can listen there.
        """
        self._secret = secret
        self._shelf = shelf
        self._replicas = replicas
        self._parities = parities
        self._conductor = conductor
        self._chosen = chosen
        self._strangers: list[socket.socket] = []
        self._lock = threading.Lock()
        self.asked_at = 0.0
        """When a peer asked for something last, on the monotonic clock."""
        self._listener = _listen(host)
        port = self._listener.getsockname()[1]
        self.endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        threading.Thread(target=self._accept, name="peers", daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        _hang_up(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:
                    return
                logger.warning("a connection could not be taken: %s", error)
                time.sleep(0.1)  # Too many files are open, for instance.
                continue
            with self._lock:
                self._strangers.append(sock)
                if len(self._strangers) > _STRANGERS:
                    _hang_up(self._strangers.pop(0))  # Its thread closes it.
            threading.Thread(target=self._serve, args=(sock,), name="peer", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            wire = accept(sock, self._secret, _PROOF_TIMEOUT)
        except (LinkLost, OSError) as error:
            logger.info("a connection was refused: %s", error)
            sock.close()
            return
        finally:
            with self._lock, suppress(ValueError):
                self._strangers.remove(sock)
        try:
            self._answer(wire)
        except (LinkLost, FormatError, OutsideError, OSError, TypeError, ValueError) as error:
            # A peer that ended, or that talks nonsense: nobody but itself has a problem.
            logger.info("a connection to another node ended: %s", error)
        finally:
            self._conductor.hang_up(wire)
            wire.close()

    def _answer(self, wire: Wire) -> None:
        with ExitStack() as stack:
            window = _Window(self._shelf)
            stack.callback(window.close)
            while True:
                wire.patience(0.0)  # Keepalive finds who is gone.
                request = wire.receive()
                wire.patience(_SEND_TIMEOUT)
                self.asked_at = time.monotonic()
                match request:
                    case ListHeld():
                        chosen = self._chosen()
                        parities = [parity.row() for parity in self._shelf.parities()]
                        rows = self._shelf.rows()
                        wire.send(Held(images=rows, parities=parities, chosen=list(chosen) if chosen else None))
                    case Read(slot=slot, lineage=lineage, step=step, offset=offset, size=size):
                        self._send(wire, window, slot, Key(lineage, step), offset, size)
                    case Gather(slot=slot, lineage=lineage, step=step):
                        answer_rows(wire, window.look(slot, Key(lineage, step)), request)
                    case Put():
                        self._replicas.take(wire, request)
                    case Fold():
                        self._parities.take(wire, request)
                    case Report():
                        self._conductor.heard(wire, request)
                    case _:
                        raise FormatError(f"{request!r:.200} is not for a keeper")

    def _send(self, wire: Wire, window: _Window, slot: int, key: Key, offset: int, size: int) -> None:
        view = window.look(slot, key)
        if view is None:
            wire.send(Declined(reason="the image is gone"))
        elif not (0 <= offset <= offset + size <= len(view) and size <= _MOST_BYTES):
            wire.send(Declined(reason=f"no {size} bytes at {offset} of {len(view)}"))
        else:
            wire.send(Range(size=size), [view[offset : offset + size]])


class _Window:
    """The image that a connection reads: mapped and locked until it reads another, or hangs up."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._of: tuple[int, Key] | None = None
        self._view: memoryview | None = None
        self._stack = ExitStack()

    def look(self, slot: int, key: Key) -> memoryview | None:
        """The image's bytes; None if it is not there."""
        if self._of != (slot, key):
            self.close()
            view = self._stack.enter_context(self._shelf.reading(slot, key))
            self._view = view
            if view is None:
                self.close()
                return None
            self._of = (slot, key)
        return self._view

    def close(self) -> None:
        """Let go of it."""
        self._view = None
        self._of = None
        self._stack.close()


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # It was not connected, or not listening, any more.
        sock.shutdown(socket.SHUT_RDWR)


def _listen(host: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise LinkLost(f"{host} is no address: {error}") from error
    # An address that is translated on the way is nobody's here.
    for place in (host, "") if family == socket.AF_INET else (host, "::"):
        try:
            return socket.create_server((place, 0), family=family, backlog=128)
        except OSError as error:
            refused = error
    raise LinkLost(f"no keeper can listen on {host}: {refused}")
