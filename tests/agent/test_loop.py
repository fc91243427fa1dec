"""The agent's loop: timers in their order, what other threads ask for, and no timer that starves the rest."""

from __future__ import annotations

import os
import selectors
import threading

from resilient_train.agent.loop import Loop


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


def test_timers_come_in_the_order_of_their_times() -> None:
    """Of two at the same time the first that was asked for; none before its time."""
    clock, done = Hands(), []
    loop = Loop(clock)
    for name, at in (("late", 103.0), ("first", 101.0), ("second", 101.0)):
        loop.at(at, lambda n=name: done.append(n))
    loop.once(0.0)
    assert done == []
    clock.time = 102.0
    loop.once(0.0)
    assert done == ["first", "second"]


def test_what_a_timer_asks_for_at_once_waits_for_the_next_turn() -> None:
    """Descriptors get their turn between the two: a timer that is always due cannot starve them."""
    clock, done = Hands(), []
    loop = Loop(clock)
    read, write = os.pipe()
    loop.selector.register(read, selectors.EVENT_READ, lambda: done.append(os.read(read, 9)))

    def again() -> None:
        done.append(b"timer")
        os.write(write, b"x")
        loop.at(clock.now(), again)

    loop.at(clock.now(), again)
    for _ in range(3):
        loop.once(0.0)
    os.close(read)
    os.close(write)
    assert done == [b"timer", b"x", b"timer", b"x", b"timer"]


def test_every_goes_on_from_when_it_was_done() -> None:
    """After a long stop it is done once, and not for every time that was missed."""
    clock, done = Hands(), []
    loop = Loop(clock)
    loop.every(1.0, lambda: done.append(clock.now()))
    assert done == [100.0]
    for clock.time in (100.5, 101.0, 140.0, 140.5, 141.0):
        loop.once(0.0)
    assert done == [100.0, 101.0, 140.0, 141.0]


def test_a_word_from_another_thread_wakes_it() -> None:
    """`once` would wait for ever; what is posted is done on the loop's thread, in order, however much there is."""
    loop = Loop(Hands())
    done: list[tuple[int, int]] = []

    def ask() -> None:
        for number in range(100_000):  # More than the pipe that wakes the loop can hold.
            loop.post(lambda n=number: done.append((n, threading.get_ident())))

    asking = threading.Thread(target=ask)
    asking.start()
    while len(done) < 100_000:
        loop.once()
    asking.join()
    assert done == [(number, threading.get_ident()) for number in range(100_000)]
