"""State that several ranks hold under one name is written once, so it has to be the same: here it is compared.

Images of alike ranks have equal checksums where they are alike, so that mostly nothing but checksums is compared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping
from typing import Any

from resilient_train.errors import UnsupportedState
from resilient_train.image.arena import Slot
from resilient_train.plan.partition import may_differ
from resilient_train.spec import jsontree
from resilient_train.spec.shard import BLOCK, Entry, ImageLayout, Stamp

Images = Mapping[int, tuple[Slot, ImageLayout, Stamp]]
"""rank -> its image"""
_Place = tuple[int, Entry, int]
"""(rank, entry, first byte)"""
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def of_each_rank(images: Images, among: Collection[str] | None = None) -> frozenset[str]:
    """Names under which ranks hold something of their own, each of which is to be written.

    These are buffers of modules, which training changes on every rank (BatchNorm), and tensors of other objects.

    Args:
        images: what is compared.
        among: names to look at; None: all.

    Raises:
        UnsupportedState: if ranks hold parameters or optimizer state of one name that differ.
    """
    differing = _differing(images, among)
    if not differing:
        return frozenset()
    documents = {rank: _document(*images[rank]) for rank in {one for one, _ in differing.values()}}
    wrong = {name: ranks for name, ranks in differing.items() if not may_differ(documents[ranks[0]], name)}
    if wrong:
        name, (one, other) = min(wrong.items())
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UnsupportedState(
            f"ranks {one} and {other} hold different values of {name}{more}: what has one name on several ranks is"
            " saved once and must be equal; give what is a rank's own a name of its own, such as"
            " State(**{f'expert{rank}': expert})"
        )
    return frozenset(differing)


def _document(slot: Slot, layout: ImageLayout, stamp: Stamp) -> Any:
    return jsontree.parse(slot.map[layout.json_start : layout.json_start + stamp.json_length])


def _differing(images: Images, among: Collection[str] | None) -> dict[str, tuple[int, int]]:
    """Entries of one name and box with other bytes, or of one name with another shape: each with two such ranks."""
    differing: dict[str, tuple[int, int]] = {}
    boxes: dict[tuple[str, tuple[int, ...], tuple[int, ...]], _Place] = {}
    kinds: dict[str, _Place] = {}
    tables = {rank: _table(slot, layout) for rank, (slot, layout, _) in images.items()}
    for rank in sorted(images):
        layout = images[rank][1]
        for entry, start in zip(layout.entries, layout.starts, strict=True):
            if among is not None and entry.name not in among:
                continue
            place = (rank, entry, start)
            first = boxes.setdefault((entry.name, entry.offset, entry.shape), place)
            kind = kinds.setdefault(entry.name, place)
            if _kind(kind[1]) != _kind(entry):
                differing.setdefault(entry.name, (kind[0], rank))
            elif first is not place and not _same(images, tables, first, place):
                differing.setdefault(entry.name, (first[0], rank))
    return differing


def _kind(entry: Entry) -> tuple[object, ...]:
    return entry.global_shape, entry.dtype, entry.real_dtype


def _table(slot: Slot, layout: ImageLayout) -> bytes:
    return bytes(slot.map[layout.crc_start : layout.crc_start + 4 * layout.blocks])


def _same(images: Images, tables: Mapping[int, bytes], one: _Place, other: _Place) -> bool:
    size = one[1].nbytes
    if not size:
        return True
    begin, again = (place[2] - images[place[0]][1].data_start for place in (one, other))
    blocks = slice(4 * (begin // BLOCK), 4 * ((begin + size - 1) // BLOCK + 1))
    if begin == again and tables[one[0]][blocks] == tables[other[0]][blocks]:
        return True
    addresses = [images[place[0]][0].address + place[2] for place in (one, other)]
    return int(_memcmp(*addresses, size)) == 0
