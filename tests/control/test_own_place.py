"""Which member of a job's own etcd a process runs, and where its data is."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilient_train.control import own_etcd, own_place
from resilient_train.control.endpoint import OwnEtcd
from resilient_train.control.own_place import claim, folder_for


def test_a_name_that_is_not_known_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be this host's own: a place is claimed again until every name is known."""
    own = OwnEtcd(members=(("203.0.113.1", 1), ("late", 2), ("203.0.113.2", 4)))
    asked: list[str] = []

    def resolved(host: str) -> str:
        asked.append(host)
        return ("" if asked.count("late") < 8 else "203.0.113.3") if host == "late" else host

    monkeypatch.setattr(own_place, "_resolved", resolved)
    with own_etcd.member(own, 30.0) as nearest:
        assert nearest is own
    assert asked.count("late") >= 8


def test_places_are_taken_once() -> None:
    """Each process takes the first entry of its host that nobody has; a host that is not in the list takes none."""
    own = OwnEtcd(members=(("203.0.113.1", 1), ("127.0.0.1", 2), ("127.0.0.1", 4)))
    first, second = claim(own), claim(own)
    assert first is not None
    assert second is not None
    assert (first.index, second.index) == (1, 2)
    assert claim(own) is None
    assert first.address == "0.0.0.0", "others do not find a loopback address"
    first.lock.close()
    again = claim(own)
    assert again is not None
    assert again.index == 1
    again.lock.close()
    second.lock.close()


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next one of the same place, in a folder of its own; what a link points to is left alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, other = folder_for("h-1"), folder_for("h-10")
    (first / "data").touch()
    (tmp_path / "precious").mkdir()
    link = first.with_name(f"{first.name}-link")
    link.symlink_to(tmp_path / "precious")
    second = folder_for("h-1")
    assert second != first
    assert second.stat().st_mode & 0o077 == 0
    assert {path.name for path in tmp_path.iterdir()} == {second.name, other.name, link.name, "precious"}


def test_a_host_that_is_not_known_yet_is_somebody_elses() -> None:
    """Names of hosts that are not up may not be known."""
    own = OwnEtcd(members=(("no-such-host.invalid", 1), ("127.0.0.1", 6), ("no-such-host.invalid", 3)))
    place = claim(own)
    assert place is not None
    assert place.index == 1
    place.lock.close()
