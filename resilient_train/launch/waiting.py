"""Before the job begins: what is waited for is said, and a signal ends the wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_FIRST, _AGAIN = 3.0, 60.0
"""Seconds until it is said for the first time what is waited for, and until it is said again."""
_ALWAYS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal came while there was no job here that could end well; the message names it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals raise `Interrupted` in the main thread, where nobody else takes them.

    Raises:
        Interrupted: when one comes.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    # Under nohup the end of the terminal is to be ignored; a shell has jobs in the background ignore SIGINT, too, but
    # who sends it to one of them means it.
    heeded = [*_ALWAYS, *(() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,))]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def said(
    what: str, say: Callable[[str], None], first: float = _FIRST, again: float = _AGAIN
) -> Iterator[Callable[[str], None]]:
    """Say that ``what`` is waited for, if the context takes long, and once in a while from then on; yields what takes
    the newest cause.

    Args:
        what: for people.
        say: prints it; from a thread of its own.
        first: seconds until then.
        again: seconds until the next time.
    """
    over = threading.Event()
    cause = ""

    def because(text: str) -> None:
        nonlocal cause
        cause = text

    def run() -> None:
        pause = first
        while not over.wait(pause):
            say(f"waiting for {what}" + (f": {cause}" if cause else ""))
            pause = again

    thread = threading.Thread(target=run, name="waiting", daemon=True)
    thread.start()
    try:
        yield because
    finally:
        over.set()
        thread.join()
