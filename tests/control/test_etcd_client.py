"""Users, passwords and certificates: whoever is let in stays in, whoever is not is told what to do."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from etcd_cluster import EtcdCluster, running

from resilient_train.control.endpoint import EtcdAccess
from resilient_train.control.etcd import EtcdControlStore
from resilient_train.control.etcd_client import EtcdClient
from resilient_train.errors import ConfigError, StoreLost
from resilient_train.testing.control import node, record

ROOT = "--user=root:root-password"


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdCluster]:
    """One member with a user who may use our keys and nothing else."""
    with running(1, ["--bcrypt-cost", "4"]) as cluster:
        cluster.ready()
        cluster.etcdctl("user", "add", "root:root-password")
        cluster.etcdctl("user", "grant-role", "root", "root")
        cluster.etcdctl("user", "add", "trainer:secret-word")
        cluster.etcdctl("role", "add", "training")
        cluster.etcdctl("role", "grant-permission", "training", "--prefix=true", "readwrite", "/resilient_train/")
        cluster.etcdctl("user", "grant-role", "trainer", "training")
        cluster.etcdctl("auth", "enable")
        yield cluster


@pytest.fixture
def access(guarded: EtcdCluster) -> EtcdAccess:
    return replace(guarded.access, user="trainer", password="secret-word")


def test_a_user_with_the_right_password_gets_in(access: EtcdAccess) -> None:
    """All that a store does needs no more than rights to our keys; the watch included."""
    store = EtcdControlStore(access, "welcome", 1.0)
    store.announce(node(store.join()))
    store.beat()
    before = store.look()
    assert before.nodes == (node(0),)
    store.swap(record(1))
    news = store.watch(before.number, 30.0)
    assert news is not None
    assert news.record == record(1)
    store.withdraw()
    store.close()


def test_a_login_that_takes_long_is_waited_for_and_made_once(
    access: EtcdAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many nodes' logins at once keep etcd busy for seconds: whoever gave up and asked again would make it worse."""
    once, logins = EtcdClient._once, []

    def slow(self: EtcdClient, channel: Any, method: str, request: Any, timeout: float, token: str) -> Any:
        if method == "Authenticate":
            logins.append(timeout)
            if timeout < 5.0:
                raise ImpatientError
        return once(self, channel, method, request, timeout, token)

    monkeypatch.setattr(EtcdClient, "_once", slow)
    store = EtcdControlStore(access, "job of one login", ttl=1.0)
    assert store.join() == 0
    assert store.look().record is None
    assert store.watch(0, 1.0) is not None
    assert len(logins) == 1
    store.close()


class ImpatientError(Exception):
    """A login got too little time."""


@pytest.mark.parametrize(
    ("user", "password", "says"),
    [
        ("trainer", "wrong", "does not know the user 'trainer' with this password"),
        ("nobody", "secret-word", "does not know the user 'nobody' with this password"),
        ("", "", "asks for a user and a password"),
    ],
)
def test_others_are_told_what_to_do(access: EtcdAccess, user: str, password: str, says: str) -> None:
    """At once, without another try; the password is not repeated."""
    with pytest.raises(ConfigError, match=says) as caught:
        EtcdControlStore(replace(access, user=user, password=password), "job")
    assert "secret-word" not in repr(caught.value)
    assert "secret-word" not in repr(access)


def test_a_user_without_rights_is_told_so(guarded: EtcdCluster, access: EtcdAccess) -> None:
    """The message names the keys."""
    guarded.etcdctl("user", "add", "stranger:other-word", ROOT)
    with pytest.raises(ConfigError, match=r"does not let the user 'stranger' use keys under /resilient_train/"):
        EtcdControlStore(replace(access, user="stranger", password="other-word"), "job")


def test_an_old_token_is_renewed(guarded: EtcdCluster, access: EtcdAccess) -> None:
    """Tokens end when users or rights change, and with the member that gave them; calls and watches go on."""
    store = EtcdControlStore(access, "tokens", 1.0)
    store.swap(record(1))
    number = store.look().number
    store.watch(number, 0.0)
    guarded.etcdctl("role", "grant-permission", "training", "readwrite", "/elsewhere", ROOT)
    assert store.swap(record(2)) == record(2)
    guarded.signal(signal.SIGKILL, 0)
    guarded.start(0)
    client = guarded.client()
    client.call("Status", 60.0)
    client.close()
    assert store.swap(record(3)) == record(3)
    news = store.watch(number, 30.0)
    while news is None or news.record != record(3):
        news = store.watch(news.number if news else number, 30.0)
    store.close()


def test_a_user_where_none_are_known() -> None:
    """Whoever gives a password believes that one is asked for."""
    with running(1) as cluster:
        cluster.ready()
        with pytest.raises(ConfigError, match="knows no users"):
            EtcdControlStore(replace(cluster.access, user="trainer", password="secret-word"), "job")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of a server on 127.0.0.1 and of a client."""
    folder = tmp_path_factory.mktemp("certificates")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", "req", "-x509", *new, *arguments], cwd=folder, check=True, capture_output=True)

    openssl("-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
        address = ("-addext", "subjectAltName=IP:127.0.0.1")
        openssl("-subj", f"/CN={name}", *signed, *address, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl("-subj", "/CN=another", "-keyout", "other.key", "-out", "other.pem")
    return folder


def test_tls(certificates: Path) -> None:
    """Servers and clients that show certificates of the right authority talk; others are refused, with the reason."""
    ca, key, cert = (str(certificates / name) for name in ("ca.pem", "client.key", "client.pem"))
    server = (f"--cert-file={certificates}/server.pem", f"--key-file={certificates}/server.key")
    with running(1, [*server, "--client-cert-auth", f"--trusted-ca-file={ca}"], "https") as cluster:
        access = replace(cluster.access, ca=ca, cert=cert, key=key)
        store = EtcdControlStore(access, "job", 1.0)
        assert store.swap(record(1)) == record(1)
        store.close()
        for wrong in (
            replace(access, ca=str(certificates / "other.pem")),
            replace(access, cert="", key=""),
            cluster.access,
        ):
            with pytest.raises(StoreLost, match=cluster.clients[0]):
                EtcdControlStore(wrong, "job", 1.0, timeout=1.0)
        with pytest.raises(ConfigError, match="one of them is missing"):
            EtcdControlStore(replace(access, key=""), "job", 1.0)
        with pytest.raises(ConfigError, match=r"nowhere\.pem cannot be read"):
            EtcdControlStore(replace(access, ca="/nowhere.pem"), "job", 1.0)
