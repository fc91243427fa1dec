"""Where a state can be restored from: images in the memory of this node and of others, images in a durable tier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from resilient_train.errors import CheckpointDamaged, PeerFailed, ResilientError
from resilient_train.image.arena import Slot
from resilient_train.image.reader import ImageReader, memory_reader
from resilient_train.image.rebuild import ReadBytes, Remains, slices
from resilient_train.plan.parity import restorable
from resilient_train.plan.recovery import Found, Holders, not_covered, ranks_by_key
from resilient_train.spec.parity import Parity
from resilient_train.spec.world import Key, in_ancestry
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.peer import HeldImage, HeldParity, Listing, Peer
from resilient_train.storage.tier import Tier
from resilient_train.worker.exchange import Exchange
from resilient_train.worker.fanout import open_together, say_differed
from resilient_train.worker.images import Images
from resilient_train.worker.keeper_link import KeeperLink
from resilient_train.worker.rebuilt import reading, rebuilt_images
from resilient_train.worker.remote import Holder, RemoteImage
from resilient_train.worker.transport import NodesImages, failed

logger = logging.getLogger(__name__)

MOST_MISSING = 2000
"""Ranks whose images may be gone; what the ranks tell each other of a state is to fit into a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A state that can be restored."""

    key: Key
    """Which."""
    without: tuple[int, ...] = ()
    """The ranks whose images are gone; those of the others cover the state."""


class MemorySource:
    """The images that the keepers of this job hold, this node's and the others'."""

    name = "memory"

    def __init__(self, keeper: KeeperLink, exchange: Exchange | None = None) -> None:
        """Args:
        keeper: this node's.
        exchange: by which all ranks open a state together; None: all of them are on this node.
        """
        self._keeper = keeper
        self._exchange = exchange
        self.waits = False

    def candidates(self, past: Mapping[int, int | None]) -> list[Candidate]:
        """States of the job's past that are whole, newest first.

        A state of which images are gone is whole if all ranks held alike, and those whose images are left cover it: one
        rank is enough where all held everything.
        """
        whole: list[Candidate] = []
        listing = self._keeper.everywhere()
        for key, world, ranks in ranks_by_key(_found(listing), past):
            rebuilt = _restorable(key, listing, ranks) if len(ranks) < world else {}
            state = Candidate(key=key, without=tuple(sorted(set(range(world)) - ranks - rebuilt.keys())))
            if not state.without or (not whole and self._is_covered(state, listing)):
                whole.append(state)
        return whole

    def _is_covered(self, state: Candidate, listing: Listing) -> bool:
        if len(state.without) > MOST_MISSING:
            return False
        try:
            with self._opened(state, listing, None) as images:
                layout = images.reader(min(images.held.ranks)).layout
                return layout.alike and not not_covered(layout.entries, images.held)
        except CheckpointDamaged:
            return False

    def newest_lineage(self) -> int:
        """The highest lineage that any image, of a complete state or not, was computed by; 0 if there is none."""
        return max((image.key.lineage for image in _found(self._keeper.everywhere())), default=0)

    @contextmanager
    def open(self, state: Candidate, rank: int | None = None) -> Iterator[Images]:
        """The images of a state, which stay as they are meanwhile.

        Args:
            state: which.
            rank: whose own image is the nearest, if it is on this node.

        Raises:
            CheckpointDamaged: if one that was there is gone.
        """
        together: list[NodesImages] = []
        try:
            with self._opened(state, self._keeper.everywhere(), rank) as images:
                if self._exchange is not None:
                    together.append(NodesImages(images, self._exchange))
                yield together[0] if together else images
        except Exception as error:
            if self._exchange is not None:
                _tell(error, together[0].give_up if together else partial(failed, self._exchange))
            raise

    @contextmanager
    def _opened(self, state: Candidate, listing: Listing, rank: int | None) -> Iterator[Images]:
        key, here, endpoints = state.key, listing.here, listing.peers
        local = {image.rank: image for image in sorted(_of(key, here), key=lambda image: not image.replica)}
        originals = [image.rank for held in (here, *endpoints.values()) for image in _of(key, held, replicas=False)]
        if len(set(originals)) != len(originals):
            raise CheckpointDamaged(f"memory: several images of the same rank claim to be {key}")
        world = max((image.world for held in (here, *endpoints.values()) for image in _of(key, held)), default=0)
        opened = self._keeper.open(
            [image.slot for image in local.values()] + [held.slot for held in _parities(key, listing).get("", [])]
        )
        with ExitStack() as stack:
            for memory in opened.values():
                stack.callback(memory.close)
            peers = {endpoint: Peer(endpoint, listing.secret) for endpoint in endpoints}
            for peer in peers.values():
                stack.callback(peer.close)
            views = {}
            for owner, image in local.items():
                view = stack.enter_context(opened[image.slot].reading(key)) if image.slot in opened else None
                if view is not None:
                    stack.callback(view.release)
                    views[owner] = view
            remote: dict[int, list[tuple[Holder, HeldImage]]] = {
                owner: [(peers[endpoint], image) for endpoint, image in holders]
                for owner, holders in _remote(key, endpoints).items()
            }
            expected = set(range(world)) - set(state.without)
            if expected - views.keys() - remote.keys():
                there = {rank: reading(holders) for rank, holders in remote.items()}
                there |= {rank: slices(view) for rank, view in views.items()}
                parities = list(_read_parities(key, listing, opened, peers, stack))
                remote |= rebuilt_images(key, world, Remains(images=there, parities=parities))
            for owner in sorted(expected - views.keys() - remote.keys()):
                raise CheckpointDamaged(f"memory of rank {owner}: the image of {key} is gone")
            self.waits = not expected <= views.keys()

            def open_copy(owner: int) -> ImageReader:
                return RemoteImage(owner, remote[owner]).reader

            def open_image(owner: int) -> ImageReader:
                if owner not in views:
                    return open_copy(owner)
                return _with_copies(owner, views[owner], open_copy if owner in remote else None)

            near = sorted(views.keys() & expected, key=lambda owner: (owner != rank, owner))
            images = Images(Holders(world=world, ranks=expected, near=near), open_image, whole=True)
            yield images
            images.release()


def _parities(key: Key, listing: Listing) -> dict[str, list[HeldParity]]:
    """Those of a state, by the keeper that holds them."""
    found = {where: [one for one in held if one.key == key] for where, held in listing.parities.items()}
    return {where: held for where, held in found.items() if held and (not where or where in listing.peers)}


def _read_parities(
    key: Key, listing: Listing, opened: Mapping[int, Slot], peers: Mapping[str, Peer], stack: ExitStack
) -> Iterator[tuple[Parity, ReadBytes]]:
    """The parities of a state, and how their bytes are read."""
    for endpoint, parities in _parities(key, listing).items():
        for held in parities:
            if endpoint:
                yield held.parity, reading([(peers[endpoint], held.as_image())], held.begin)
            elif held.slot in opened:
                view = stack.enter_context(opened[held.slot].reading(key))
                if view is not None:
                    stack.callback(view.release)
                    yield held.parity, slices(view, held.begin)


def _restorable(key: Key, listing: Listing, ranks: Collection[int]) -> dict[int, int]:
    """The lost images of a state that can be made again of parities: rank -> bytes."""
    return restorable([one.parity for held in _parities(key, listing).values() for one in held], ranks)


def _found(listing: Listing) -> list[Found]:
    images = [*listing.here, *(image for held in listing.peers.values() for image in held)]
    return [Found(key=image.key, rank=image.rank, world=image.world) for image in images]


def _with_copies(owner: int, view: memoryview, open_copy: Callable[[int], ImageReader] | None) -> ImageReader:
    """A reader of an image in this node's memory that goes on with a copy on another node if there is damage."""
    name = f"memory of rank {owner}"

    def elsewhere() -> bool:
        if open_copy is None:
            return False
        logger.warning("%s on this node is damaged; reading a copy elsewhere", name)
        return reader.follow(open_copy(owner))

    try:
        reader = memory_reader(name, view, elsewhere)
    except CheckpointDamaged as error:
        if open_copy is None:
            raise
        logger.warning("%s; reading a copy elsewhere", error)
        return open_copy(owner)
    return reader


def _of(key: Key, images: list[HeldImage], *, replicas: bool = True) -> list[HeldImage]:
    return [image for image in images if image.key == key and (replicas or not image.replica)]


def _remote(key: Key, endpoints: Mapping[str, list[HeldImage]]) -> dict[int, list[tuple[str, HeldImage]]]:
    """By rank, the keepers on other nodes that hold its image, the one that has the original first."""
    holders: dict[int, list[tuple[str, HeldImage]]] = {}
    for endpoint, images in endpoints.items():
        for image in _of(key, images):
            holders.setdefault(image.rank, []).append((endpoint, image))
    for places in holders.values():
        places.sort(key=lambda place: (place[1].replica, place[0]))
    return holders


class TierSource:
    """The committed checkpoints of a durable tier."""

    def __init__(self, tier: Tier, exchange: Exchange | None = None) -> None:
        """Args:
        tier: where they are.
        exchange: by which all ranks open a state together; None: there are no others.
        """
        self.name = tier.name
        self.waits = not tier.local
        self._tier = tier
        self._exchange = exchange

    def candidates(self, past: Mapping[int, int | None]) -> list[Candidate]:
        """Committed states of the job's past, newest first."""
        committed, _ = listing(self._tier)
        return [Candidate(key=key) for key in reversed(committed) if in_ancestry(key, past)]

    def newest_lineage(self) -> int:
        """The highest lineage that any checkpoint here, committed or not, was computed by; 0 if there is none."""
        committed, unfinished = listing(self._tier)
        return max((key.lineage for key in committed + unfinished), default=0)

    @contextmanager
    def open(self, state: Candidate, rank: int | None = None) -> Iterator[Images]:  # noqa: ARG002 - all are as near
        """The images of a state; where there are several ranks, all of them open it and bring what they want once.

        Raises:
            CheckpointDamaged: if the checkpoint is not what was committed.
        """
        if self._exchange is None:
            manifest = read_manifest(self._tier, state.key)
            say_differed(manifest)
            yield Images.committed(self._tier, manifest)
            return
        images = open_together(self._tier, state.key, self._exchange)
        try:
            yield images
        except Exception as error:
            _tell(error, images.give_up)
            raise


def _tell(error: Exception, tell: Callable[[ResilientError], None]) -> None:
    """Whoever waits to hear what this rank wants hears of its error."""
    with suppress(ResilientError):  # What everybody hears is raised here, too.
        tell(error if isinstance(error, ResilientError) else PeerFailed(f"{type(error).__name__}: {error}"))
