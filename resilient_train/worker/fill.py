"""Fill the training state from the images of one key: what `plan.recovery` planned, carried out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from resilient_train.errors import CheckpointDamaged, FormatError, StateMismatch
from resilient_train.image.device import Uploads
from resilient_train.image.fetch import Range
from resilient_train.image.reader import ImageReader
from resilient_train.image.snapshot import addressable
from resilient_train.plan.division import common_entries, copies_by_division
from resilient_train.plan.partition import PRIVATE, may_differ
from resilient_train.plan.recovery import (
    Copy,
    Want,
    copies_by_entries,
    copies_by_layout,
    missing,
    not_covered,
    prove,
)
from resilient_train.spec.shard import Entry
from resilient_train.worker.documents import merged
from resilient_train.worker.images import Images
from resilient_train.worker.rng import rng_name, rng_setters
from resilient_train.worker.state import State
from resilient_train.worker.tensors import as_bytes, stored

_LEAST_ROW = 64
"""Bytes of a row below which it is faster to bring what is between them, too."""


def fill(state: State, images: Images, rank: int, world: int, threads: int = 1) -> dict[str, bool]:
    """Write the images' state into ``state``; nothing of it refers to the images afterwards.

    Before anything is written, every element is proven to have exactly one source.  Every byte is verified, after it
    has been written: with an error, the tensors are neither what they were nor what they should be.

    Args:
        state: what to fill.
        images: of one key.
        rank: this rank.
        world: number of ranks.
        threads: that read and verify.

    Returns:
        Where ranks have parts of their own, the name of each tensor of the checkpoint, in order, and whether this rank
        leaves it to others; else nothing.

    Raises:
        StateMismatch: if the images are of another model; every tensor that differs is named.
        CheckpointDamaged: if a block fails its checksum or the images do not cover the state.
    """
    held = images.held
    if not held.ranks:
        raise CheckpointDamaged("there are no images of it any more")
    first = images.reader(min(held.ranks))
    own = images.reader(rank) if held.world == world and rank in held.ranks else None
    told, document, partial = _document(images, own, first)
    common = _common(images, document, first)
    everything = _entries(images, first, own, common)
    there = {entry.name: entry for of_rank in everything.values() for entry in of_rank}
    try:
        with torch.no_grad():
            targets = state.targets(document, there, partial=partial)
        # Another library's state dict, which became a checkpoint of ours, says nothing of generators.
        without = own is None or document.get("rng", ...) is None
        setters = [] if own is None or without else rng_setters(document.get("rng"), _generators(own, rank))
    except FormatError as error:
        raise CheckpointDamaged(f"{told.name}: {error}") from error
    wants, places = [], {}
    back: list[Callable[[], object]] = []
    with torch.no_grad():
        for name, tensor in targets.tensors.items():
            entry, local = stored(name, tensor)
            wants.append(Want(name=name, dtype=_dtype(entry), global_shape=entry.global_shape, box=entry.box))
            apart = torch.empty(local.shape, dtype=local.dtype, device=local.device) if _is_expanded(local) else local
            places[name] = (_as_stored(entry, apart, back), entry)
            if apart is not local:
                back.append(functools.partial(_collapse, name, apart, local))
    prefer = rank if own is not None else -1
    if images.whole and first.layout.alike:
        differing = {entry.name for entry in first.entries() if may_differ(document, entry.name)}
        copies = copies_by_layout(wants, first.entries(), held, rank, differing, own=own is not None)
    elif images.divided:
        prefer_rest = [of for of in everything if own is not None and of in (rank, own.layout.rest)]
        copies = copies_by_division(wants, common, held.world, images.divided, everything, prefer_rest)
    else:
        copies = copies_by_entries(wants, everything, prefer, partial=partial, alike=first.layout.alike)
    prove(wants, copies)
    images.prepare({copy.rank for copy in copies})
    ranges: dict[int, list[Range]] = {}
    later: list[Callable[[], object]] = []
    uploads = Uploads()
    with torch.no_grad():
        for copy in copies:
            reader = images.reader(copy.rank)
            wanted, after = _arranged(copy, *places[copy.name], reader.start(copy.entry), uploads)
            ranges.setdefault(copy.rank, []).append(wanted)
            later += after
        images.bring(ranges, threads)
        for act in (*later, uploads.finish, *back, *targets.after, *setters):
            act()
    names = sorted(there) if partial else []
    return {name: name not in places for name in names if not name.startswith(PRIVATE)}


def _common(images: Images, document: Any, first: ImageReader) -> Sequence[Entry]:
    """Where the ranks have divided what they held alike: what that is, as the first of them held it.

    Raises:
        CheckpointDamaged: if that cannot be.
    """
    if not images.divided:
        return ()
    told = {entry.name for entry in first.layout.common}
    entries = [*first.layout.common, *(entry for entry in first.entries() if entry.name not in told)]
    try:
        common = common_entries(entries, document, images.held.world)
    except (AttributeError, TypeError) as error:
        raise CheckpointDamaged(f"{first.name}: malformed document: {error!r:.500}") from error
    if common is None:
        raise CheckpointDamaged(f"{first.name}: does not tell how {images.held.world} ranks have divided the state")
    return common


def _entries(
    images: Images, first: ImageReader, own: ImageReader | None, common: Sequence[Entry]
) -> dict[int, Sequence[Entry]]:
    """By rank, what the images hold: of one that stands for all, of what was divided and what is besides, or of all.

    Raises:
        CheckpointDamaged: if they do not cover the state.
    """
    held = images.held
    if images.divided:
        found: dict[int, Sequence[Entry]] = {}
        if own is not None:
            found[own.stamp.rank] = own.entries()
            if own.layout.rest in held.ranks:
                found[own.layout.rest] = images.reader(own.layout.rest).entries()
        return {**found, first.stamp.rank: [*first.entries(), *common]}
    if images.whole and first.layout.alike:
        everything: dict[int, Sequence[Entry]] = {first.stamp.rank: first.entries()}
        holes = not_covered(first.entries(), held)
    else:
        everything = {rank: images.reader(rank).entries() for rank in sorted(held.ranks)}
        gone = len(everything) < held.world
        holes = ["what nobody else held"] if gone else missing(everything.values())
    if holes:
        raise CheckpointDamaged(f"{first.name} and its siblings do not cover {', '.join(holes[:10])}")
    return everything


def _document(images: Images, own: ImageReader | None, first: ImageReader) -> tuple[ImageReader, dict[str, Any], bool]:
    """The document, whose it is, and whether it describes what only other ranks have besides.

    Where all ranks hold alike, a rank's differs from the others' only in its generators; any will do for the rest.
    Where a state dict of another library was saved, the first rank's alone says something.
    """
    told = own or first
    readers = [told]
    if not first.layout.alike:
        readers += [reader for reader in images.all() if reader is not told]
    documents = [images.document(reader.stamp.rank) for reader in readers]
    for reader, document in zip(readers, documents, strict=True):
        if not isinstance(document, dict):
            raise CheckpointDamaged(f"{reader.name}: the document is not an object")
    if len(documents) == 1:
        return told, documents[0], False
    try:
        everything = merged(documents)
        if own is not None and len(documents[0]) > 1:
            # Parts of other names are other ranks' own.
            everything = {name: part for name, part in everything.items() if name in documents[0]}
        return told, everything, sum(len(document) > 1 for document in documents) > 1
    except (FormatError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointDamaged(f"{told.name}: malformed document: {error!r:.500}") from error


def _dtype(entry: Entry) -> str:
    return entry.real_dtype or entry.dtype


def _as_stored(entry: Entry, local: torch.Tensor, back: list[Callable[[], object]]) -> torch.Tensor:
    """A target as what its entry holds: itself, its bytes, or a copy of these that ``back`` brings to it at the end."""
    if not entry.real_dtype:
        return local
    target = as_bytes(local)
    if target.data_ptr() != local.data_ptr():
        back.append(lambda: local.copy_(target.view(-1).view(local.dtype).view(local.shape)))
    return target


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether elements stand in the same place, as `torch.Tensor.expand` has them."""
    return tensor.numel() > 0 and any(
        not stride and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _collapse(name: str, filled: torch.Tensor, target: torch.Tensor) -> None:
    """Bring what was restored to a tensor whose elements share memory.

    Raises:
        StateMismatch: if they are not all to be the same.
    """
    for dim, stride in enumerate(target.stride()):
        if not stride and target.shape[dim] > 1:
            first = filled.narrow(dim, 0, 1)
            if not torch.equal(first.expand_as(filled), filled):
                raise StateMismatch(
                    f"{name} is expanded along dimension {dim}, so all its elements there are the same; those that were"
                    " saved differ"
                )
            filled, target = first, target.narrow(dim, 0, 1)
    target.copy_(filled)


def _arranged(
    copy: Copy, target: torch.Tensor, entry: Entry, start: int, uploads: Uploads
) -> tuple[Range, list[Callable[[], object]]]:
    """Which bytes of the image to bring where, and what to do with them once they are there.

    Args:
        copy: one block of one entry.
        target: what it is a block of.
        entry: how this rank would store it.
        start: first byte of the block's entry in its image.
        uploads: takes what belongs on a device.
    """
    first, count = copy.box.span_in(copy.entry.box)
    place = target[copy.box.slices_in(entry.box)]
    width = place.element_size()
    strides = _strides(copy.entry.shape)
    if in_rows := _in_rows(place, strides):
        row, stride, spread = (n * width for n in in_rows)
        return Range(start + first * width, count * width, place.data_ptr(), row, stride, spread), []
    after: list[Callable[[], object]] = []
    if count != copy.box.size or not addressable(place):
        gathered = torch.empty(count, dtype=place.dtype)
        after.append(functools.partial(uploads.copy, place, gathered.as_strided(copy.box.shape, strides)))
        place = gathered
    row, stride = copy.box.rows_in(copy.entry.box)
    return Range(start + first * width, count * width, place.data_ptr(), row * width, stride * width), after


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements from one to the next in each dimension of a contiguous tensor."""
    return [*accumulate(reversed(shape[1:]), mul, initial=1)][::-1] if shape else []


def _in_rows(place: torch.Tensor, strides: Sequence[int]) -> tuple[int, int, int] | None:
    """(elements in a row, elements from one to the next in the image, and in memory), if it is made of such rows.

    Args:
        place: where it belongs.
        strides: of the same elements in the image.
    """
    if place.device.type != "cpu" or place.is_conj() or place.is_neg():
        return None
    levels: list[tuple[int, int, int]] = []
    for size, there, here in zip(place.shape, strides, place.stride(), strict=True):
        if levels and levels[-1][1:] == (size * there, size * here):
            levels[-1] = (levels[-1][0] * size, there, here)
        elif size > 1:
            levels.append((size, there, here))
    if len(levels) != 2 or levels[1][1:] != (1, 1) or levels[1][0] * place.element_size() < _LEAST_ROW:
        return None
    (_, stride, spread), (row, _, _) = levels
    # Rows that stand on top of each other are nobody's to write: an expanded tensor.
    return (row, stride, spread) if spread >= row else None


def _generators(reader: ImageReader, rank: int) -> dict[str, torch.Tensor]:
    """The states of this rank's own random generators."""
    held = {entry.name: entry for entry in reader.entries()}
    return {
        which: reader.tensor(held[rng_name(rank, which)])
        for which in ("torch", "cuda")
        if rng_name(rank, which) in held
    }
