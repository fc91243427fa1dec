"""Make a lost image whole again, as a copy in this node's memory: for a last state that is to become durable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.rebuild import ReadBytes, Remains, slices
from resilient_train.image.verified import VerifiedImage
from resilient_train.keeper.shelf import Shelf, replica_owner
from resilient_train.keeper.survey import Finding
from resilient_train.spec.parity import Parity
from resilient_train.spec.world import Key
from resilient_train.storage.peer import HeldImage, Peer

_PIECE = 8 << 20


@contextmanager
def remains(shelf: Shelf, finding: Finding, key: Key, secret: bytes) -> Iterator[Remains]:
    """What is left of a state, on all nodes.

    Args:
        shelf: what is here.
        finding: what is elsewhere.
        key: the state.
        secret: the job's.
    """
    with ExitStack() as stack:
        images: dict[int, ReadBytes] = {}
        parities: list[tuple[Parity, ReadBytes]] = []
        for endpoint, held in finding.images.items():
            peer = Peer(endpoint, secret)
            stack.callback(peer.close)
            images |= {image.rank: _reading(peer, image) for image in held if image.key == key}
            for parity in finding.parities.get(endpoint, []):
                if parity.key == key:
                    parities.append((parity.parity, _reading(peer, parity.as_image(), parity.begin)))
        for listed in (image for image in shelf.images() if image.stamp.key == key):
            if (view := stack.enter_context(shelf.reading(listed.slot, key))) is not None:
                images[listed.stamp.rank] = slices(view)
        for parity in (parity for parity in shelf.parities() if parity.key == key):
            if (view := stack.enter_context(shelf.reading(parity.slot, key))) is not None:
                parities.append((parity.parity, slices(view, parity.begin)))
        yield Remains(images=images, parities=parities)


def _reading(peer: Peer, image: HeldImage, begin: int = 0) -> ReadBytes:
    return lambda offset, length: peer.read(image, begin + offset, length)


def rebuild(shelf: Shelf, left: Remains, key: Key, rank: int) -> int:
    """Make a lost rank's image again, and verify it; the number of its slot.

    Raises:
        MemoryRefused: if there is no memory for it.
        CheckpointDamaged: if what it is made of is damaged, or gone.
        LinkLost: if a keeper that is needed is gone.
    """
    size = left.lost().get(rank, 0)
    name = f"rank {rank}'s image of {key}, made again"
    descriptor = create_memory(name, max(1, size))
    try:
        slot = Slot(descriptor)
        try:
            for at in range(0, size, _PIECE):
                data = left.rebuild(rank, at, min(_PIECE, size - at))
                slot.map[at : at + len(data)] = data
            _check(name, slot, key, rank)
        finally:
            slot.close()
        return shelf.add(descriptor, replica_owner(f"{_node_of(left, rank)}/{rank}"))
    finally:
        os.close(descriptor)


def _check(name: str, slot: Slot, key: Key, rank: int) -> None:
    image = VerifiedImage(name, slot.size, lambda offset, length: slot.map[offset : offset + length])
    if (image.stamp.key, image.stamp.rank) != (key, rank) or image.bad_blocks(0, image.layout.blocks - 1):
        raise CheckpointDamaged(f"{name}: what it was made of is damaged")


def _node_of(left: Remains, rank: int) -> str:
    pieces = (item for parity, _ in left.parities for item in parity.pieces.items())
    return next(node for node, parts in pieces if any(part.rank == rank for part in parts))
