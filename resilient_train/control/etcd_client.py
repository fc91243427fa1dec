"""Calls to an etcd cluster: every one bounded, tried on one member after the other.

A member that refuses, is frozen or has no leader costs one try; the next calls go straight to the member that answered.
So every request must be harmless when it arrives twice, or late: the store compares revisions in each of them.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import grpc

from resilient_train.clock import Clock, MonotonicClock
from resilient_train.control import etcd_messages as messages
from resilient_train.control.endpoint import EtcdAccess
from resilient_train.errors import ConfigError, StoreLost

_OPTIONS = [
    # A connection of its own for each client: a watch does not wait behind calls.
    ("grpc.use_local_subchannel_pool", 1),
    # etcd stands in the cluster; a proxy for the world outside has nothing to do with it.
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    # The announcements of thousands of nodes are more than the 4 MiB of the default.
    ("grpc.max_receive_message_length", -1),
    # A watch on one thread, woken half as often to find nothing.
    ("SingleThreadedUnaryStream", 1),
]
_PAUSE = 0.05
"""Seconds between two rounds through the members."""
_SHORT = 0.2
"""Seconds that a member gets at first: what a leader took with it is never answered, and must be asked again."""
_LOGIN = 10.0
"""Seconds for a login: passwords are slow to guess, so several nodes' logins take etcd seconds, and what is given up is
computed to its end all the same."""
_USELESS = ("request is too large", "larger than max", "unknown service", "unknown method")
"""What is refused like this will be so the next time."""
_OLD_TOKEN = ("invalid auth token", "revision of auth store is old")
_REFUSALS = {
    "authentication failed": "etcd at {endpoints} does not know the user {user!r} with this password",
    "user name is empty": "etcd at {endpoints} asks for a user and a password",
    "authentication is not enabled": "etcd at {endpoints} knows no users, but the user {user!r} was given",
    "permission denied": "etcd at {endpoints} does not let the user {user!r} use keys under /resilient_train/",
}
"""What etcd says, and what it means; the same on all members."""


class Login:
    """What clients of one user share, so that etcd, which takes its time for each, is asked for one after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held by whoever logs in."""
        self.token = ""
        """Empty before, and when etcd does not know it any more."""


class EtcdClient:
    """Calls to one cluster; every method may be called from any thread."""

    def __init__(
        self, access: EtcdAccess, patience: float, clock: Clock | None = None, login: Login | None = None
    ) -> None:
        """Args:
            access: where the cluster is.
            patience: seconds that one member gets to answer, in the end.
            clock: for deadlines.
            login: of the same user, shared with other clients.

        Raises:
            ConfigError: if a file of certificates cannot be read.
        """
        self.patience = patience
        """Seconds that one member gets to answer, in the end."""
        self.newest = 0
        """The highest revision that any answer was made at."""
        self._access = access
        self._clock = clock or MonotonicClock()
        self._credentials = _credentials(access)
        self._lock = threading.Lock()
        self._current = 0
        self._channel: Any = None
        self._login = login or Login()
        self._closed = threading.Event()

    def call(self, method: str, timeout: float, *, excuses: tuple[str, ...] = (), **fields: Any) -> Any:
        """A call, tried on every member again and again for ``timeout`` seconds.

        Args:
            method: its name.
            timeout: seconds.
            excuses: names of statuses that are answers and not failures; the call returns None for them.
            fields: of the request.

        Raises:
            StoreLost: if no member answers in time.
            ConfigError: if etcd refuses this user, and would refuse the next try too.
        """
        request = messages.request(method, **fields)
        start = self._clock.now()
        deadline = start + timeout
        while True:
            reasons = []
            for _ in self._access.endpoints:
                channel, endpoint = self._connected()
                now = self._clock.now()
                left = min(max(_SHORT, (now - start) / 4), self.patience, deadline - now)
                try:
                    answer = self._attempt(channel, method, request, max(0.01, left))
                    self.newest = max(self.newest, answer.header.revision)
                    return answer
                except grpc.RpcError as error:
                    if error.code().name in excuses:
                        return None
                    self._complain(error)
                    self.leave(channel)
                    reasons.append(f"{endpoint}: {error.code().name}: {error.details()}")
                except ValueError as error:
                    # Another thread has left this member.
                    reasons.append(f"{endpoint}: {error}")
                if self._clock.now() >= deadline or self._closed.is_set():
                    raise StoreLost(f"etcd at {self._access} does not answer ({'; '.join(reasons)})")
            self._closed.wait(min(_PAUSE, max(0.0, deadline - self._clock.now())))

    def check_one_cluster(self, key: bytes) -> None:
        """Make sure that those endpoints which answer now belong to one cluster: else there would be two of each job.

        Args:
            key: one that this user may read.

        Raises:
            ConfigError: naming one of each cluster.
        """
        clusters: dict[int, str] = {}
        for _ in self._access.endpoints:
            channel, endpoint = self._connected()
            # Of those that do not answer now nothing is known.
            with contextlib.suppress(grpc.RpcError, ValueError):
                answer = self._attempt(channel, "Range", messages.request("Range", key=key), _SHORT)
                clusters.setdefault(answer.header.cluster_id, endpoint)
            self.leave(channel)
        if len(clusters) > 1:
            raise ConfigError(f"--rdzv-endpoint: {' and '.join(clusters.values())} are different etcd clusters")

    def answers(self) -> bool:
        """Whether the next member in turn knows what the majority knows; one try."""
        channel, _ = self._connected()
        try:
            self._attempt(channel, "Range", messages.request("Range", key=b"/"), self.patience)
        except (grpc.RpcError, ValueError):
            self.leave(channel)
            return False
        return True

    def watch(self, key: bytes, range_end: bytes, after: int) -> tuple[Any, Any]:
        """The changes of a range of keys after a revision, as they happen on the member that answered last.

        Returns an iterator of answers, with a method `cancel`, and the member for `leave`.  The iterator raises
        `grpc.RpcError` when the member is gone or loses its leader.
        """
        channel, _ = self._connected()
        create = messages.message("WatchCreateRequest", key=key, range_end=range_end, start_revision=after + 1)
        answers = messages.response("Watch").FromString
        # One request is all there is to say; etcd goes on answering.
        stream = channel.unary_stream(messages.METHODS["Watch"], _encoded, answers)
        return stream(
            messages.request("Watch", create_request=create), metadata=self._metadata(self._login.token)
        ), channel

    def leave(self, member: Any) -> None:
        """Go on to the next member, unless that has happened already."""
        with self._lock:
            if member is None or member is not self._channel:
                return
            self._channel = None
            self._current = (self._current + 1) % len(self._access.endpoints)
        member.close()

    def close(self) -> None:
        """End all calls, from now on too."""
        self._closed.set()
        self.leave(self._channel)

    def _attempt(self, channel: Any, method: str, request: Any, timeout: float) -> Any:
        token = self._token(channel)
        try:
            return self._once(channel, method, request, timeout, token)
        except grpc.RpcError as error:
            if not any(text in (error.details() or "") for text in _OLD_TOKEN):
                raise
        with self._login.lock:
            if self._login.token == token:
                self._login.token = ""
        return self._once(channel, method, request, timeout, self._token(channel))

    def _token(self, channel: Any) -> str:
        """What this user is known by; asks for it if need be, with more patience than for anything else."""
        if not self._access.user:
            return ""
        with self._login.lock:
            if not self._login.token:
                login = messages.request("Authenticate", name=self._access.user, password=self._access.password)
                self._login.token = self._once(channel, "Authenticate", login, _LOGIN, "").token
            return self._login.token

    def _once(self, channel: Any, method: str, request: Any, timeout: float, token: str) -> Any:
        # A refreshed lease is a stream on paper; with one request and one answer it looks the same on the wire.
        call = channel.unary_unary(messages.METHODS[method], _encoded, messages.response(method).FromString)
        return call(request, timeout=timeout, metadata=self._metadata(token))

    def _metadata(self, token: str) -> list[tuple[str, str]]:
        # A member that knows no leader says so at once, and ends its watches, instead of letting us wait.
        return [("hasleader", "true"), *([("token", token)] if token else [])]

    def _connected(self) -> tuple[Any, str]:
        with self._lock:
            if self._closed.is_set():
                raise StoreLost(f"the connection to etcd at {self._access} was closed")
            endpoint = self._access.endpoints[self._current]
            if self._channel is None:
                self._channel = (
                    grpc.insecure_channel(endpoint, _OPTIONS)
                    if self._credentials is None
                    else grpc.secure_channel(endpoint, self._credentials, _OPTIONS)
                )
            return self._channel, endpoint

    def _complain(self, error: Any) -> None:
        """Raise what no other member would answer differently."""
        text = error.details() or ""
        if any(useless in text for useless in _USELESS):
            raise StoreLost(f"etcd at {self._access} refuses what it was asked: {text}") from error
        for known, advice in _REFUSALS.items():
            if known in text:
                raise ConfigError(advice.format(endpoints=self._access, user=self._access.user)) from error


def _encoded(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _credentials(access: EtcdAccess) -> Any:
    if not (access.tls or access.ca or access.cert):
        return None
    if bool(access.cert) != bool(access.key):
        raise ConfigError("etcd: a client's certificate and its key belong together; one of them is missing")

    def read(file: str) -> bytes | None:
        try:
            return Path(file).read_bytes() if file else None
        except OSError as error:
            raise ConfigError(f"etcd: {file} cannot be read: {error.strerror}") from error

    return grpc.ssl_channel_credentials(read(access.ca), read(access.key), read(access.cert))
