"""Where a job's nodes meet: which store keeps the record, and who serves it."""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed import run as torchrun

from resilient_train.agent.addresses import own_addresses
from resilient_train.control.connect import open_store
from resilient_train.control.endpoint import OwnEtcd, parse, towards_any
from resilient_train.control.endpoint import joined as joined_address
from resilient_train.control.rdzv_conf import read_conf, seconds
from resilient_train.control.store import ControlStore
from resilient_train.control.tcp import TcpControlStore, serve
from resilient_train.errors import ConfigError, StoreLost

MASTER_PORT = 29500
"""torch's, where the user names none."""
_LEAST = 0.1
"""The shortest wait for a store, in seconds."""
_LEAVE = 10.0
"""Seconds that the node which serves the record waits for the others to have read its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This node's place in the job."""

    store: ControlStore
    """The agreed record."""
    order: int
    """This node's number."""
    host: str
    """The address at which other nodes reach this one."""
    port: int
    """The port at which the ranks of the first generation are to meet; 0 for any."""
    secret: str
    """The job's secret; empty on a job's only node."""
    leaves: tuple[str, ...] = ()
    """Folders that stay if this process is killed."""


@contextmanager
def joined(args: argparse.Namespace, launch: Any, because: Callable[[str], None]) -> Iterator[Place]:
    """This node's place in the job; serves the store, or a part of it, until the end of the context.

    Args:
        args: the command line.
        launch: torchrun's reading of it.
        because: told, from any thread, why there is no store yet.

    Raises:
        ConfigError: if the endpoint is malformed, names nobody, or does not let us in.
        StoreLost: if the store cannot be reached.
    """
    conf = read_conf(args.rdzv_conf)
    timeout = seconds(conf, "timeout", args.patience, least=_LEAST)
    leaves: list[str] = []
    where = (args.rdzv_backend, args.rdzv_endpoint, conf, launch.run_id, args.detect_within)
    with open_store(*where, timeout=timeout, leaves=leaves, because=because) as store:
        if store is not None:
            if launch.run_id == "none" and not args.rdzv_endpoint.startswith("own:"):
                raise ConfigError(
                    "an etcd serves many jobs: give this one a name with --rdzv-id, the same on all nodes"
                )
            placed = _placed(store, _own_host(launch) or towards_any(_hosts(args, conf)))
            yield replace(placed, leaves=tuple(leaves))
            return
        host, number = _endpoint(args)
        if launch.max_nodes == 1:
            server = serve("127.0.0.1", 0)
            with closing(TcpControlStore("127.0.0.1", server.port, launch.run_id)) as alone:
                yield Place(store=alone, order=0, host=_own_host(launch) or host, port=number, secret="")
            return
        if not number and args.rdzv_backend == "static" and not args.rdzv_endpoint:
            number = int(args.master_port or MASTER_PORT)
        if not number:
            raise ConfigError(f"--nnodes={args.nnodes} needs --rdzv-endpoint=HOST:PORT, the same on every node")
        server = _serve_if_mine(args, host, number, because)
        with closing(TcpControlStore(host, number, launch.run_id, args.detect_within, timeout)) as store:
            yield _placed(store, _own_host(launch) or towards_any([joined_address(host, number)]))
            if server is not None:
                _wait_for_others(store)


def _hosts(args: argparse.Namespace, conf: Mapping[str, str]) -> tuple[str, ...]:
    """Host and port of each of an etcd's members."""
    found = parse(args.rdzv_backend, args.rdzv_endpoint, conf)
    assert found is not None
    return found.access.endpoints if isinstance(found, OwnEtcd) else found.endpoints


def _own_host(launch: Any) -> str:
    """The address that ``--local-addr`` names, looked up once: agents must not wait for a name server later."""
    if not launch.local_addr:
        return ""
    try:
        family, *_, address = socket.getaddrinfo(launch.local_addr, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--local-addr={launch.local_addr} is not known: {error}") from error
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0))
    except OSError as error:
        raise ConfigError(
            f"--local-addr={launch.local_addr} is no address of this machine: {error.strerror}"
        ) from error
    return str(address[0])


def _placed(store: ControlStore, host: str) -> Place:
    return Place(store=store, order=store.join(), host=host, port=0, secret=store.secret())


def _wait_for_others(store: ControlStore) -> None:
    """The others read the job's end from this node's server."""
    deadline = time.monotonic() + _LEAVE
    try:
        while store.look().nodes and time.monotonic() < deadline:
            time.sleep(0.05)
    except StoreLost:
        return


def _serve_if_mine(args: argparse.Namespace, host: str, port: int, because: Callable[[str], None]) -> Any:
    """A server, if this node is the one that the endpoint names; None if another is, or was first."""
    if args.rdzv_backend == "static" and not args.rdzv_endpoint:
        return serve(host, port) if args.node_rank == 0 else None
    ours = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)} & {
        *own_addresses(),
        "127.0.0.1",
        "::1",
    }
    if not ours:
        return None
    try:
        return serve(host, port)
    except StoreLost:
        # Another agent of this machine was first, or something else is there.
        because("another process listens there, on this machine")
        return None


def _endpoint(args: argparse.Namespace) -> tuple[str, int]:
    """(host, port) where the user wants the nodes, or one node's ranks, to meet; port 0 for any."""
    endpoint = args.rdzv_endpoint if not args.standalone else ""
    port = args.master_port
    if not endpoint and (port is None or port == torchrun.get_args_parser().get_default("master_port")):
        return args.master_addr, 0
    host, _, text = endpoint.rpartition(":") if ":" in endpoint else (endpoint, "", "0")
    host, text = (host, text) if endpoint else (args.master_addr, str(port))
    if not text.isdigit() or int(text) > 65535:
        raise ConfigError(f"the endpoint must be HOST:PORT, it is {endpoint or text!r}")
    host = host or "127.0.0.1"
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(f"the endpoint's host {host!r} is not known: {error}") from error
    return host, int(text)
