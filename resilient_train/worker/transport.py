"""Images in the memory of several nodes, brought by keepers' connections or by the ranks' process group.

Every rank may read from the keeper of another node.  Or a rank of that node hands over what stands in its memory,
through the job's process group: NCCL's links, on clusters that have them.  Which way is measured on the restore itself
(`resilient_train.plan.transport`).

Nothing that arrives is trusted: it is checked against the image's table, which the keeper has given.  What fails,
because somebody's memory is damaged or it has nothing to give any more, is read through keepers, who know of other
copies.
"""

from __future__ import annotations

import functools
import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch

from resilient_train.errors import ResilientError
from resilient_train.image.fetch import Range, Run, plan_runs
from resilient_train.image.parcel import MOST, Order, decode_orders, encode_orders, length, order, pack, unpack
from resilient_train.plan.transport import Sample, rate, servers, stages, worth_trying
from resilient_train.worker.exchange import Exchange
from resilient_train.worker.images import Images, pool

logger = logging.getLogger(__name__)

AHEAD = 2
"""Rounds that are packed, and as many that are on their way, while those before them are unpacked."""
_HANDS = 2
"""Threads that pack and unpack."""
_SAMPLE = struct.Struct("<Qd")


@dataclass(slots=True)
class Flows:
    """The runs that ranks hand over to each other, in this order."""

    coming: dict[int, list[tuple[int, Run]]] = field(default_factory=dict)
    """By the rank that has them: (image, run) that this one gets."""
    going: dict[int, list[Order]] = field(default_factory=dict)
    """By the rank that gets them: what this one hands over."""

    @property
    def size(self) -> int:
        """Bytes that this rank gets."""
        return sum(length(run) for runs in self.coming.values() for _, run in runs)

    def cut(self) -> list[Flows]:
        """What is tried by keepers, what opens connections, what is tried by the process group, and the rest."""
        parts = [Flows() for _ in range(4)]
        for which in ("coming", "going"):
            for rank, flow in getattr(self, which).items():
                ends = [0, *accumulate(stages(len(flow))), len(flow)]
                for part, (begin, end) in zip(parts, pairwise(ends), strict=True):
                    getattr(part, which)[rank] = flow[begin:end]
        return parts


class NodesImages(Images):
    """The images in the memory of several nodes, brought by all ranks together."""

    def __init__(self, images: Images, exchange: Exchange) -> None:
        """Args:
        images: as this rank alone reads them, those on its node near.
        exchange: to the other ranks.
        """
        super().__init__(images.held, images.reader, whole=True)
        self._exchange = exchange
        self._awaited = True

    def give_up(self, error: ResilientError) -> None:
        if self._awaited:
            self._awaited = False
            failed(self._exchange, error)

    def bring(self, ranges: Mapping[int, Sequence[Range]], threads: int) -> None:
        """Read ranges of images to their addresses, verified, each from where it is nearest.

        Raises:
            CheckpointDamaged: if a block fails its checksum.
            PeerFailed: if another rank cannot go on.
        """
        self._awaited = False
        near = set(self.held.near)
        far = sorted(ranges.keys() - near)
        said = self._exchange.from_all(lambda: np.array(sorted(near), dtype="<i4").tobytes())
        serving = servers(far, [np.frombuffer(data, "<i4").tolist() for data in said], self._exchange.rank)
        flows = Flows()
        for image in far:
            if image in serving:
                runs = plan_runs(ranges[image], self.reader(image).layout)
                flows.coming.setdefault(serving[image], []).extend((image, run) for run in runs if run.rows)
        for flow in flows.coming.values():
            flow.sort(key=lambda some: -length(some[1]))  # What is tried is to tell of the rest.
        others = {image: wanted for image, wanted in ranges.items() if image not in serving}
        with pool(threads) as readers:
            if self._ordered(flows):
                flows = self._tried(flows, readers)
            pending = [readers.submit(task) for image in others for task in self.reader(image).fetching(others[image])]
            by_group = self.rates is not None and self.rates[1] > self.rates[0]
            pending += [readers.submit(task) for task in (self._passed if by_group else self._fetching)(flows)]
            for done in pending:
                done.result()
        self._count(ranges)

    def _count(self, ranges: Mapping[int, Sequence[Range]]) -> None:
        super()._count(ranges)
        self.moved -= self.passed

    def _ordered(self, flows: Flows) -> bool:
        """Tell the ranks what this one wants of them, and hear what they want; False if it is too little for that."""
        mine = {rank: encode_orders(order(*run) for run in runs) for rank, runs in flows.coming.items()}
        rows = [(flows.size, 0), *((rank, len(data)) for rank, data in mine.items())]
        told = [
            np.frombuffer(data, "<i8").reshape(-1, 2).tolist()
            for data in self._exchange.from_all(lambda: np.array(rows, dtype="<i8").tobytes())
        ]
        if not worth_trying({rank: said[0][0] for rank, said in enumerate(told)}):
            return False
        wanted = {
            rank: torch.empty(size, dtype=torch.uint8)
            for rank, said in enumerate(told)
            for server, size in said[1:]
            if server == self._exchange.rank
        }
        sends = [(torch.frombuffer(bytearray(data), dtype=torch.uint8), rank) for rank, data in mine.items()]
        self._exchange.swap(sends, [(page, rank) for rank, page in wanted.items()])()

        def understood() -> bytes:
            flows.going = {rank: decode_orders(page.numpy().tobytes()) for rank, page in wanted.items()}
            return b""

        self._exchange.from_all(understood)
        return True

    def _tried(self, flows: Flows, readers: Executor) -> Flows:
        """Bring a little either way, by all ranks at once; the rest."""
        by_keepers, opening, by_group, rest = flows.cut()
        slow = self._timed(by_keepers, self._fetching, readers)
        self._timed(opening, self._passed, readers)
        self.rates = slow, self._timed(by_group, self._passed, readers)
        return rest

    def _timed(self, part: Flows, bring: Callable[[Flows], list[Callable[[], None]]], readers: Executor) -> float:
        def attempt() -> bytes:
            began = time.monotonic()
            for done in [readers.submit(task) for task in bring(part)]:
                done.result()
            return _SAMPLE.pack(part.size, time.monotonic() - began)

        return rate([Sample(*_SAMPLE.unpack(said)) for said in self._exchange.from_all(attempt)])

    def _fetching(self, flows: Flows) -> list[Callable[[], None]]:
        """What brings the runs through keepers."""
        wanted = [some for runs in flows.coming.values() for some in runs]
        return [functools.partial(self.reader(image).fetch, run) for image, run in wanted]

    def _passed(self, flows: Flows) -> list[Callable[[], None]]:
        """Hand the runs over, by all ranks; what brings those that did not arrive as they should be."""
        passing = _Passing(self, self._exchange, flows)
        self.passed += passing.run()
        return passing.again


class _Passing:
    """This rank's part in the handing over of flows: a round takes one run of each. Used once."""

    def __init__(self, images: Images, exchange: Exchange, flows: Flows) -> None:
        self._images = images
        self._exchange = exchange
        lengths = [len(runs) for runs in flows.coming.values()] + [len(orders) for orders in flows.going.values()]
        self._rounds = max(lengths, default=0)
        self._flows = flows
        self._pinned = exchange.fast.type == "cuda"
        self._idle: deque[torch.Tensor] = deque()
        self.again: list[Callable[[], None]] = []
        """What brings the runs that came damaged."""

    def run(self) -> int:
        """Bytes that were wanted and have arrived as they should be.

        All rounds take place, whatever this rank cannot hand over or finds damaged: others wait for them.
        """
        count = 0
        with pool(_HANDS) as hands:
            packing: deque[list[tuple[Future[torch.Tensor], int]]] = deque()
            moving: deque[tuple[Callable[[], None], list[tuple[int, int, Run, torch.Tensor]]]] = deque()
            unpacking: deque[list[Future[int]]] = deque()
            for number in range(self._rounds + 2 * AHEAD):
                if number < self._rounds:
                    packing.append([(hands.submit(self._packed, one), to) for to, one in self._going(number)])
                if AHEAD <= number < self._rounds + AHEAD:
                    moving.append(self._begun(number - AHEAD, packing.popleft()))
                if number >= 2 * AHEAD:
                    finish, arrived = moving.popleft()
                    finish()
                    unpacking.append([hands.submit(self._unpacked, *parcel) for parcel in arrived])
                if len(unpacking) > AHEAD:
                    count += sum(done.result() for done in unpacking.popleft())
            count += sum(done.result() for last in unpacking for done in last)
        return count

    def _going(self, number: int) -> list[tuple[int, Order]]:
        return [(to, orders[number]) for to, orders in self._flows.going.items() if number < len(orders)]

    def _begun(
        self, number: int, packed: list[tuple[Future[torch.Tensor], int]]
    ) -> tuple[Callable[[], None], list[tuple[int, int, Run, torch.Tensor]]]:
        coming = [(of, *runs[number], self._buffer()) for of, runs in self._flows.coming.items() if number < len(runs)]
        sends = [(parcel.result(), to) for parcel, to in packed]
        return self._exchange.swap(sends, [(buffer[: length(run)], of) for of, _, run, buffer in coming]), coming

    def _buffer(self) -> torch.Tensor:
        return self._idle.popleft() if self._idle else torch.empty(MOST, dtype=torch.uint8, pin_memory=self._pinned)

    def _packed(self, wanted: Order) -> torch.Tensor:
        try:
            return torch.from_numpy(pack(self._images.reader(wanted.image), wanted))
        except Exception as error:
            # Whatever it is: who gets zeros finds it out.
            logger.warning("cannot hand over blocks of rank %d's image: %r", wanted.image, error)
            return torch.zeros(wanted.size, dtype=torch.uint8)

    def _unpacked(self, of: int, image: int, run: Run, buffer: torch.Tensor) -> int:
        reader = self._images.reader(image)
        sound = unpack(reader, run, buffer.numpy()[: length(run)])
        self._idle.append(buffer)
        if sound:
            return run.wanted
        logger.warning(
            "%s: blocks %d to %d came damaged from rank %d; reading them anew", reader.name, run.first, run.last, of
        )
        self.again.append(functools.partial(reader.fetch, run))
        return 0


def failed(exchange: Exchange, error: ResilientError) -> None:
    """Tell the other ranks, who wait to hear what this one has near, that it cannot go on.

    Raises:
        ResilientError: the same.
    """

    def fail() -> bytes:
        raise error

    exchange.from_all(fail)
