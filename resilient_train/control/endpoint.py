"""Which store a job uses, read from torchrun's ``--rdzv-*`` flags."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resilient_train.errors import ConfigError

ETCD_PORT = 2379
"""Where etcd usually listens."""
_FOR_ETCD = frozenset({"user", "password", "password_file", "protocol", "cacert", "cert", "key"})
"""What ``--rdzv-conf`` says to an etcd of the user's."""
OWN_PORT = 23790
"""Where a job's own etcd listens: another one may be on the same host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAccess:
    """Where an etcd is, and what it asks of those who come."""

    endpoints: tuple[str, ...]
    """host:port of its members' client ports."""
    user: str = ""
    """Name of the user; empty where etcd has none."""
    password: str = field(default="", repr=False)
    """The user's password; never logged."""
    tls: bool = False
    """Whether connections are encrypted; so they are if ``ca`` or ``cert`` is given."""
    ca: str = ""
    """File of the certificates that vouch for the servers; empty for the system's."""
    cert: str = ""
    """File of this client's certificate; empty for none."""
    key: str = ""
    """File of its key."""

    def __str__(self) -> str:
        return ",".join(self.endpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnEtcd:
    """An etcd that the job's agents run themselves."""

    members: tuple[tuple[str, int], ...]
    """Host and client port of each member; the port after it is for the members among themselves."""

    @property
    def access(self) -> EtcdAccess:
        """Where everybody finds it."""
        return EtcdAccess(endpoints=tuple(joined(host, port) for host, port in self.members))


def parse(backend: str, endpoint: str, conf: Mapping[str, object]) -> EtcdAccess | OwnEtcd | None:
    """What the flags mean; None for the embedded store.

    Args:
        backend: ``--rdzv-backend``.
        endpoint: ``--rdzv-endpoint``: ``host1:2379,host2:2379``, the same after ``etcd://`` or (encrypted) ``etcds://``,
            or ``own:host1,host2,host3`` for an etcd that the job runs itself.
        conf: ``--rdzv-conf``: ``user``, ``password`` or ``password_file`` (other users of the host may read a command
            line), ``protocol=https``, and files ``cacert``, ``cert`` and ``key``, as torch calls them.

    Raises:
        ConfigError: if they mean nothing.
    """
    if backend == "etcd-v2":
        raise ConfigError("--rdzv-backend=etcd-v2 needs an etcd that speaks version 2; use --rdzv-backend=etcd")
    if backend in ("", "c10d", "static"):
        if endpoint.startswith(("etcd://", "etcds://", "own:")):
            raise ConfigError(f"--rdzv-endpoint={endpoint} needs --rdzv-backend=etcd")
        if keys := sorted(conf.keys() & _FOR_ETCD):
            raise ConfigError(f"--rdzv-conf: {', '.join(keys)} would protect nothing without --rdzv-backend=etcd")
        return None
    if backend != "etcd":
        raise ConfigError(f"--rdzv-backend={backend} is not known; use c10d, which one node serves, or etcd")
    if endpoint.startswith("own:"):
        if keys := sorted(conf.keys() & _FOR_ETCD):
            raise ConfigError(f"--rdzv-conf: {', '.join(keys)} would protect nothing: own: lets everybody in")
        return _own(endpoint)
    scheme, separator, rest = endpoint.partition("://")
    if separator and scheme not in ("etcd", "etcds", "http", "https"):
        raise ConfigError(f"--rdzv-endpoint={endpoint}: {scheme}:// is not known; use etcd:// or etcds://")
    text = {key: str(value) for key, value in conf.items() if value is not None}
    if text.get("protocol", "http") not in ("http", "https"):
        raise ConfigError(f"--rdzv-conf: protocol must be http or https, it is {text['protocol']!r}")
    if ("user" in text) != ("password" in text or "password_file" in text):
        raise ConfigError("--rdzv-conf: user belongs together with password or password_file")
    if ("cert" in text) != ("key" in text):
        raise ConfigError("--rdzv-conf: cert and key, of this client's certificate, belong together")
    return EtcdAccess(
        endpoints=tuple(joined(*one) for one in _hosts(endpoint, rest if separator else endpoint, ETCD_PORT)),
        user=text.get("user", ""),
        password=_read(text["password_file"]) if "password_file" in text else text.get("password", ""),
        tls=scheme in ("etcds", "https") or text.get("protocol") == "https",
        ca=text.get("cacert", ""),
        cert=text.get("cert", ""),
        key=text.get("key", ""),
    )


def check_any_known(hosts: Sequence[str]) -> None:
    """Refuse hosts of which nobody knows an address: one that is lost may be forgotten, but hardly all are.

    A name server that does not answer now may do so later.

    Raises:
        ConfigError: naming them.
    """
    for host in hosts:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if error.errno not in (socket.EAI_NONAME, socket.EAI_NODATA):
                return
    raise ConfigError(f"--rdzv-endpoint: no address is known of {' or '.join(map(repr, hosts))}")


def towards_any(endpoints: Sequence[str]) -> str:
    """The address that this host has on its way to the first of some ``host:port`` to which there is a way.

    Raises:
        ConfigError: if there is none to any of them.
    """
    for one in endpoints:
        host, _, port = one.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port) or 1, type=socket.SOCK_DGRAM)
            family, kind, _, _, address = found[0]
            with socket.socket(family, kind) as probe:
                # Nothing is sent.
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    raise ConfigError(f"this host has no way to {', '.join(endpoints)}: name its own address with --local-addr")


def joined(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own(endpoint: str) -> OwnEtcd:
    members = _hosts(endpoint, endpoint.removeprefix("own:"), OWN_PORT)
    if len(members) not in (1, 3):
        reason = "two could not go on without either of them" if len(members) == 2 else "more only make it slower"
        raise ConfigError(f"--rdzv-endpoint={endpoint} must name one or three hosts, not {len(members)}: {reason}")
    if len(set(members)) != len(members):
        raise ConfigError(f"--rdzv-endpoint={endpoint} names a host and port twice")
    return OwnEtcd(members=members)


def _hosts(endpoint: str, text: str, default: int) -> tuple[tuple[str, int], ...]:
    found = []
    for one in text.rstrip("/").split(","):
        host, port = one.strip(), str(default)
        if host.startswith("["):
            host, _, after = host[1:].partition("]")
            port = after.removeprefix(":") or port
        elif host.count(":") == 1:
            host, _, port = host.partition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65535:
            raise ConfigError(f"--rdzv-endpoint={endpoint} must be HOST[:PORT],HOST[:PORT],...; it has {one!r}")
        found.append((host, int(port)))
    return tuple(found)


def _read(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError as error:
        raise ConfigError(f"--rdzv-conf: password_file {file} cannot be read: {error.strerror}") from error
