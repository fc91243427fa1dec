"""Which member of a job's own etcd this host runs, and where it may keep its data."""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from resilient_train.control.endpoint import OwnEtcd


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in the list of members."""

    index: int
    """Which one."""
    address: str
    """Where to listen."""
    lock: socket.socket
    """Keeps the place as long as it is open, and no longer than this process lives."""


def all_known(own: OwnEtcd) -> bool:
    """Whether every host of the list has an address by now; one that has none may turn out to be this one."""
    return all(_resolved(host) for host, _ in own.members)


def claim(own: OwnEtcd) -> Place | None:
    """The first place in the list that is on this host and that no other process has."""
    loopback = all(_is_loopback(_resolved(host)) for host, _ in own.members)
    for index, (host, port) in enumerate(own.members):
        address = _resolved(host)
        if not _is_local(address):
            continue
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0resilient_train/own-etcd/{host}:{port}")
        except OSError:
            lock.close()
            continue
        # Many hosts know their own name by a loopback address, at which nobody else finds them.
        if _is_loopback(address) and not loopback:
            address = "::" if ":" in address else "0.0.0.0"
        return Place(index=index, address=address, lock=lock)
    return None


def _resolved(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        # Another host, whose name may become known later.
        return ""


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address).is_loopback


def _is_local(address: str) -> bool:
    if not address:
        return False
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def folder_for(name: str) -> Path:
    """A new folder for the data of a place's member.

    Whatever members of the same place have left is removed; each had a folder of its own, so that whoever cleans up
    behind one that was killed does not meet its successor.
    """
    prefix = f"resilient_train-etcd-{os.getuid()}-{name}-"
    for left in Path(tempfile.gettempdir()).glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(FileNotFoundError):  # A killed agent's keeper cleans up at the same time.
            if not left.is_symlink() and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix))
