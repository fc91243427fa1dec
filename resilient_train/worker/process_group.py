"""Form, abort and dissolve a generation's process groups inside one process.

What abort takes differs by backend.  NCCL has an abort.  Gloo's does nothing to a blocked collective (torch 2.7 to
2.13); what frees one is shutting down the TCP connections that the group opened.  So this module remembers which
sockets came into being while groups were formed, and shuts those down: established ones only, because shutting down
gloo's listener ends the process.

A rank that waits for another to connect to it has no connection yet.  If that other one is dead, nothing frees it but a
connection; so it gets one from its own process, which is shut down at once (`_knock`).

A rank that waits for a transfer that was under way when its connection failed hears of no failure at all; if it is not
free soon after, `resilient_train.worker.gloo_waits` ends the wait itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Set
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import _collective_utils, _redistribute, debug

from resilient_train.worker import gloo_waits

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT = timedelta(seconds=10)
"""For one attempt to reach the store of a generation, which listens before the generation is agreed."""
_CONNECT_ATTEMPTS = 6
"""Of which more are needed where a name server does not answer: torch asks one whom it is connected to."""
_TURN = 0.05
"""Seconds that gloo's own thread has to see a connection's end, before waits are ended that it does not tell."""


class ProcessGroups:
    """The process groups of one generation after another."""

    def __init__(self, timeout: float) -> None:
        """Args:
        timeout: seconds after which a collective fails by itself, the last resort if an abort is missed.
        """
        self._timeout = timedelta(seconds=timeout)
        self._excepthook = sys.excepthook
        self._lock = threading.Lock()
        self._ours: set[int] = set()
        self._before: set[int] | None = None
        self._hosts: set[str] = set()
        self._size = 0
        self._nccl_aborted = False
        self.before_abort: Callable[[], None] | None = None
        """called before collectives on devices are aborted: what devices compute from there on means nothing"""
        self._generation = 0
        self._aborted_at: float | None = None
        """When this generation was aborted first."""
        self._knocked: set[int] = set()
        """Listeners that got connections of our own."""
        _observe_new_groups(self)

    def form(
        self,
        *,
        generation: int,
        rank: int,
        size: int,
        host: str,
        port: int,
        backend: str | None,
        hosts: Set[str] = frozenset(),
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Initialise ``torch.distributed`` for a generation; blocks until all of its members are here.

        Args:
            generation: its number.
            rank: this process's.
            size: number of ranks.
            host: where the generation's store is served.
            port: of the store.
            backend: torch's name of it, None for the default of the devices.
            hosts: addresses that connections to the other ranks may have, besides those of ``host``.
            is_over: whether nobody needs the generation any more.

        Raises:
            RuntimeError, torch.distributed.DistError: if that fails or `abort` is called meanwhile.
        """
        # Every initialisation wraps the hook once more, with the rank that tracebacks are labelled with.
        sys.excepthook = self._excepthook
        self._nccl_aborted = False
        self._hosts = _addresses(host) | hosts
        with self._lock:
            self._generation, self._size, self._aborted_at = generation, size, None
        gloo_waits.watch()
        before = set(_sockets())
        store = _connect(host, port, is_over)
        store.set_timeout(self._timeout)
        # torch numbers groups, and ranks meet under the number.  A formation that was aborted has used one up, on the
        # ranks on which it had not succeeded yet: without this the next one would wait for ranks that wait elsewhere.
        c10d._world.group_count = 0
        with self._tracking(before):
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"generation/{generation}", store),
                rank=rank,
                world_size=size,
                timeout=self._timeout,
            )

    @contextlib.contextmanager
    def _tracking(self, before: set[int] | None = None) -> Iterator[None]:
        """Take the sockets that appear meanwhile, or that were not there ``before``, for ours."""
        with self._lock:
            nested = self._before is not None
            if not nested:
                self._before = set(_sockets()) if before is None else before
        try:
            yield
        finally:
            if not nested:
                with self._lock:
                    assert self._before is not None
                    self._ours |= _sockets().keys() - self._before
                    self._before = None

    def abort(self, generation: int | None = None) -> int:
        """Free every thread of this process that is blocked in these groups; may be called often, from any thread.

        Args:
            generation: the one that is over; if a later one is being formed already, nothing is done. None: any.

        Returns:
            Number of connections that were shut down.
        """
        with self._lock:
            if generation is not None and generation < self._generation:
                return 0
            now = _sockets()
            ours = now.keys() - self._before if self._before is not None else set()
            hosts = self._hosts
            count = sum(_shut_down(now[inode], inode, hosts) for inode in (ours | self._ours) & now.keys())
            self._knocked |= {inode for inode in ours - self._knocked if _knock(now[inode], inode, self._size)}
            if self._aborted_at is None:
                self._aborted_at = time.monotonic()
            elif time.monotonic() >= self._aborted_at + _TURN:
                gloo_waits.end()
        self._abort_nccl()
        return count

    def _abort_nccl(self) -> None:
        if self._nccl_aborted or not (torch.cuda.is_available() and dist.is_nccl_available()):
            return
        self._nccl_aborted = bool(c10d._world.pg_map)
        before = self.before_abort
        if before is not None:
            try:
                before()
            except Exception:
                logger.exception("aborting all the same")
        for group in list(c10d._world.pg_map):
            with contextlib.suppress(RuntimeError):
                backend: Any = group._get_backend(torch.device("cuda"))
                if hasattr(backend, "abort"):
                    backend.abort()

    def dissolve(self) -> None:
        """Forget the groups; afterwards `form` can be called again.

        The caches that DTensor keeps for the whole process are cleared: they are keyed by the *equality* of meshes, so
        after a change of ranks they would hand out the old mesh and silently give wrong data.
        """
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, dist.DistError):
                dist.destroy_process_group()
        clear_dtensor_caches()
        with self._lock:
            self._ours = set()
            self._knocked = set()


def _connect(host: str, port: int, is_over: Callable[[], bool]) -> dist.TCPStore:
    # Connecting is not to be aborted: torch would try again and again, ever more slowly, until its time is up.
    for _ in range(_CONNECT_ATTEMPTS - 1):
        try:
            return dist.TCPStore(host, port, None, False, _CONNECT_TIMEOUT, wait_for_workers=False)
        except dist.DistNetworkError:
            if is_over():
                raise
            logger.warning("the store of this generation at %s:%d does not answer, trying again", host, port)
    return dist.TCPStore(host, port, None, False, _CONNECT_TIMEOUT, wait_for_workers=False)


def _sockets() -> dict[int, int]:
    """inode -> descriptor of this process's sockets."""
    found = {}
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        # No descriptor is left to open the folder with.
        return {}
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found[int(target[8:-1])] = int(name)
    return found


def _shut_down(descriptor: int, inode: int, hosts: Set[str]) -> bool:
    """Shut down an established TCP connection to a host of the job, if the descriptor still is the socket we mean."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return False
    try:
        if os.fstat(copy).st_ino != inode:
            return False
        with socket.socket(fileno=copy) as sock:
            copy = -1
            tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
            if not tcp or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            peer = _address(sock.getpeername())
            if peer not in hosts and peer != _address(sock.getsockname()):
                return False  # A connection of the script's own, which it opened while the group was being formed.
            sock.shutdown(socket.SHUT_RDWR)
            return True
    except OSError:
        return False
    finally:
        if copy >= 0:
            os.close(copy)


def _knock(descriptor: int, inode: int, peers: int) -> bool:
    """Stand in for peers that will never connect, if the descriptor is a listener of gloo's; whether it is one.

    Whoever connects says in 8 bytes which of the listener's pairs it is for.
    """
    try:
        copy = os.dup(descriptor)
    except OSError:
        return False
    with socket.socket(fileno=copy) as listener:
        try:
            tcp = listener.family in (socket.AF_INET, socket.AF_INET6) and listener.type == socket.SOCK_STREAM
            if os.fstat(copy).st_ino != inode or not tcp:
                return False
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            for number in range(peers):
                with socket.create_connection(listener.getsockname()[:2], timeout=1.0) as caller:
                    caller.sendall(number.to_bytes(8, sys.byteorder))
        except OSError:
            return False
    return True


def _address(name: tuple[Any, ...]) -> str:
    """The host of a socket's name; an IPv4 address in IPv6 clothes as what it is."""
    return str(name[0]).removeprefix("::ffff:")


def _addresses(host: str) -> set[str]:
    """Everything a host name stands for."""
    try:
        return {_address(info[4]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


_create_group = c10d._new_process_group_helper


def _observe_new_groups(groups: ProcessGroups) -> None:
    """Sub-groups, a mesh's or the user's own, open sockets too: all are made by this one function of torch."""

    def observed(*args: Any, **kwargs: Any) -> Any:
        with groups._tracking():
            return _create_group(*args, **kwargs)

    c10d._new_process_group_helper = observed


def clear_dtensor_caches() -> None:
    """Empty the caches that DTensor keys by the equality of meshes, and those that would grow with every generation."""
    debug._clear_sharding_prop_cache()
    transform_infos: Any = getattr(_redistribute, "_gen_transform_infos", None)
    topology: Any = getattr(_collective_utils, "MeshTopoInfo", None)
    clears = (
        getattr(transform_infos, "cache_clear", None),
        getattr(_redistribute, "clear_redistribute_planner_cache", None),
        # Holds the first mesh of every world size, and with it that mesh's group: its threads and sockets.
        getattr(getattr(topology, "build_from_mesh", None), "cache_clear", None),
        # Filled again whenever the first is emptied, and keyed by scalars too, such as an optimizer's step size.
        getattr(FakeTensorMode, "cache_clear", None),
    )
    for clear in clears:
        if clear is not None:
            clear()


def is_device_error(error: BaseException) -> bool:
    """Whether ``error`` says that this process's accelerator failed, which no other attempt in it can mend."""
    accelerator: Any = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def is_communication_error(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, says that communication with other ranks failed."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, dist.DistError):
            return True
        if isinstance(current, RuntimeError) and any(mark in str(current) for mark in _MARKS):
            return True
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return False


# Gloo raises plain RuntimeErrors; these are the words of its transport, of the store and of NCCL.
_MARKS = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "NCCL",
    "ProcessGroup",
)
