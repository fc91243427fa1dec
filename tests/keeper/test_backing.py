"""Memory that is made before it is asked for, and not kept for those who are gone."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from resilient_train.keeper.backing import Backed, Backing

SIZE = 1 << 20


class Orders:
    """A `Backing`, and what it finishes."""

    def __init__(self) -> None:
        self._woken = threading.Semaphore(0)
        self.backing = Backing(self._woken.release)

    def next(self) -> Backed:
        """What is finished next."""
        assert self._woken.acquire(timeout=20)
        (backed,) = self.backing.finished()
        return backed

    def settle(self) -> None:
        """Wait until nothing is being made."""
        self.backing._pool.submit(lambda: None).result(20)


def held() -> int:
    return sum("resilient_train:" in os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if _there(entry))


def _there(entry: os.DirEntry[str]) -> bool:
    return os.path.islink(entry.path)


def test_what_will_be_asked_for_is_there_when_it_is() -> None:
    """Each order is answered once; the spares are of the size that was asked for last."""
    before, orders = held(), Orders()
    orders.backing.order("a", SIZE, 2)
    first = orders.next()
    assert os.fstat(first.descriptor).st_size == SIZE
    orders.settle()
    assert held() - before == 3
    orders.backing.order("a", SIZE, 1)
    second = orders.next()
    assert second.descriptor != first.descriptor
    orders.settle()
    assert held() - before == 3, "one spare is left, and no further one was made"
    orders.backing.order("a", 2 * SIZE, 0)
    third = orders.next()
    assert os.fstat(third.descriptor).st_size == 2 * SIZE
    assert held() - before == 3, "the spare of the size before is gone"
    for backed in (first, second, third):
        os.close(backed.descriptor)


def test_nothing_is_kept_for_who_is_gone() -> None:
    """Neither what lies ready nor what is being made at that time."""
    before, orders = held(), Orders()
    orders.backing.order("a", SIZE, 3)
    os.close(orders.next().descriptor)
    orders.backing.forget("a")
    orders.settle()
    assert held() == before


def test_memory_that_is_not_to_be_had_is_an_answer() -> None:
    """With the reason, for the one who asked; a spare that cannot be made is nobody's error."""
    orders = Orders()
    orders.backing.order("a", 1 << 60, 0)
    refused = orders.next()
    assert refused.descriptor == -1
    assert "refused" in refused.error


@pytest.mark.parametrize("call", ["memfd_create", "open"])
def test_a_keeper_without_descriptors_says_so(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whatever refuses, the order is answered, nothing is kept, and the next one is carried out."""
    before, orders = held(), Orders()

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        orders.backing.order("a", SIZE, 0)
        refused = orders.next()
    assert refused.descriptor == -1
    assert refused.error
    assert held() == before
    orders.backing.order("a", SIZE, 0)
    os.close(orders.next().descriptor)
