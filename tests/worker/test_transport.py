"""What ranks of several nodes hand over to each other in a restore: all of it right, by the way that is faster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.timeout(240)
FOLDER = Path(__file__).parent
MIB = 1 << 20
CASES = ["rows:group", "columns:group", "copies:group", "rows:keepers", "rows:measured", "rows:too little"]
CASES += [f"{kind}:group:1:{what}" for kind in ("rows", "columns") for what in ("lies", "has lost it")]
CASES += ["rows:group:staged", "rows:group:2:is bare", "rows:group:1:is another", "rows:group:1:breaks off"]


class Row(NamedTuple):
    """What a rank says."""

    brought: int
    moved: int
    passed: int
    read: int
    """Bytes that keepers were asked for, headers and whole blocks included."""


class Told(NamedTuple):
    """What the ranks said of all cases, one after the other."""

    lines: list[tuple[str, str, str]]
    """(case, rank, what)."""
    log: str

    def of(self, case: str) -> dict[str, str]:
        """By rank."""
        return {rank: text for name, rank, text in self.lines if name == case}

    def rows(self, case: str) -> list[Row]:
        """By rank, all of which have restored."""
        said = self.of(case)
        assert sorted(said) == ["0", "1", "2"], self.log
        assert all(text.startswith("restored ") for text in said.values()), said
        return [Row(*map(int, said[rank].split()[1:])) for rank in sorted(said)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """All cases by the same three processes."""
    meeting = tmp_path_factory.mktemp("handing over") / "meeting"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "handing_over.py"), str(meeting), *CASES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    lines = [line.split(" | ", 2) for line in done.stdout.splitlines()]
    return Told([(case, rank, text) for case, rank, text in lines], done.stderr)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_by_the_group_if_that_is_faster(told: Told, kind: str) -> None:
    """All but a sample comes from other ranks, and every element is the one that belongs there."""
    for row in told.rows(f"{kind}:group"):
        assert row.brought > 20 * MIB
        assert row.passed > row.moved
        assert row.passed + row.moved > 5 * MIB


def test_what_is_near_is_not_moved(told: Told) -> None:
    """Every node has all."""
    for row in told.rows("copies:group"):
        assert row.brought > 20 * MIB
        assert row.moved + row.passed < 1000, "what every rank has of its own may come from anywhere"


def test_by_keepers_if_they_are_faster(told: Told) -> None:
    """Only samples come from other ranks."""
    rows = told.rows("rows:keepers")
    assert all(row.passed for row in rows)
    assert sum(row.passed for row in rows) < sum(row.passed for row in told.rows("rows:group"))
    assert sum(row.moved for row in rows) > sum(row.moved for row in told.rows("rows:group"))


def test_what_is_measured_decides(told: Told) -> None:
    """As it comes out on this machine; both ways have been tried."""
    assert all(row.passed and row.moved for row in told.rows("rows:measured"))


def test_little_is_read_at_once(told: Told) -> None:
    """Nothing is tried: keepers are asked."""
    assert all(row.moved and not row.passed for row in told.rows("rows:too little"))


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("what", ["lies", "has lost it"])
def test_what_comes_damaged_is_read_through_keepers(told: Told, kind: str, what: str) -> None:
    """The rank is named; nothing of what it gave is in the state."""
    without, rows = told.rows(f"{kind}:group"), told.rows(f"{kind}:group:1:{what}")
    assert [row.brought for row in rows] == [row.brought for row in without]
    assert sum(row.passed for row in rows) < sum(row.passed for row in without)
    assert "came damaged from rank 1; reading them anew" in told.log
    assert "came damaged from rank 0" not in told.log
    assert "came damaged from rank 2" not in told.log
    assert "cannot hand over blocks of rank 1's image: CheckpointDamaged('the image is gone')" in told.log


def test_messages_by_way_of_a_device(told: Told) -> None:
    """Copied there and back, here to other memory of the host: the same arrives."""
    assert told.rows("rows:group:staged") == told.rows("rows:group")


def test_a_rank_that_gives_up_is_heard_by_all(told: Told) -> None:
    """Nobody waits for one that lacks its images, or whose model is another."""
    assert told.of("rows:group:2:is bare") == dict.fromkeys("012", "CheckpointDamaged: here is nothing")
    said = told.of("rows:group:1:is another")
    assert said.pop("1") == "StateMismatch: another model"
    assert said == dict.fromkeys("02", "PeerFailed: rank 1 could not restore its part: another model")


def test_a_rank_that_breaks_off_ends_and_keeps_nobody(told: Told) -> None:
    """An error in the middle of a transfer is raised at once; the others hear of it by their process group."""
    said = told.of("rows:group:1:breaks off")
    assert said.pop("1") == "adrift: MemoryError"
    assert set(said) == {"0", "2"}
    lost = [text.endswith(": RuntimeError") for text in said.values()]
    assert any(lost), "somebody waited for it"
    assert all(one or text.startswith("restored ") for one, text in zip(lost, said.values(), strict=True))
