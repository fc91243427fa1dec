"""The members of a job's own etcd find each other before there is an etcd.

A member without data listens where its etcd will: one line of JSON is asked, one answered.  Whoever gets another
answer, or none, does not speak to a member that waits.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

_PATIENCE = 0.5
"""Seconds for a question and its answer."""
_LONGEST = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The founding of a cluster."""

    token: str
    """Made at random: no two foundings are taken for one."""
    members: tuple[int, ...]
    """Places of the founders in the list."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From the fields of an offer; raises ValueError, KeyError or TypeError if it is none."""
        members = tuple(data["members"])
        if not all(type(one) is int for one in members):
            raise ValueError("members are numbers of places")
        return cls(token=str(data["token"]), members=members)


class Waiting:
    """A member that has nothing yet: it says so to others, and takes the first offer."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Listen at an address; raises OSError if that cannot be done."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._server = socket.create_server(address, family=family)
        self._lock = threading.Lock()
        self._offer: Offer | None = None
        self._closed = False
        threading.Thread(target=self._serve, name="etcd founding", daemon=True).start()

    def taken(self, own: Offer | None = None) -> Offer | None:
        """The offer that this member takes part in; ``own`` if there is none yet."""
        with self._lock:
            self._offer = self._offer or own
            return self._offer

    def close(self) -> None:
        """Leave the address to etcd."""
        with self._lock:
            self._closed = True
        try:
            self._server.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                try:
                    self._answer(connection)
                except (OSError, ValueError, KeyError, TypeError):
                    # Not one of us, or no longer there.
                    pass

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_PATIENCE)
        asked = _line(connection)
        with self._lock:
            free = self._offer is None and not self._closed
            if "offer" in asked and free:
                self._offer = Offer.from_json(asked["offer"])
        connection.sendall(json.dumps({"waiting": free}).encode() + b"\n")


def waits(address: tuple[str, int], offer: Offer | None = None) -> bool:
    """Whether the member at an address waits for a founding; with an ``offer``: whether it takes it."""
    asked = {} if offer is None else {"offer": {"token": offer.token, "members": offer.members}}
    try:
        with socket.create_connection(address, _PATIENCE) as connection:
            connection.settimeout(_PATIENCE)
            connection.sendall(json.dumps(asked).encode() + b"\n")
            return _line(connection).get("waiting") is True
    except (OSError, ValueError):
        return False


def _line(connection: socket.socket) -> dict[str, Any]:
    data = b""
    while b"\n" not in data and len(data) < _LONGEST:
        more = connection.recv(_LONGEST)
        if not more:
            break
        data += more
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
