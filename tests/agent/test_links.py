"""Lines between agents: who proves to know the secret is heard, who ends is refused, who lies is nobody."""

from __future__ import annotations

import contextlib
import resource
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from resilient_train.agent.links import Links

SECRET = secrets.token_hex(32)


class End:
    """One agent's lines, with a loop of its own."""

    def __init__(self, name: str, secret: str = SECRET) -> None:
        self.selector = selectors.DefaultSelector()
        self.heard: list[str] = []
        self.refused: list[str] = []
        self.links = Links(name, "127.0.0.1", secret, self.selector, self.heard.append, self.refused.append)

    def turn(self) -> None:
        for key, _ in self.selector.select(0.005):
            key.data()


@pytest.fixture
def ends() -> Iterator[dict[str, End]]:
    made = {name: End(name) for name in ("a", "b", "c")}
    yield made
    for end in made.values():
        if len(end.selector.get_map()):
            end.links.close()
        assert len(end.selector.get_map()) == 0
        end.selector.close()


def until(condition: Callable[[], object], *ends: End) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        for end in ends:
            end.turn()


def test_both_ends_hear_each_other(ends: dict[str, End]) -> None:
    """One of them calls; both hear the handshake, and each beat after it."""
    a, b = ends["a"], ends["b"]
    a.links.want({"b": b.links.address})
    until(lambda: a.heard and b.heard, a, b)
    a.heard.clear()
    b.heard.clear()
    a.links.beat()
    b.links.beat()
    until(lambda: a.heard == ["b"] and b.heard == ["a"], a, b)


def test_one_line_stays_where_both_call_at_once(ends: dict[str, End]) -> None:
    """Each beat is heard once, and neither takes the other line's end for a loss."""
    a, b = ends["a"], ends["b"]
    a.links.want({"b": b.links.address})
    b.links.want({"a": a.links.address})
    # A listener and one line.
    until(lambda: a.heard and b.heard and len(a.selector.get_map()) == len(b.selector.get_map()) == 2, a, b)
    for _ in range(3):
        a.heard.clear()
        b.heard.clear()
        a.links.beat()
        b.links.beat()
        until(lambda: a.heard and b.heard, a, b)
        for end in (a, b, a, b):
            end.turn()
        assert (a.heard, b.heard) == (["b"], ["a"])
    assert a.refused == b.refused == []
    a.links.close()
    until(lambda: b.refused == ["a"], b)


def test_an_end_that_is_gone_is_refused_at_once(ends: dict[str, End]) -> None:
    """The line breaks, the call that follows is refused: no time-out is waited for, and no beat."""
    a, c = ends["a"], ends["c"]
    a.links.want({"c": c.links.address})
    until(lambda: a.heard and c.heard, a, c)
    c.links.close()
    until(lambda: a.refused, a)
    assert set(a.refused) == {"c"}


def test_a_torn_line_is_mended(ends: dict[str, End]) -> None:
    """The connection ends and its agent does not: it is called again and heard again."""
    a, b = ends["a"], ends["b"]
    a.links.want({"b": b.links.address})
    until(lambda: a.heard and b.heard, a, b)
    a.heard.clear()
    for line in list(b.links._lines):
        b.links._drop(line)
    until(lambda: a.heard, a, b)
    assert a.refused == []


def test_somebody_elses_port_counts_as_gone(ends: dict[str, End]) -> None:
    """Whoever listens there now has another name or another secret: the agent that was called is not there."""
    a = ends["a"]
    for stranger in (End("someone"), End("c", secrets.token_hex(32))):
        a.refused.clear()
        a.links.want({"c": stranger.links.address})
        until(lambda: a.refused == ["c"], a, stranger)
        assert a.heard == []
        a.links.want({})
        stranger.links.close()
        stranger.selector.close()
    # The last one did not know the secret, and so has heard nobody.
    assert stranger.heard == []


def test_garbage_and_silence_do_no_harm(ends: dict[str, End]) -> None:
    """Who sends nonsense is dropped; who sends nothing is dropped after some beats; others are served meanwhile."""
    a, b = ends["a"], ends["b"]
    host, _, port = a.links.address.rpartition(":")
    with socket.create_connection((host, int(port))) as loud, socket.create_connection((host, int(port))) as mute:
        loud.sendall(secrets.token_bytes(1000))
        until(lambda: _closed(loud), a)
        b.links.want({"a": a.links.address})
        until(lambda: b.heard and a.heard, a, b)
        for _ in range(10):
            a.links.beat()
            b.links.beat()
            until(lambda: True, a, b)
            a.turn()
        until(lambda: _closed(mute), a)
    assert set(a.heard) == {"b"}


def test_who_answers_no_more_is_called_anew(ends: dict[str, End]) -> None:
    """A line on which nothing comes is given up after some beats, and a new call is made."""
    a, b = ends["a"], ends["b"]
    a.links.want({"b": b.links.address})
    until(lambda: a.heard and b.heard, a, b)
    old = a.links._lines[0]
    for _ in range(6):
        a.links.beat()
    assert old not in a.links._lines
    a.heard.clear()
    until(lambda: a.heard, a, b)


def _closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def test_strangers_hold_no_places(ends: dict[str, End]) -> None:
    """Many that say a byte now and then: only some are kept, none for longer than some beats; others are heard."""
    a, b = ends["a"], ends["b"]
    host, _, port = a.links.address.rpartition(":")
    strangers = [socket.create_connection((host, int(port))) for _ in range(100)]
    try:
        until(lambda: any(_closed(one) for one in strangers), a)
        assert len(a.links._lines) <= 64
        b.links.want({"a": a.links.address})
        until(lambda: b.heard and a.heard, a, b)
        for _ in range(6):
            for one in strangers:
                with contextlib.suppress(OSError):
                    one.send(b"x")
            until(lambda: True, a, b)
            a.links.beat()
            b.links.beat()
        until(lambda: all(_closed(one) for one in strangers), a, b)
    finally:
        for one in strangers:
            one.close()
    assert set(a.heard) == {"b"}


def test_without_descriptors_calls_wait_for_the_next_beat(ends: dict[str, End]) -> None:
    """The loop does not turn for a caller who cannot be taken; a call of our own that cannot be made is no error."""
    a, b = ends["a"], ends["b"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    b.links.want({"a": a.links.address})
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        until(lambda: not a.links._accepting, a)
        assert not a.selector.select(0.0)
        a.links.want({"c": "127.0.0.1:1"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    a.links.beat()
    until(lambda: a.heard and b.heard, a, b)
