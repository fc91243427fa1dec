"""What the keepers of all nodes hold: asked for when a state is to be found again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from resilient_train.errors import LinkLost
from resilient_train.spec.messages import Peers
from resilient_train.spec.world import Key
from resilient_train.storage.peer import HeldBy, HeldImage, HeldParity, ask_held

_TIMEOUT = 2.0
"""Seconds for a keeper to answer."""
_SHORT_TIMEOUT = 0.3
"""The same for a keeper whose node has no part in the world, or has left: it may be gone, with nobody to say so."""
_SHUNNED = 10.0
"""Seconds for which one that did not answer is not asked again: a restore asks several times, one after the other."""
_REMEMBERED = 90.0
"""Seconds that such a keeper is asked along; none lives longer."""
_PATIENCE = 8.0
"""Seconds for a living node's keeper that was lost to be replaced, or for its node to count as lost."""
_ASK_AGAIN = 0.1
_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the others hold."""

    images: Mapping[str, list[HeldImage]] = field(default_factory=dict)
    """Endpoint -> its images, of those that answered."""
    parities: Mapping[str, list[HeldParity]] = field(default_factory=dict)
    """The same for its parities."""
    chosen: Mapping[str, Key | None] = field(default_factory=dict)
    """Endpoint -> the state that it makes durable at the end of the job."""


class Survey:
    """Asks the keepers of other nodes, one round at a time; whoever asks during a round is answered by the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: dict[str, str] = {}
        self._aside: set[str] = set()
        """Those of them whose nodes have no part in the world."""
        self._former: dict[str, float] = {}
        self._silent: dict[str, float] = {}
        """When keepers whose nodes have left did not answer."""
        self._secret = b""
        self._waiting: list[tuple[Callable[[Finding], None], bool]] = []
        self._running = False

    def follow(self, peers: Peers, own: str, secret: bytes) -> None:
        """The keepers are these now; ``own`` is where this one serves."""
        now = time.monotonic()
        current = {endpoint: node for node, endpoint in [*peers.keepers, *peers.others] if endpoint and endpoint != own}
        with self._lock:
            for endpoint in self._current.keys() - current.keys():
                self._former[endpoint] = now
            for known in (self._former, self._silent):
                for endpoint in current.keys() & known.keys():
                    del known[endpoint]
            self._current, self._secret = current, secret
            self._aside = {endpoint for _, endpoint in peers.others}

    def ask(self, answer: Callable[[Finding], None], *, patient: bool = False) -> None:
        """Have ``answer`` called, from another thread, with what the others hold from now on.

        With ``patient`` the keepers of nodes that are there are asked again, for some seconds, until all have answered.
        """
        with self._lock:
            self._waiting.append((answer, patient))
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="survey", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                waiting, self._waiting = self._waiting, []
                if not waiting:
                    self._running = False
                    return
                now = time.monotonic()
                self._former = {endpoint: at for endpoint, at in self._former.items() if now < at + _REMEMBERED}
                self._silent = {endpoint: at for endpoint, at in self._silent.items() if now < at + _SHUNNED}
                # Who is asked once only is given all the time that it may need: what it holds may be the last state.
                patient = any(patient for _, patient in waiting)
                former = self._former.keys() - (self._silent.keys() if patient else set())
                short = self._aside if patient else set()
                targets = [(end, _SHORT_TIMEOUT if end in short else _TIMEOUT) for end in self._current]
                targets += [(endpoint, _SHORT_TIMEOUT) for endpoint in former]
                secret = self._secret
            finding = _asked(targets, secret)
            now = time.monotonic()
            with self._lock:
                self._silent |= dict.fromkeys(former - finding.images.keys(), now)
            if patient:
                finding = self._completed(finding, secret)
            for answer, _ in waiting:
                answer(finding)

    def _completed(self, finding: Finding, secret: bytes) -> Finding:
        """Ask those who did not answer again: to leave out what a living node holds would lose steps, or all.

        With little patience at first: it may be a lost node's, of whose loss this one is about to hear.
        """
        deadline, timeout = time.monotonic() + _PATIENCE, _SHORT_TIMEOUT
        while True:
            with self._lock:
                silent = self._current.keys() - finding.images.keys()
            if not silent or time.monotonic() >= deadline:
                return finding
            time.sleep(_ASK_AGAIN)
            more = _asked([(endpoint, timeout) for endpoint in silent], secret)
            timeout = min(2 * timeout, _TIMEOUT)
            finding = Finding(
                images={**finding.images, **more.images},
                parities={**finding.parities, **more.parities},
                chosen={**finding.chosen, **more.chosen},
            )


def _asked(targets: list[tuple[str, float]], secret: bytes) -> Finding:
    def ask(target: tuple[str, float]) -> HeldBy | None:
        try:
            return ask_held(target[0], secret, target[1])
        except LinkLost:
            return None

    if not targets:
        return Finding()
    try:
        with ThreadPoolExecutor(min(len(targets), _AT_ONCE), "ask") as pool:
            answers = dict(zip([endpoint for endpoint, _ in targets], pool.map(ask, targets), strict=True))
    except RuntimeError as error:
        # While the interpreter ends, its main thread still counts as alive.
        if "shutdown" not in str(error):
            raise
        return Finding()  # The keeper has ended meanwhile: nobody waits for the answer.
    there = {endpoint: answer for endpoint, answer in answers.items() if answer is not None}
    return Finding(
        images={endpoint: held.images for endpoint, held in there.items()},
        parities={endpoint: held.parities for endpoint, held in there.items()},
        chosen={endpoint: held.chosen for endpoint, held in there.items()},
    )
