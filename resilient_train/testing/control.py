"""The conformance suite of `ControlStore`: subclass it, provide ``store``, and run it with pytest."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from resilient_train.control.store import ControlStore, News
from resilient_train.errors import StoreLost
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord


def record(revision: int, **changes: object) -> WorldRecord:
    """A record of one member at a revision."""
    base = WorldRecord(revision=1, generation=1, members=("n/0.0",), bootstrap="h:1", reason="test")
    fields: dict[str, object] = {"revision": revision, **changes}
    for name, value in fields.items():
        object.__setattr__(base, name, value)
    return base


class _Newer(NodeInfo):
    """What an agent of a later version might announce."""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "mood": "good"}


class _Broken(NodeInfo):
    """What nobody can read."""

    def to_json(self) -> dict[str, Any]:
        return {"node": self.node}


class ControlStoreConformance(ABC):
    """Every implementation of `ControlStore` passes this."""

    ttl = 1.0
    """Seconds after which announcements expire; `store` passes it on."""

    @abstractmethod
    def store(self) -> ControlStore:
        """A new client of the same, initially empty store; called once per client that a test needs."""

    def test_there_is_no_record_before_the_first(self) -> None:
        """An empty store has no record."""
        assert self.store().look().record is None

    def test_a_swap_is_seen_by_everybody(self) -> None:
        """What one client swaps in, another loads."""
        one, other = self.store(), self.store()
        assert one.swap(record(1)) == record(1)
        assert other.look().record == record(1)
        assert other.swap(record(2, reason="next")) == record(2, reason="next")
        assert one.look().record == record(2, reason="next")

    def test_the_newest_revision_can_be_asked_for(self) -> None:
        """Whoever asks hears of every swap that ended before; none is 0."""
        one, other = self.store(), self.store()
        assert other.revision() == 0
        for revision in (1, 2, 3):
            one.swap(record(revision))
            assert (one.revision(), other.revision()) == (revision, revision)

    def test_who_swaps_second_gets_the_firsts_record(self) -> None:
        """Compare-and-swap: a revision is written once."""
        one, other = self.store(), self.store()
        assert one.swap(record(1, reason="mine")).reason == "mine"
        assert other.swap(record(1, reason="theirs")).reason == "mine"
        assert one.look().record == record(1, reason="mine")

    def test_an_announcement_that_nobody_understands_is_skipped(self) -> None:
        """The others' and the record are news all the same; fields of a newer version are left out."""
        one, other = self.store(), self.store()
        one.swap(record(1))
        one.announce(_Newer(node="a", order=one.join(), endpoint="h:1", slots=1))
        other.announce(_Broken(node="b", order=other.join(), endpoint="h:1", slots=1))
        news = one.look()
        assert news.record == record(1)
        assert [node.node for node in news.nodes] == ["a"]
        assert len(news.unreadable) == 1

    def test_of_many_proposers_one_wins(self) -> None:
        """All see the same winner."""
        first = self.store()
        first.swap(record(1))
        clients = [self.store() for _ in range(6)]
        won: list[str] = []

        def propose(index: int) -> None:
            won.append(clients[index].swap(record(2, reason=f"proposal {index}")).reason)

        threads = [threading.Thread(target=propose, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loaded = first.look().record
        assert loaded is not None
        assert set(won) == {loaded.reason}

    def test_a_revision_cannot_be_skipped(self) -> None:
        """A proposal that does not follow the newest record loses to it."""
        store = self.store()
        store.swap(record(1))
        assert store.swap(record(5)) == record(1)
        assert store.look().record == record(1)

    def test_old_revisions_cannot_be_written_again(self) -> None:
        """A proposer that slept through many changes gets the newest record, however old its revision is."""
        store = self.store()
        for revision in range(1, 60):
            store.swap(record(revision))
        for revision in (2, 30, 59):
            assert store.swap(record(revision, reason="late")).reason == "test"
        assert store.look().record == record(59)

    def test_an_answer_that_got_lost_can_be_asked_for_again(self) -> None:
        """The same record swapped twice: the second call says that the first had won."""
        store = self.store()
        assert store.swap(record(1)) == record(1)
        assert store.swap(record(1)) == record(1)

    def test_a_watch_ends_with_the_next_change_or_in_time(self) -> None:
        """watch returns what is newer, at once if it is already there, and None (or nothing new) after its timeout."""
        store, other = self.store(), self.store()
        store.swap(record(1))
        before = store.look()
        quiet = store.watch(before.number, 0.05)
        assert quiet is None or quiet.record == record(1)
        heard: list[News | None] = []
        thread = threading.Thread(target=lambda: heard.append(store.watch(before.number, 30.0)))
        thread.start()
        other.swap(record(2))
        thread.join(30.0)
        assert heard[0] is not None
        assert heard[0].record == record(2)
        assert heard[0].number > before.number
        again = store.watch(before.number, 30.0)
        assert again is not None
        assert again.record == record(2)

    def test_nodes_get_numbers(self) -> None:
        """join numbers nodes in the order in which they come."""
        one, other = self.store(), self.store()
        assert (one.join(), other.join(), one.join()) == (0, 1, 2)

    def test_the_secret_is_the_same_for_all(self) -> None:
        """Whoever asks first makes it; 64 hexadecimal digits."""
        one, other = self.store(), self.store()
        assert one.secret() == other.secret()
        assert len(bytes.fromhex(one.secret())) == 32

    def test_an_announcement_is_news_to_the_others(self) -> None:
        """Published, replaced, withdrawn: each ends a watch, and look says what stands."""
        one, other = self.store(), self.store()
        info = node(one.join())
        number = other.look().number
        for said in (info, replace(info, slots=5)):
            one.announce(said)
            news = other.watch(number, 30.0)
            assert news is not None
            assert news.nodes == (said,)
            number = news.number
        one.withdraw()
        wait_for(lambda: other.look().nodes == (), 30.0)

    def test_an_announcement_expires_without_signs_of_life(self) -> None:
        """Who falls silent is gone after `ttl`, whoever watches hears of it; a beat brings it back."""
        one, other, watcher = self.store(), self.store(), self.store()
        lively, silent = node(one.join()), node(other.join())
        one.announce(lively)
        other.announce(silent)
        wait_for(lambda: watcher.look().nodes == (lively, silent), 30.0)
        number = watcher.look().number
        left: tuple[NodeInfo, ...] = (lively, silent)
        deadline = time.monotonic() + 30.0
        while left != (lively,):
            assert time.monotonic() < deadline
            one.beat()
            news = watcher.watch(number, self.ttl / 4)
            if news is not None:
                number, left = news.number, news.nodes
        other.beat()

        def both() -> bool:
            one.beat()
            return watcher.look().nodes == (lively, silent)

        wait_for(both, 30.0)

    def test_what_is_closed_is_closed(self) -> None:
        """Again is harmless, and nothing is answered any more."""
        store = self.store()
        store.swap(record(1))
        store.close()
        store.close()
        try:
            store.look()
        except StoreLost:
            return
        raise AssertionError("it answered")


def node(order: int) -> NodeInfo:
    """An announcement."""
    return NodeInfo(node=f"n{order}", order=order, endpoint="h:2", slots=2)


def wait_for(condition: Callable[[], bool], timeout: float) -> None:
    """Look again and again."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
