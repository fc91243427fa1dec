"""Cleaning: what nobody needs goes, the last good checkpoint never."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.errors import ExitCode
from resilient_train.launch.rtctl import run
from resilient_train.plan.retention import cleanable
from resilient_train.spec.world import Key
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.tools.clean import propose, remove
from resilient_train.worker.state import State

Make = Callable[..., State]
KEYS = st.sets(st.builds(Key, st.integers(1, 3), st.integers(0, 9)), max_size=9)


def steps(url: Path) -> list[int]:
    return sorted(int(path.name[5:14]) for path in url.iterdir())


@given(KEYS, KEYS, KEYS, st.none() | st.integers(-1, 5))
def test_the_newest_good_ones_never_go(good: set[Key], damaged: set[Key], open_: set[Key], keep: int | None) -> None:
    """Whatever there is and whatever is asked for; and nothing goes that is newer than the newest good one."""
    damaged -= good
    open_ -= good | damaged
    gone = {key for key, _ in cleanable(good, damaged, open_, keep)}
    kept = sorted(good)[-max(1, keep or 1) :]
    assert not gone & set(kept)
    assert all(key < kept[0] or key in open_ for key in gone)
    assert not gone or max(gone) < max(good)
    if keep is None:
        assert gone <= open_


def test_leftovers_and_superseded_go(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --keep leftovers only; an unfinished one that is newer may still be written; it asks before."""
    for step in (1, 3, 4):
        make(tmp_path, step)
    for step in (2, 5):
        make(tmp_path, step, last=1)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run(["clean", str(tmp_path)]) == 0
    assert "nothing was removed" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(["clean", str(tmp_path)]) is ExitCode.USAGE
    assert "--yes" in capsys.readouterr().err
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run(["clean", str(tmp_path)]) == 0
    assert steps(tmp_path) == [1, 3, 4, 5]
    assert run(["clean", str(tmp_path), "--keep", "2", "--yes"]) == 0
    assert steps(tmp_path) == [3, 4, 5]
    assert run(["clean", str(tmp_path), "--keep", "0"]) is ExitCode.USAGE


@pytest.mark.parametrize("how", ["manifest", "missing", "truncated"])
def test_the_last_good_one_stays_if_the_newest_is_damaged(tmp_path: Path, make: Make, how: str) -> None:
    """A damaged checkpoint counts for nothing, and stays for whoever wants to look at it."""
    for step in (1, 2, 3):
        make(tmp_path, step)
    folder = tmp_path / "step-000000003.g1"
    image = folder / "rank-00000-of-00002.safetensors"
    if how == "manifest":
        (folder / "manifest.json").write_text("[]")
    elif how == "missing":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:-1])
    assert run(["clean", str(tmp_path), "--keep", "1", "--yes"]) == 0
    assert steps(tmp_path) == [2, 3]
    assert run(["clean", str(tmp_path), "--keep", "1", "--yes"]) == 0
    assert steps(tmp_path) == [2, 3]


def test_what_became_the_last_good_one_meanwhile_stays(tmp_path: Path, make: Make) -> None:
    """Between the question and the answer the newer one was lost: the proposal does not count any more."""
    tier = FilesystemTier(str(tmp_path))
    make(tmp_path, 1)
    make(tmp_path, 2)
    proposal = propose(tier, 1)
    assert [one.key.step for one, _ in proposal.doomed] == [1]
    tier.delete("step-000000002.g1")
    assert remove(tier, proposal, 1) == []
    assert steps(tmp_path) == [1]
