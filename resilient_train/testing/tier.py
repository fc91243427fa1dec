"""The conformance suite of `Tier`: subclass it, provide ``tier``, and run it with pytest."""

from __future__ import annotations

import errno
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator

import pytest

from resilient_train.errors import CheckpointDamaged, StorageError
from resilient_train.storage.tier import Tier


class TierConformance(ABC):
    """Every implementation of `Tier` passes this."""

    @abstractmethod
    def tier(self) -> Tier:
        """The tier under test, empty when a test begins; every call gives one that sees the same files."""

    @abstractmethod
    def refusing(self) -> Tier:
        """A tier whose storage answers with errors."""

    def test_a_place_that_cannot_be_looked_at_is_not_empty(self) -> None:
        """Whoever took an error for "nothing is there" would start over on top of what is."""
        with pytest.raises(StorageError):
            self.refusing().folders()

    def test_an_empty_tier_has_no_folders(self) -> None:
        """A place that does not exist yet is empty, not an error."""
        assert self.tier().folders() == {}

    def test_what_is_put_can_be_read(self) -> None:
        """Whole files and ranges, through another handle."""
        assert self.tier().put("a/x", [b"hello ", memoryview(b"world"), b""]) == 11
        other = self.tier()
        assert other.size("a/x") == 11
        assert other.read("a/x", 0, 11) == b"hello world"
        assert other.read("a/x", 6, 3) == b"wor"
        assert other.read("a/x", 11, 0) == b""
        assert other.folders() == {"a": {"x"}}

    def test_a_file_of_this_machine_has_a_handle(self) -> None:
        """And no other; what goes wrong with it, the file missing or at its end, is the tier's error."""
        tier = self.tier()
        tier.put("a/x", [b"hello world"])
        with tier.handle("a/x") as handle:
            assert (handle is not None) == tier.local
            assert handle is None or os.pread(handle, 3, 6) == b"wor"
        if handle is None:
            return
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pread(handle, 1, 0)
        with pytest.raises(CheckpointDamaged, match=r"a/y.*missing"), tier.handle("a/y"):
            pass
        with pytest.raises(CheckpointDamaged, match=r"a/x.*truncated"), tier.handle("a/x"):
            raise EOFError
        with pytest.raises(StorageError, match=r"a/x.*Input/output"), tier.handle("a/x"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with pytest.raises(ValueError, match="mine"), tier.handle("a/x"):
            raise ValueError("mine")

    def test_large_chunks_of_any_alignment_arrive(self) -> None:
        """Whatever is written directly, gathered first or split: the file is the chunks one after the other."""
        whole = memoryview(bytes(range(251)) * 100_000)
        cuts = (0, 4096, 4097, 9_000_000, 9_004_096, 17_500_000, len(whole))
        chunks = [whole[a:b] for a, b in itertools.pairwise(cuts)]
        assert self.tier().put("a/x", chunks) == len(whole)
        assert self.tier().read("a/x", 0, len(whole)) == whole

    def test_a_listing_is_not_remembered(self) -> None:
        """What was written after one is there, and as long as it is."""
        tier = self.tier()
        tier.put("a/x", [b"1"])
        assert tier.folders() == {"a": {"x"}}
        tier.put("a/y", [b"12"])
        tier.put("a/x", [b"123"])
        assert (tier.size("a/x"), tier.size("a/y")) == (3, 2)
        assert tier.folders() == {"a": {"x", "y"}}

    def test_reading_beyond_the_end_names_the_file(self) -> None:
        """Fewer bytes than asked for are damage, not data."""
        tier = self.tier()
        tier.put("a/x", [b"123"])
        with pytest.raises(CheckpointDamaged, match="a/x"):
            tier.read("a/x", 1, 3)
        with pytest.raises(CheckpointDamaged, match="a/y"):
            tier.size("a/y")

    def test_a_write_that_fails_leaves_no_file(self) -> None:
        """Whole or not at all."""
        tier = self.tier()
        tier.put("a/first", [b"1"])

        def chunks() -> Iterator[bytes]:
            yield b"half"
            raise StorageError("the source failed")

        with pytest.raises(StorageError):
            tier.put("a/x", chunks())
        assert "x" not in self.tier().folders()["a"]

    def test_delete_removes_a_folder_and_nothing_else(self) -> None:
        """Deleting twice is no error."""
        tier = self.tier()
        for name in ("a/manifest.json", "a/x", "b/x"):
            tier.put(name, [b"1"])
        tier.delete("a")
        tier.delete("a")
        assert self.tier().folders() == {"b": {"x"}}

    def test_a_writable_place_is_writable_and_stays_empty(self) -> None:
        """The probe leaves nothing."""
        tier = self.tier()
        tier.check_writable()
        assert tier.folders() == {}
        assert tier.begun() == set()
