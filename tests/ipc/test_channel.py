"""Channels: whole messages, descriptors with the message they belong to, clear ends."""

from __future__ import annotations

import os
import socket
import threading
import uuid

import pytest

from resilient_train.errors import LinkLost
from resilient_train.ipc.channel import Channel, Listener, connect
from resilient_train.spec.messages import Deposit, Flushed, Withdraw


def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(one), Channel(other)


def test_descriptors_stay_with_their_message() -> None:
    """Messages with and without descriptors, read in one go."""
    one, other = pair()
    fd = os.memfd_create("test")
    one.send(Withdraw(slot=1))
    one.send(Deposit(slot=2, owner="a"), [fd])
    one.send(Withdraw(slot=3))
    one.send(Deposit(slot=4, owner="a"), [fd, fd])
    received = other.pending()
    while len(received) < 4:
        received += other.pending()
    assert [len(descriptors) for _, descriptors in received] == [0, 1, 0, 2]
    assert [message.slot for message, _ in received] == [1, 2, 3, 4]  # type: ignore[attr-defined]
    for _, descriptors in received:
        for descriptor in descriptors:
            os.close(descriptor)
    os.close(fd)
    one.close()
    other.close()


def test_large_messages_arrive_whole() -> None:
    """Longer than any socket buffer."""

    one, other = pair()
    text = "x" * 3_000_000
    thread = threading.Thread(target=lambda: one.send(Flushed(text=text)))
    thread.start()
    received = other.receive(20.0)
    thread.join()
    assert received is not None
    assert received[0] == Flushed(text=text)
    one.close()
    other.close()


def test_the_last_words_of_a_peer_are_heard_before_its_end() -> None:
    """What was sent before hanging up is delivered; then LinkLost."""
    one, other = pair()
    one.send(Flushed(text="bye"))
    one.close()
    assert [message for message, _ in other.pending()] == [Flushed(text="bye")]
    with pytest.raises(LinkLost):
        other.pending()
    with pytest.raises(LinkLost):
        other.send(Flushed(text="x"))
    other.close()


def test_an_address_belongs_to_one_listener() -> None:
    """A second listener is refused; without one, connecting fails in time."""
    name = f"test-{uuid.uuid4().hex}"
    with pytest.raises(LinkLost, match=name):
        connect(name, 0.05)
    listener = Listener(name)
    with pytest.raises(LinkLost):
        Listener(name)
    client = connect(name, 1.0)
    server = listener.accept()
    assert server is not None
    client.send(Flushed(text="hello"))
    assert server.receive(5.0) == (Flushed(text="hello"), [])
    for each in (client, server, listener):
        each.close()


def test_posting_never_waits_for_a_reader() -> None:
    """An agent must not stand still because a worker does; everything arrives once it reads again."""
    one, other = pair()
    texts = [f"{number}" + "x" * 100_000 for number in range(40)]
    for text in texts:
        one.post(Flushed(text=text))
    received = []
    while len(received) < len(texts):
        received += [message for message, _ in other.pending()]
        one.push()
    assert received == [Flushed(text=text) for text in texts]
    assert one.push()
    one.close()
    other.close()


def test_a_reader_that_never_reads_is_given_up() -> None:
    """What waits for it is bounded."""
    one, other = pair()

    def flood() -> None:
        for _ in range(100):
            one.post(Flushed(text="x" * 1_000_000))

    with pytest.raises(LinkLost, match="does not read"):
        flood()
    one.close()
    other.close()
