"""``--rdzv-conf``: what may stand there, and numbers of seconds in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from resilient_train.errors import ConfigError

_OURS = (
    "timeout",
    "last_call_timeout",
    "user",
    "password",
    "password_file",
    "protocol",
    "cacert",
    "cert",
    "key",
    "ttl",
)
"""What has a meaning here."""
_TORCHS = frozenset(
    {
        *("rank", "is_host", "store_type", "use_libuv", "read_timeout", "join_timeout", "close_timeout"),
        *("heartbeat_timeout", "keep_alive_interval", "keep_alive_max_attempt", "num_agents", "etcd_prefix"),
        *("max_attempts", "ssl_cert", "ssl_cert_key", "ca_cert"),
    }
)
"""What torch's own rendezvous backends know besides."""


def read_conf(text: str) -> dict[str, str]:
    """``--rdzv-conf`` as it was given: ``key=value,...``.

    Raises:
        ConfigError: for what is no such pair, or a key that nobody knows.
    """
    pairs = [pair.strip() for pair in (text or "").split(",") if pair.strip()]
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"--rdzv-conf must be KEY=VALUE,KEY=VALUE,...; it has {bad[0]!r}")
    conf = {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}
    check_conf(conf)
    return conf


def check_conf(keys: Iterable[str]) -> None:
    """Refuse what would have no effect: a misspelt ``cacert`` must not mean another one.

    Raises:
        ConfigError: naming it.
    """
    for key in keys:
        if key not in _OURS and key not in _TORCHS:
            raise ConfigError(f"--rdzv-conf: {key!r} is not known; there are {', '.join(_OURS)}, and torch's own")


def seconds(conf: Mapping[str, object], key: str, default: float, least: float = 0.0) -> float:
    """A number of seconds.

    Raises:
        ConfigError: if it is none, or less than ``least``.
    """
    try:
        value = float(str(conf.get(key, default)))
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ConfigError(f"--rdzv-conf: {key} must be a number of seconds, at least {least:g}; it is {conf[key]!r}")
    return value
