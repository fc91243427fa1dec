"""Where a job's nodes meet: which store keeps the record, and who serves it."""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed import run as torchrun

from resilient_train.agent.addresses import address_towards, own_addresses
from resilient_train.control.store import ControlStore
from resilient_train.control.tcp import TcpControlStore, serve
from resilient_train.errors import ConfigError, StoreLost

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
    leave: Callable[[], None] = lambda: None
    """To be called when this node's part is over."""


def join_job(args: argparse.Namespace, launch: Any) -> Place:
    """Find the job's store, or serve it, and take a number.

    Args:
        args: the command line.
        launch: torchrun's reading of it.

    Raises:
        ConfigError: if the endpoint is malformed, or names nobody.
        StoreLost: if the store cannot be reached.
    """
    host, port = _endpoint(args)
    if launch.max_nodes == 1:
        server = serve("127.0.0.1", 0)
        store = TcpControlStore("127.0.0.1", server.port, launch.run_id)
        return Place(store=store, order=0, host=launch.local_addr or host, port=port, secret="", leave=_keep(server))
    if not port:
        raise ConfigError(f"--nnodes={args.nnodes} needs --rdzv-endpoint=HOST:PORT, the same on every node")
    server = _serve_if_mine(args, host, port)
    timeout = float(launch.rdzv_configs.get("timeout", args.patience) if not server else 30.0)
    store = TcpControlStore(host, port, launch.run_id, args.detect_within, timeout)
    mine = launch.local_addr or address_towards(host, port)
    leave = _keep(server) if server is None else lambda: _wait_for_others(store, server)
    return Place(store=store, order=store.join(), host=mine, port=0, secret=store.secret(), leave=leave)


def _keep(server: Any) -> Callable[[], None]:
    """Hold on to a server until it is called."""
    held = [server]
    return held.clear


def _wait_for_others(store: ControlStore, server: Any) -> None:
    """The others read the job's end from this server."""
    deadline = time.monotonic() + _LEAVE
    try:
        while store.look().nodes and time.monotonic() < deadline:
            time.sleep(0.05)
    except StoreLost:
        pass
    del server


def _serve_if_mine(args: argparse.Namespace, host: str, port: int) -> Any:
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
        return None  # Another agent of this machine was first.


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
