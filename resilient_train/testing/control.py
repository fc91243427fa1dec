"""The conformance suite of `ControlStore`: subclass it, provide ``store``, and run it with pytest."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from resilient_train.control.store import ControlStore
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import WorldRecord


def record(revision: int, **changes: object) -> WorldRecord:
    """A record of one member at a revision."""
    base = WorldRecord(revision=1, generation=1, members=("n/0.0",), bootstrap="h:1", reason="test")
    fields: dict[str, object] = {"revision": revision, **changes}
    for name, value in fields.items():
        object.__setattr__(base, name, value)
    return base


class ControlStoreConformance(ABC):
    """Every implementation of `ControlStore` passes this."""

    @abstractmethod
    def store(self) -> ControlStore:
        """A new client of the same, initially empty store; called once per client that a test needs."""

    def test_there_is_no_record_before_the_first(self) -> None:
        """An empty store has no record."""
        assert self.store().load() is None

    def test_a_swap_is_seen_by_everybody(self) -> None:
        """What one client swaps in, another loads."""
        one, other = self.store(), self.store()
        assert one.swap(record(1)) == record(1)
        assert other.load() == record(1)
        assert other.swap(record(2, reason="next")) == record(2, reason="next")
        assert one.load() == record(2, reason="next")

    def test_who_swaps_second_gets_the_firsts_record(self) -> None:
        """Compare-and-swap: a revision is written once."""
        one, other = self.store(), self.store()
        assert one.swap(record(1, reason="mine")).reason == "mine"
        assert other.swap(record(1, reason="theirs")).reason == "mine"
        assert one.load() == record(1, reason="mine")

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
        loaded = first.load()
        assert loaded is not None
        assert set(won) == {loaded.reason}

    def test_a_revision_cannot_be_skipped(self) -> None:
        """A proposal that does not follow the newest record loses to it."""
        store = self.store()
        store.swap(record(1))
        assert store.swap(record(5)) == record(1)
        assert store.load() == record(1)

    def test_old_revisions_cannot_be_written_again(self) -> None:
        """A proposer that slept through many changes gets the newest record, however old its revision is."""
        store = self.store()
        for revision in range(1, 60):
            store.swap(record(revision))
        for revision in (2, 30, 59):
            assert store.swap(record(revision, reason="late")).reason == "test"
        assert store.load() == record(59)

    def test_a_watch_ends_with_the_next_version_or_in_time(self) -> None:
        """watch returns the newer record, at once if it is already there, and None after its timeout."""
        store, other = self.store(), self.store()
        store.swap(record(1))
        assert store.watch(1, 0.05) is None
        heard: list[WorldRecord | None] = []
        thread = threading.Thread(target=lambda: heard.append(store.watch(1, 30.0)))
        thread.start()
        other.swap(record(2))
        thread.join(30.0)
        assert heard == [record(2)]
        assert store.watch(1, 30.0) == record(2)

    def test_nodes_get_numbers_and_are_counted_alive(self) -> None:
        """join numbers nodes in order; every announcement is a sign of life."""
        one, other = self.store(), self.store()
        assert (one.join(), other.join()) == (0, 1)
        info = NodeInfo(node="b", order=1, endpoint="h:2", slots=2)
        other.announce(info)
        ((seen, beat),) = one.nodes()
        assert seen == info
        other.announce(info)
        ((_, later),) = one.nodes()
        assert later > beat
