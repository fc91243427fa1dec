"""What several keepers write of one state is a checkpoint when all of it is there, and no keeper says so before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from resilient_train.errors import StorageError
from resilient_train.keeper.persist import Job, look, persist
from resilient_train.keeper.word import Word
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.commit import folder_of
from resilient_train.storage.filesystem import FilesystemTier

KEY = Key(1, 7)


class Unlisted(FilesystemTier):
    """Answers no listing once such a part is there."""

    def __init__(self, root: str, after: str = "part-") -> None:
        super().__init__(root)
        self._after = after

    def folders(self) -> dict[str, set[str]]:
        found = super().folders()
        if any(name.startswith(self._after) for names in found.values() for name in names):
            raise StorageError("503 slow down")
        return found


class Lagging(FilesystemTier):
    """Shows parts too late."""

    def folders(self) -> dict[str, set[str]]:
        return {
            folder: {name for name in names if not name.startswith("part-")}
            for folder, names in super().folders().items()
        }


def test_a_listing_that_fails_is_no_success(make: Callable[..., Job], tmp_path: Path) -> None:
    """Without the manifest there is no checkpoint, whatever was written; and what was written stays."""
    with pytest.raises(StorageError, match="503"):
        persist(Unlisted(str(tmp_path)), make([0, 1]))
    assert listing(FilesystemTier(str(tmp_path))) == ([], [KEY])


def test_a_keeper_needs_no_listing_for_its_own_part(make: Callable[..., Job], tmp_path: Path) -> None:
    """It knows what it has just written."""
    persist(Lagging(str(tmp_path)), make([0, 1]))
    assert listing(FilesystemTier(str(tmp_path))) == ([KEY], [])


def test_the_keeper_that_puts_the_last_part_commits(make: Callable[..., Job], tmp_path: Path) -> None:
    """Nobody says durable before the manifest is there."""
    tier = FilesystemTier(str(tmp_path))
    first = persist(tier, make([0]))
    assert not first.committed
    assert look(tier, tier.folders(), first.part, 3, Word()) is None
    assert listing(tier) == ([], [KEY])
    assert persist(tier, make([1])).committed
    assert look(tier, tier.folders(), first.part, 3, Word()) == KEY
    assert listing(tier) == ([KEY], [])


def test_where_the_last_keeper_died_behind_its_part_another_commits(make: Callable[..., Job], tmp_path: Path) -> None:
    """All parts are there: whoever sees them writes the same manifest, and removes what is superseded."""
    tier = FilesystemTier(str(tmp_path))
    persist(tier, make([0, 1], key=Key(1, 6)))
    first = persist(tier, make([0]))
    with pytest.raises(StorageError, match="503"):
        persist(Unlisted(str(tmp_path), after="part-00001"), make([1]))
    assert look(tier, tier.folders(), first.part, 1, Word()) == KEY
    assert listing(tier) == ([KEY], [])
    assert [file.rank for file in read_manifest(tier, KEY).files] == [0, 1]


def test_what_was_overtaken_is_waited_for_no_longer(make: Callable[..., Job], tmp_path: Path) -> None:
    """A newer state is durable; the others may have left this one out."""
    tier = FilesystemTier(str(tmp_path))
    first = persist(tier, make([0]))
    persist(tier, make([0, 1], key=Key(1, 9)))
    assert look(tier, tier.folders(), first.part, 3, Word()) == Key(1, 9)


def test_a_node_that_stands_in_for_another_writes_what_that_would_have(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    """Part by part, so that files of a node that was lost before the manifest fit to what is written in its place."""
    tier = FilesystemTier(str(tmp_path))
    whole = make([0, 1, 2, 3], world=4, alike=True)
    lost = replace(whole, images={rank: whole.images[rank] for rank in (2, 3)})
    theirs = persist(tier, lost).part
    written = persist(tier, whole)
    assert written.committed
    assert written.part.files[2:] == theirs.files
    assert written.part.files[:2] == read_manifest(tier, KEY).files[:2]
    tables = [file.table_crc for file in written.part.files]
    assert tables[0] == tables[2] != tables[1] == tables[3], "what the ranks of a node have in common is written once"


def test_a_keeper_that_fails_late_leaves_what_another_has_committed(make: Callable[..., Job], tmp_path: Path) -> None:
    """Its part is put, so the other may have taken it for granted, and removed the older ones."""
    persist(FilesystemTier(str(tmp_path)), make([0, 1], key=Key(1, 6), keep_last=1))
    other = make([1], keep_last=1)

    class Overtaken(FilesystemTier):
        """Another keeper commits, and then the place does not answer."""

        def put(self, path: str, chunks: Iterable[bytes | memoryview], size: int = 0) -> int:
            written = super().put(path, chunks, size)
            if "part-" in path:
                persist(FilesystemTier(str(tmp_path)), other)
                self.dead = True
            return written

        def folders(self) -> dict[str, set[str]]:
            if getattr(self, "dead", False):
                raise StorageError("503 slow down")
            return super().folders()

    with pytest.raises(StorageError, match="503"):
        persist(Overtaken(str(tmp_path)), make([0], keep_last=1))
    assert listing(FilesystemTier(str(tmp_path))) == ([KEY], [])


def test_without_the_stores_word_nothing_is_removed_and_nothing_committed(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    """Another world may have gone on from an older checkpoint; with the word again, what waited is committed."""
    tier, until = FilesystemTier(str(tmp_path)), [float("inf")]
    word = Word(lambda: until[0])
    for step in (3, 5):
        assert persist(tier, replace(make([0, 1], key=Key(1, step), keep_last=2), word=word)).committed
    until[0] = 0.0
    waiting = persist(tier, replace(make([0, 1], keep_last=1), word=word))
    assert not waiting.committed
    assert look(tier, tier.folders(), waiting.part, 1, word) is None
    assert listing(tier) == ([Key(1, 3), Key(1, 5)], [KEY])
    until[0] = float("inf")
    assert look(tier, tier.folders(), waiting.part, 1, word) == KEY
    assert listing(tier) == ([KEY], [])


def test_the_last_state_is_committed_without_the_stores_word_and_removes_nothing(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    """A job that ends because the store is lost loses nothing; nor does the one that may have taken over."""
    tier, word = FilesystemTier(str(tmp_path)), Word(lambda: 0.0)
    persist(tier, make([0, 1], key=Key(1, 3)))
    word.last = True
    assert persist(tier, replace(make([0, 1], keep_last=1), word=word)).committed
    assert listing(tier) == ([Key(1, 3), KEY], [])


def test_what_a_killed_keeper_has_left_of_an_upload_goes_with_the_next_commit(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    """No listing shows it, storage tells of it, and it costs room until somebody gives it up."""
    given_up = []

    class WithUploads(FilesystemTier):
        """Some uploads were begun."""

        def begun(self) -> set[str]:
            return {folder_of(Key(1, step)) for step in (1, KEY.step, KEY.step + 1)}

        def delete(self, folder: str) -> None:
            given_up.append(folder)

    assert persist(WithUploads(str(tmp_path)), make([0, 1])).committed
    assert given_up == [folder_of(Key(1, 1))]
