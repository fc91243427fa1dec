"""Nodes with a network of their own each, on one machine: namespaces, joined by a bridge, that can be cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from types import TracebackType
from typing import Self

_SUBNETS = "10.251"
"""Each network takes one of its 256 parts by chance."""
_HOST = 254
"""This machine's own place in it."""


def may_make_networks() -> bool:
    """Whether this process has the rights and the tool."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"rt{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode != 0:
        return False
    _ip("netns", "del", name)
    return True


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Network:
    """A context manager: ``count`` namespaces, at most 253, whose packets reach each other and this machine."""

    def __init__(self, count: int) -> None:
        name = uuid.uuid4()
        self._name = f"rt{name.hex[:6]}"
        self._subnet = f"{_SUBNETS}.{name.bytes[0]}"
        self._count = count

    def prefix(self, index: int) -> list[str]:
        """The beginning of a command that is to run on a node."""
        return ["ip", "netns", "exec", self._space(index)]

    def address(self, index: int) -> str:
        """A node's address."""
        return f"{self._subnet}.{index + 1}"

    @property
    def host(self) -> str:
        """The address at which nodes reach this machine, for what is not one of them."""
        return f"{self._subnet}.{_HOST}"

    def cut(self, index: int) -> None:
        """From now on all packets from and to a node are dropped, without a word to anybody."""
        _ip("link", "set", self._port(index), "nomaster")

    def mend(self, index: int) -> None:
        """Packets reach the node again."""
        _ip("link", "set", self._port(index), "master", self._bridge)

    @property
    def _bridge(self) -> str:
        return f"{self._name}b"

    def _port(self, index: int) -> str:
        return f"{self._name}p{index}"

    def _space(self, index: int) -> str:
        return f"{self._name}-{index}"

    def __enter__(self) -> Self:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for index in range(self._count):
            space, port = self._space(index), self._port(index)
            _ip("netns", "add", space)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", port, "master", self._bridge)
            _ip("link", "set", port, "up")
            _ip("-n", space, "addr", "add", f"{self.address(index)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in range(self._count):
            subprocess.run(["ip", "netns", "del", self._space(index)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True)
