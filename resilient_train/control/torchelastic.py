"""A rendezvous for plain torchrun that outlives every node: ``--rdzv-backend=resilient --rdzv-endpoint=etcd://...``.

torchrun finds it by `resilient_train.control.torchrun`.  It needs a store that lasts; `resilient_train.control.connect`
says which.  Who is there is known by leases, who comes by a watch, and `resilient_train.plan.rendezvous` decides.
Every round has a TCPStore of its own, served by the agent of its first node: nothing of the round before is mistaken
for this one's.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import api

from resilient_train.clock import Clock, MonotonicClock
from resilient_train.control.connect import open_store
from resilient_train.control.endpoint import OwnEtcd, parse, towards_any
from resilient_train.control.news import Follower
from resilient_train.control.rdzv_conf import check_conf, seconds
from resilient_train.control.store import ControlStore
from resilient_train.control.tcp import serve
from resilient_train.errors import StoreLost
from resilient_train.plan import rendezvous
from resilient_train.plan.rendezvous import Say, Terms, View
from resilient_train.spec.node import NodeInfo
from resilient_train.spec.world import Phase, WorldRecord

BACKEND = "resilient"
_PROBE = 0.2
"""Seconds between two looks whether those who are waited for are dead, and for each of them to answer."""
_CONNECT = 30.0
"""Seconds to reach the store of a round."""


def create(parameters: api.RendezvousParameters) -> api.RendezvousHandler:
    """A handler from torchrun's flags.

    Besides what `resilient_train.control.endpoint.parse` knows, ``--rdzv-conf`` takes, in seconds: ``ttl`` (5), after
    which a node without a sign of life is lost; ``last_call_timeout`` (5), for which the first round waits for more
    than the fewest nodes; ``join_timeout`` (600), for a round to come about.

    Raises:
        ConfigError: if the flags mean nothing, or the store does not let us in.
        StoreLost: if the store does not answer.
    """
    conf = parameters.config
    check_conf(conf)
    waits = {key: seconds(conf, key, default, least) for key, (default, least) in _SECONDS.items()}
    with ExitStack() as stack:
        opened = open_store("etcd", parameters.endpoint, conf, parameters.run_id, waits["ttl"])
        store = stack.enter_context(opened)
        assert store is not None
        return ResilientRendezvousHandler(
            store,
            parameters.run_id,
            Terms(minimum=parameters.min_nodes, maximum=parameters.max_nodes, last_call=waits["last_call_timeout"]),
            parameters.local_addr or _address_toward(parameters.endpoint, conf),
            waits["ttl"],
            waits["join_timeout"],
            stack.pop_all().close,
        )


class ResilientRendezvousHandler(api.RendezvousHandler):
    """One node's part in the rendezvous."""

    use_agent_store = True

    def __init__(
        self,
        store: ControlStore,
        run_id: str,
        terms: Terms,
        address: str,
        ttl: float,
        join_timeout: float,
        close: Callable[[], None],
        clock: Clock | None = None,
    ) -> None:
        """Join the job.

        Args:
            store: for this handler alone.
            run_id: the job's id.
            terms: what the job asks of a round.
            address: where the others reach this node.
            ttl: seconds without a sign of life after which this node is lost.
            join_timeout: seconds for a round to come about.
            close: called at the end.
            clock: for all of them.
        """
        self._store = store
        self._run_id = run_id
        self._terms = terms
        self._address = address
        self._ttl = ttl
        self._join_timeout = join_timeout
        self._close = close
        self._clock = clock or MonotonicClock()
        self._order = store.join()
        self._me = f"n{self._order}-{uuid.uuid4().hex[:8]}"
        self._left = 0
        self._acknowledged = 0
        self._said: NodeInfo | None = None
        self._dead: dict[str, NodeInfo] = {}
        """What those last announced whose hosts have refused."""
        self._servers: list[dist.TCPStore] = []
        self._follower = Follower(store, ttl, self._clock)

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> api.RendezvousInfo:
        server = serve(self._address, 0)
        # Agents and workers of the round before may still talk to its store.
        self._servers = [*self._servers[-1:], server]
        self._left = self._acknowledged
        return self._meet(f"{self._address}:{server.port}", server)

    def num_nodes_waiting(self) -> int:
        return rendezvous.nodes_waiting(self._view(), self._terms, self._follower.missing(), self._ttl / 2)

    def is_closed(self) -> bool:
        record = self._follower.news().record
        return record is not None and record.phase is not Phase.RUNNING

    def set_closed(self) -> None:
        try:
            record = self._store.look().record
            while record is None or record.phase is Phase.RUNNING:
                record = self._store.swap(rendezvous.closing(record))
        except StoreLost as error:
            raise api.RendezvousConnectionError(str(error)) from error

    def shutdown(self) -> bool:
        try:
            self.set_closed()
            self._follower.stop()
            self._store.withdraw()
        except (api.RendezvousConnectionError, StoreLost):
            return False
        finally:
            self._follower.stop()
            self._close()
        return True

    def _view(self) -> View:
        news = self._follower.news()
        return View(
            me=self._me,
            left=self._left,
            acknowledged=self._acknowledged,
            record=news.record,
            nodes=[node for node in news.nodes if self._dead.get(node.node) != node],
        )

    def _probe(self, nodes: Sequence[str]) -> None:
        """Find out which of some nodes are dead: their hosts refuse; those that are silent may live."""
        until = self._clock.now() + 2 * _PROBE
        for node in self._follower.news().nodes:
            if node.node in nodes and self._clock.now() < until:
                host, _, port = node.endpoint.rpartition(":")
                try:
                    socket.create_connection((host, int(port)), _PROBE).close()
                except ConnectionRefusedError:
                    self._dead[node.node] = node
                except OSError:
                    pass

    def _meet(self, endpoint: str, server: dist.TCPStore) -> api.RendezvousInfo:
        now = since = self._clock.now()
        deadline = now + self._join_timeout
        waiting, before, trouble = True, rendezvous.gathered(self._view()), ""
        while now < deadline:
            number, due = self._follower.news().number, deadline
            try:
                self._say(rendezvous.announcement(self._me, self._order, endpoint, waiting, self._acknowledged))
                view = self._view()
                if (gathered := rendezvous.gathered(view)) != before:
                    since, before = now, gathered
                step = rendezvous.step(view, self._terms, now - since)
                met = self._begin(view.record, server) if step.say is Say.BEGIN and view.record is not None else None
                if met is not None:
                    return met
                if step.say is Say.CLOSED:
                    raise api.RendezvousClosedError(f"the rendezvous {self._run_id!r} is closed")
                if step.say is Say.ACKNOWLEDGE and view.record is not None:
                    waiting, self._acknowledged, due = False, view.record.generation, now
                elif step.say in (Say.BEGIN, Say.GIVE_UP):
                    waiting, self._left, due = True, self._acknowledged, now
                elif step.say is Say.PROPOSE and step.record is not None:
                    self._store.swap(step.record)
                    self._follower.refresh()
                    due = now
                elif step.until is not None:
                    due = min(deadline, since + step.until)
                if gathered[1] and rendezvous.lost(view.record, view.nodes):
                    self._probe(gathered[1])
                    due = min(due, now + _PROBE)
                trouble = ""
            except StoreLost as error:
                # It may come back before the time is over.
                trouble, due = f": {error}", now + self._ttl / 4
            self._follower.wait(number, due - now)
            now = self._clock.now()
        raise api.RendezvousTimeoutError(
            f"no round came about in {self._join_timeout:.0f} s: {len(before[0])} nodes wait and "
            f"{self._terms.minimum} are needed{trouble}"
        )

    def _begin(self, record: WorldRecord, server: dist.TCPStore) -> api.RendezvousInfo | None:
        """Connect to the round's store; None if its first node is gone already."""
        rank, size = record.members.index(self._me), len(record.members)
        host, _, port = record.bootstrap.rpartition(":")
        store = server
        if rank > 0:
            try:
                store = dist.TCPStore(host, int(port), None, False, timedelta(seconds=_CONNECT), wait_for_workers=False)
            except (dist.DistError, RuntimeError, OSError):
                return None
        meeting = api.RendezvousStoreInfo(host, int(port))
        return api.RendezvousInfo(dist.PrefixStore("agents", store), rank, size, meeting)

    def _say(self, info: NodeInfo) -> None:
        if info != self._said:
            self._store.announce(info)
            self._follower.refresh()
            self._said = info


def _address_toward(endpoint: str, conf: Mapping[str, object]) -> str:
    """The address of this host on its way to the store."""
    found = parse("etcd", endpoint, conf)
    assert found is not None
    return towards_any((found.access if isinstance(found, OwnEtcd) else found).endpoints)


_SECONDS = {"ttl": (5.0, 0.5), "last_call_timeout": (5.0, 0.0), "join_timeout": (600.0, 0.1)}
"""What ``--rdzv-conf`` takes: the default, and the least."""


__all__ = ["BACKEND", "ResilientRendezvousHandler", "create"]
