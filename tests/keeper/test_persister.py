"""The thread that writes: one outcome for each state, and a second for one that other nodes write too."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient_train.keeper import persister as persisting
from resilient_train.keeper.persist import Job, persist
from resilient_train.keeper.persister import Outcome, Persister
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing
from resilient_train.storage.filesystem import FilesystemTier

KEY = Key(1, 7)


class Heard:
    """A persister and what it says."""

    def __init__(self) -> None:
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.persister = Persister(self._outcomes.put)

    def next(self) -> tuple[Key, str, bool, bool]:
        """(state, error, awaited, late)."""
        outcome = self._outcomes.get(timeout=60)
        return outcome.job.key, outcome.error, outcome.awaited, outcome.late


def test_a_state_of_one_node_has_one_outcome(make: Callable[..., Job], tmp_path: Path) -> None:
    """It is durable, or it is not."""
    heard = Heard()
    heard.persister.submit(make([0, 1], url=str(tmp_path)))
    assert heard.next() == (KEY, "", False, False)
    (tmp_path / "blocked").write_text("")
    heard.persister.submit(make([0, 1], url=str(tmp_path / "blocked")))
    key, error, awaited, late = heard.next()
    assert key == KEY
    assert error
    assert not awaited
    assert not late


def test_while_others_write_the_next_state_is_written(make: Callable[..., Job], tmp_path: Path) -> None:
    """Whoever has put its part is free; it hears of the manifest when that is there."""
    heard = Heard()
    heard.persister.submit(make([0], url=str(tmp_path)))
    heard.persister.submit(make([0], key=Key(1, 8), url=str(tmp_path)))
    assert heard.next() == (KEY, "", True, False)
    assert heard.next() == (Key(1, 8), "", True, False)
    persist(FilesystemTier(str(tmp_path)), make([1]))
    assert heard.next() == (KEY, "", False, True)
    persist(FilesystemTier(str(tmp_path)), make([1], key=Key(1, 8)))
    assert heard.next() == (Key(1, 8), "", False, True)


def test_a_state_that_others_left_out_is_not_durable(make: Callable[..., Job], tmp_path: Path) -> None:
    """It is waited for until a newer one is."""
    heard = Heard()
    heard.persister.submit(make([0], url=str(tmp_path)))
    assert heard.next() == (KEY, "", True, False)
    persist(FilesystemTier(str(tmp_path)), make([0, 1], key=Key(1, 9)))
    assert heard.next() == (KEY, f"{Key(1, 9)} is newer", False, True)


def test_a_state_that_others_never_complete_is_not_durable(
    make: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said after a while, and what is there is left to them."""
    monkeypatch.setattr(persisting, "_OTHERS", 0.0)
    heard = Heard()
    heard.persister.submit(make([0], url=str(tmp_path)))
    assert heard.next() == (KEY, "", True, False)
    key, error, awaited, late = heard.next()
    assert (key, awaited, late) == (KEY, False, True)
    assert "1 of 2 ranks are written" in error
    persist(FilesystemTier(str(tmp_path)), make([1]))
    assert listing(FilesystemTier(str(tmp_path))) == ([KEY], [])
