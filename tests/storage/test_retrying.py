"""Trying again: what a network refuses now it may grant later; what is damaged stays damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from resilient_train.errors import CheckpointDamaged, StorageError
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.storage.retrying import DELAYS, RetryingTier
from resilient_train.storage.tier import Chunk, Tier
from resilient_train.testing.tier import TierConformance


class Flaky(FilesystemTier):
    """Refuses the first ``failures`` operations."""

    def __init__(self, url: str, failures: int) -> None:
        super().__init__(url)
        self.failures = failures
        self.calls = 0

    def _refuse(self) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise StorageError("503 slow down")

    def folders(self) -> dict[str, set[str]]:
        self._refuse()
        return super().folders()

    def read(self, path: str, offset: int, length: int) -> bytes:
        self._refuse()
        return super().read(path, offset, length)

    def put(self, path: str, chunks: Iterable[Chunk], size: int = 0) -> int:
        self._refuse()
        return super().put(path, chunks, size)


class TestRetryingTier(TierConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.url = str(tmp_path / "run")

    def tier(self) -> Tier:
        return RetryingTier(Flaky(self.url, 1), lambda _: None)

    def refusing(self) -> Tier:
        return RetryingTier(Flaky(self.url, 100), lambda _: None)

    def test_a_write_that_fails_leaves_no_file(self) -> None:
        """A source that can be read only once is not tried again."""
        tier = Flaky(self.url, 1)
        with pytest.raises(StorageError):
            RetryingTier(tier, lambda _: None).put("a/x", iter([b"1"]))
        assert tier.calls == 1


def test_delays_grow_and_end(tmp_path: Path) -> None:
    """It gives up with the last refusal, having waited in between."""
    waited: list[float] = []
    tier = Flaky(str(tmp_path), 100)
    with pytest.raises(StorageError, match="503"):
        RetryingTier(tier, waited.append).read("x", 0, 1)
    assert waited == list(DELAYS)
    assert tier.calls == len(DELAYS) + 1


def test_damage_is_not_tried_again(tmp_path: Path) -> None:
    """Missing files stay missing."""
    waited: list[float] = []
    with pytest.raises(CheckpointDamaged):
        RetryingTier(FilesystemTier(str(tmp_path)), waited.append).size("a/x")
    assert waited == []
