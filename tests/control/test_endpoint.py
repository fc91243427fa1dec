"""What torchrun's rendezvous flags mean here."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilient_train.control.endpoint import EtcdAccess, OwnEtcd, parse
from resilient_train.errors import ConfigError


@pytest.mark.parametrize("backend", ["", "c10d", "static"])
def test_torchs_own_backends_mean_the_embedded_store(backend: str) -> None:
    """None: the caller serves one."""
    assert parse(backend, "h:29400", {}) is None


def test_etcd() -> None:
    """Hosts with or without a port, IPv6, and a scheme that says whether connections are encrypted."""
    assert parse("etcd", "h1:2379,h2", {}) == EtcdAccess(endpoints=("h1:2379", "h2:2379"))
    assert parse("etcd", "etcd://h1,[::1]:77", {}) == EtcdAccess(endpoints=("h1:2379", "[::1]:77"))
    for encrypted in (parse("etcd", "etcds://h/", {}), parse("etcd", "h", {"protocol": "https"})):
        assert encrypted == EtcdAccess(endpoints=("h:2379",), tls=True)


def test_own() -> None:
    """One host or three; the port after each is used too."""
    assert parse("etcd", "own:a,b:7,c", {}) == OwnEtcd(members=(("a", 23790), ("b", 7), ("c", 23790)))
    one = parse("etcd", "own:a", {})
    assert isinstance(one, OwnEtcd)
    assert one.access == EtcdAccess(endpoints=("a:23790",))


def test_what_etcd_asks_for(tmp_path: Path) -> None:
    """A user with a password, also from a file; certificates."""
    file = tmp_path / "password"
    file.write_text("word\n")
    for conf in ({"password": "word"}, {"password_file": str(file)}):
        access = parse("etcd", "h", {"user": "u", "cacert": "ca", "cert": "c", "key": "k", "timeout": 900, **conf})
        assert access == EtcdAccess(endpoints=("h:2379",), user="u", password="word", ca="ca", cert="c", key="k")
        assert "word'" not in repr(access)


@pytest.mark.parametrize(
    ("backend", "endpoint", "conf", "says"),
    [
        ("etcd-v2", "h", {}, "use --rdzv-backend=etcd"),
        ("zookeeper", "h", {}, "is not known"),
        ("c10d", "own:a,b,c", {}, "needs --rdzv-backend=etcd"),
        ("etcd", "", {}, "must be HOST"),
        ("etcd", "h:port", {}, "'h:port'"),
        ("etcd", "h1,,h2", {}, "must be HOST"),
        ("etcd", "h:99999", {}, "'h:99999'"),
        ("etcd", "ftp://h", {}, "use etcd:// or etcds://"),
        ("etcd", "own:a,b", {}, "one or three hosts, not 2"),
        ("etcd", "own:a,b,c,d", {}, "one or three hosts, not 4"),
        ("etcd", "own:a,b,a", {}, "twice"),
        ("etcd", "h", {"user": "u"}, "belongs together"),
        ("etcd", "h", {"password": "p"}, "belongs together"),
        ("etcd", "h", {"protocol": "tls"}, "http or https"),
        ("etcd", "h", {"user": "u", "password_file": "/nowhere"}, "cannot be read"),
    ],
)
def test_what_means_nothing(backend: str, endpoint: str, conf: dict[str, str], says: str) -> None:
    """Refused, with what to do instead."""
    with pytest.raises(ConfigError, match=says):
        parse(backend, endpoint, conf)
