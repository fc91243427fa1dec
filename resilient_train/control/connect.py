"""From torchrun's ``--rdzv-*`` flags to a store."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace

from resilient_train.control.endpoint import EtcdAccess, OwnEtcd, check_any_known, parse
from resilient_train.control.store import ControlStore
from resilient_train.errors import ConfigError


@contextmanager
def open_store(
    backend: str,
    endpoint: str,
    conf: Mapping[str, object],
    job: str,
    ttl: float,
    *,
    timeout: float = 60.0,
    leaves: list[str] | None = None,
    because: Callable[[str], None] | None = None,
) -> Iterator[ControlStore | None]:
    """The store that the flags name, or None if they mean the embedded one.

    With ``own:...`` this process also runs a member of the job's etcd, if its host is in the list: until the end of the
    context, or of the process.

    Args:
        backend: ``--rdzv-backend``.
        endpoint: ``--rdzv-endpoint``.
        conf: ``--rdzv-conf``; see `resilient_train.control.endpoint.parse`.
        job: ``--rdzv-id``.
        ttl: seconds without a sign of life after which a node's announcement expires.
        timeout: seconds to wait for the store, and for the other members of the job's own etcd.
        leaves: to which a folder is added that stays if this process is killed.
        because: told, from any thread, why there is no store yet.

    Raises:
        ConfigError: if the flags mean nothing, the store does not let us in, or what it needs is not installed.
        StoreLost: if it does not answer in time.
    """
    found = parse(backend, endpoint, conf)
    if found is None:
        yield None
    elif isinstance(found, OwnEtcd):
        try:
            from resilient_train.control.own_etcd import member
        except ImportError as error:
            raise _missing(error) from error
        with (
            member(found, timeout, leaves, because) as nearest,
            closing(connected(nearest.access, job, ttl, timeout=timeout, because=because)) as store,
        ):
            yield store
    else:
        # Not everybody asks the same member.
        shuffled = replace(found, endpoints=tuple(random.sample(found.endpoints, len(found.endpoints))))
        with closing(connected(shuffled, job, ttl, timeout=timeout, because=because)) as store:
            yield store


def connected(
    access: EtcdAccess, job: str, ttl: float, *, timeout: float, because: Callable[[str], None] | None = None
) -> ControlStore:
    """The store in an etcd; arguments and errors as of `open_store`."""
    try:
        from resilient_train.control.etcd import EtcdControlStore
    except ImportError as error:
        raise _missing(error) from error
    check_any_known([one.rpartition(":")[0].strip("[]") for one in access.endpoints])
    return EtcdControlStore(access, job, ttl, timeout, because=because)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(f"etcd needs what is not installed ({error}): pip install 'resilient-train[etcd]'")
