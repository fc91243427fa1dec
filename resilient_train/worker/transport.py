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
from itertools import accumulate

import numpy as np
import torch

from resilient_train.errors import FormatError, ResilientError
from resilient_train.image.fetch import Range, Run, plan_runs
from resilient_train.image.parcel import MOST, Order, decode_orders, encode_orders, length, order, pack, unpack
from resilient_train.plan.transport import LEAST, Flow, Sample, first_rounds, rate, servers, stages, turns
from resilient_train.worker.exchange import Exchange
from resilient_train.worker.images import Images, pool

logger = logging.getLogger(__name__)

AHEAD = 1
"""Rounds that are packed, and as many that are on their way, while those before them are unpacked."""
_HANDS = 2
"""Threads that pack and unpack."""
_SAMPLE = struct.Struct("<Qd")


@dataclass(slots=True)
class Rounds:
    """What this rank sends and receives, by round: whatever is in one on one side is in the same on the other."""

    coming: dict[int, list[tuple[int, int, Run]]] = field(default_factory=dict)
    """(the rank that hands it over, image, run)."""
    going: dict[int, list[tuple[int, Order]]] = field(default_factory=dict)
    """(the rank that gets it, what)."""

    @property
    def size(self) -> int:
        """Bytes that this rank gets."""
        return sum(length(run) for parcels in self.coming.values() for *_, run in parcels)


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
        self._buffers: deque[torch.Tensor] = deque()
        """Room for what arrives."""

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
        far = sorted(ranges.keys() - set(self.held.near))
        runs: dict[int, list[Run]] = {}

        def planned() -> int:
            for image in far:
                runs[image] = [run for run in plan_runs(ranges[image], self.reader(image).layout) if run.rows]
            return sum(length(run) for some in runs.values() for run in some)

        tried = self._exchange.greatest(planned) >= LEAST
        with pool(threads) as readers:
            rest, served = self._tried(runs, readers) if tried else (Rounds(), set[int]())
            others = {image: wanted for image, wanted in ranges.items() if image not in served}
            pending = [readers.submit(task) for image in others for task in self.reader(image).fetching(others[image])]
            by_group = self.rates is not None and self.rates[1] > self.rates[0]
            pending += [readers.submit(task) for task in (self._passed if by_group else self._fetching)(rest)]
            for done in pending:
                done.result()
        self._count(ranges)

    def _count(self, ranges: Mapping[int, Sequence[Range]]) -> None:
        super()._count(ranges)
        self.moved -= self.passed

    def _tried(self, runs: Mapping[int, list[Run]], readers: Executor) -> tuple[Rounds, set[int]]:
        """Bring a little either way, by all ranks at once; (the rest, the images that ranks hand over)."""
        rank, near = self._exchange.rank, np.array(sorted(self.held.near), dtype="<i4").tobytes()
        told = [np.frombuffer(data, "<i4").tolist() for data in self._exchange.from_all(lambda: near)]
        serving = servers(sorted(runs), told, rank)
        wanted: dict[int, list[tuple[int, Run]]] = {}
        for image, server in serving.items():
            wanted.setdefault(server, []).extend((image, run) for run in runs[image])
        for flow in wanted.values():
            flow.sort(key=lambda some: -length(some[1]))  # What is tried is to tell of the rest.
        parts = by_keepers, opening, by_group, rest = self._ordered(wanted)

        def reserved() -> int:
            # From here on an error would leave others in the middle of a transfer.
            count = max(map(_most_at_once, parts))
            pinned = self._exchange.fast.type == "cuda"
            self._buffers.extend(torch.empty(MOST, dtype=torch.uint8, pin_memory=pinned) for _ in range(count))
            self._exchange.reserve(2 * count * MOST)
            return 0

        self._exchange.greatest(reserved)
        slow = self._timed(by_keepers, self._fetching, readers)
        self._timed(opening, self._passed, readers)
        self.rates = slow, self._timed(by_group, self._passed, readers)
        return rest, set(serving)

    def _ordered(self, wanted: Mapping[int, list[tuple[int, Run]]]) -> list[Rounds]:
        """Tell the ranks what this one wants of them, and hear what they want; all of it, by `stages`."""
        rank = self._exchange.rank
        pages = {server: encode_orders(order(*run) for run in runs) for server, runs in wanted.items()}
        rows = [(server, len(runs), len(pages[server])) for server, runs in wanted.items()]
        said = self._exchange.from_all(lambda: np.array(rows, dtype="<i8").tobytes())
        sizes = {
            Flow(server, receiver, count): size
            for receiver, data in enumerate(said)
            for server, count, size in np.frombuffer(data, "<i8").reshape(-1, 3).tolist()
        }
        heard: dict[int, torch.Tensor] = {}

        def prepared() -> int:
            mine = [(flow.receiver, size) for flow, size in sizes.items() if flow.server == rank and size]
            heard.update((receiver, torch.empty(size, dtype=torch.uint8)) for receiver, size in mine)
            return 0

        sends = [(torch.frombuffer(bytearray(page), dtype=torch.uint8), to) for to, page in pages.items() if page]
        self._exchange.greatest(prepared)
        self._exchange.connect()
        self.adrift = True
        self._exchange.swap(sends, [(page, of) for of, page in heard.items()])()
        self.adrift = False
        orders: dict[int, list[Order]] = {}

        def understood() -> bytes:
            orders.update((receiver, decode_orders(page.numpy().tobytes())) for receiver, page in heard.items())
            for flow in sizes:
                if flow.server == rank and len(orders.get(flow.receiver, ())) != flow.runs:
                    raise FormatError(f"rank {flow.receiver} wants other than {flow.runs} runs of blocks")
            return b""

        self._exchange.from_all(understood)
        parts = [Rounds() for _ in range(4)]
        turn_of = turns(sizes)
        cuts = {flow: [0, *accumulate(stages(flow.runs)), flow.runs] for flow in sizes}
        for number, part in enumerate(parts):
            starts = first_rounds((turn_of[flow], cut[number + 1] - cut[number]) for flow, cut in cuts.items())
            for flow, cut in cuts.items():
                first = starts[turn_of[flow]]
                for index in range(cut[number], cut[number + 1]) if rank in flow[:2] else ():
                    at = first + index - cut[number]
                    if flow.receiver == rank:
                        part.coming.setdefault(at, []).append((flow.server, *wanted[flow.server][index]))
                    else:
                        part.going.setdefault(at, []).append((flow.receiver, orders[flow.receiver][index]))
        return parts

    def _timed(self, part: Rounds, bring: Callable[[Rounds], list[Callable[[], None]]], readers: Executor) -> float:
        began = time.monotonic()
        tasks = bring(part)

        def attempt() -> bytes:
            for done in [readers.submit(task) for task in tasks]:
                done.result()
            return _SAMPLE.pack(part.size, time.monotonic() - began)

        return rate([Sample(*_SAMPLE.unpack(said)) for said in self._exchange.from_all(attempt)])

    def _fetching(self, part: Rounds) -> list[Callable[[], None]]:
        """What brings the runs through keepers."""
        wanted = [parcel for parcels in part.coming.values() for parcel in parcels]
        return [functools.partial(self.reader(image).fetch, run) for _, image, run in wanted]

    def _passed(self, part: Rounds) -> list[Callable[[], None]]:
        """Hand the runs over, by all ranks; what brings those that did not arrive as they should be."""
        passing = _Passing(self, self._exchange, part, self._buffers)
        self.adrift = True
        self.passed += passing.run()
        self.adrift = False
        return passing.again


class _Passing:
    """This rank's part in the handing over of runs. Used once."""

    def __init__(self, images: Images, exchange: Exchange, part: Rounds, buffers: deque[torch.Tensor]) -> None:
        """Args:
        images: what is handed over.
        exchange: to the other ranks.
        part: what is.
        buffers: room for what arrives, for as much as `_most_at_once` says.
        """
        self._images = images
        self._exchange = exchange
        self._part = part
        self._idle = buffers
        self.again: list[Callable[[], None]] = []
        """What brings the runs that came damaged."""

    def run(self) -> int:
        """Bytes that were wanted and have arrived as they should be.

        All rounds take place, whatever this rank cannot hand over or finds damaged: others wait for them.
        """
        count = 0
        rounds = sorted(self._part.coming.keys() | self._part.going.keys())
        with pool(_HANDS) as hands:
            packing: deque[list[tuple[Future[torch.Tensor], int]]] = deque()
            moving: deque[tuple[Callable[[], None], list[tuple[int, int, Run, torch.Tensor]]]] = deque()
            unpacking: deque[list[Future[int]]] = deque()
            for index in range(len(rounds) + 2 * AHEAD):
                if index < len(rounds):
                    going = self._part.going.get(rounds[index], [])
                    packing.append([(hands.submit(self._packed, wanted), to) for to, wanted in going])
                if AHEAD <= index < len(rounds) + AHEAD:
                    moving.append(self._begun(rounds[index - AHEAD], packing.popleft()))
                if index >= 2 * AHEAD:
                    finish, arrived = moving.popleft()
                    finish()
                    unpacking.append([hands.submit(self._unpacked, *parcel) for parcel in arrived])
                if len(unpacking) > AHEAD:
                    count += sum(done.result() for done in unpacking.popleft())
            count += sum(done.result() for last in unpacking for done in last)
        return count

    def _begun(
        self, number: int, packed: list[tuple[Future[torch.Tensor], int]]
    ) -> tuple[Callable[[], None], list[tuple[int, int, Run, torch.Tensor]]]:
        coming = [(*parcel, self._idle.popleft()) for parcel in self._part.coming.get(number, [])]
        sends = [(parcel.result(), to) for parcel, to in packed]
        return self._exchange.swap(sends, [(buffer[: length(run)], of) for of, _, run, buffer in coming]), coming

    def _packed(self, wanted: Order) -> torch.Tensor:
        try:
            return torch.from_numpy(pack(self._images.reader(wanted.image), wanted))
        except Exception as error:
            # Whatever it is: who gets zeros finds it out.
            logger.warning("cannot hand over blocks of rank %d's image: %r", wanted.image, error)
            return torch.zeros(wanted.size, dtype=torch.uint8)

    def _unpacked(self, of: int, image: int, run: Run, buffer: torch.Tensor) -> int:
        reader = self._images.reader(image)
        try:
            sound = unpack(reader, run, buffer.numpy()[: length(run)])
        except Exception as error:
            # Whatever it is: who waits for this rank's next round does not wait in vain.
            logger.warning("cannot unpack blocks of rank %d's image: %r", image, error)
            sound = False
        self._idle.append(buffer)
        if sound:
            return run.wanted
        logger.warning(
            "%s: blocks %d to %d came damaged from rank %d; reading them anew", reader.name, run.first, run.last, of
        )
        self.again.append(functools.partial(reader.fetch, run))
        return 0


def _most_at_once(part: Rounds) -> int:
    """Runs that have arrived, or are to, and are not unpacked: see `_Passing.run`."""
    rounds = sorted(part.coming.keys() | part.going.keys())
    counts = [len(part.coming.get(number, ())) for number in rounds]
    return max((sum(counts[at : at + 2 * AHEAD + 2]) for at in range(len(counts))), default=0)


def failed(exchange: Exchange, error: ResilientError) -> None:
    """Tell the other ranks, who wait to hear how much this one wants, that it cannot go on.

    Raises:
        ResilientError: the same.
    """

    def fail() -> int:
        raise error

    exchange.greatest(fail)
