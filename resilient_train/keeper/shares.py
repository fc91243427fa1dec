"""What a keeper writes of the images that it has, so that all keepers together write every byte once.

Where all ranks of the job hold alike, what they have in common is divided among all that have it, over all nodes; what
may differ between them, and everything where they do not hold alike, is written once by each node.  What is to be
written once has to be the same wherever it is: on one node it is compared, of several nodes the checksums are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilient_train.image.arena import Slot
from resilient_train.image.native import checksum, engine
from resilient_train.keeper.alike import of_each_rank
from resilient_train.plan.division import Column, Part, columns_of, common_entries
from resilient_train.plan.partition import assign, first_of
from resilient_train.spec import jsontree
from resilient_train.spec.shard import Entry, ImageLayout, Stamp
from resilient_train.storage.commit import ColumnSum

Headers = Mapping[int, tuple[ImageLayout, Stamp]]
"""rank -> its image's layout and stamp"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Who writes what."""

    of: Mapping[int, Sequence[Part]]
    """By rank, what is written of its image."""
    divided: bool
    """Whether it is divided over the nodes."""
    common: frozenset[str] = frozenset()
    """If so, the names of what is."""
    sums: Mapping[str, ColumnSum] = field(default_factory=dict)
    """If so, what other nodes have to have, too."""


def shares_of(images: Mapping[int, Slot], headers: Headers, origins: Mapping[int, str], world: int) -> Shares:
    """What to write of each image.

    Images that stand in for those of a node that is lost are divided as that node has divided them, or would have: it
    may have written some of them already.

    Args:
        images: this node's, and those that it stands in for.
        headers: theirs.
        origins: rank -> the node whose image it is.
        world: number of ranks.

    Raises:
        UnsupportedState: if ranks hold different values of what is to be saved once.
    """
    common = _common(images, headers, world)
    shares: dict[int, Sequence[Part]] = {}
    for origin in sorted(set(origins.values())):
        ranks = [rank for rank in headers if origins[rank] == origin]
        own = of_each_rank({rank: (images[rank], *headers[rank]) for rank in ranks})
        rest = {rank: [e for e in headers[rank][0].entries if e.name not in common[rank]] for rank in ranks}
        written = first_of(rest, own) if any(common.values()) else assign(rest, own)
        shares |= {rank: [Part(entry=e, of=e) for e in entries] for rank, entries in written.items()}
    if not any(common.values()):
        return Shares(of=shares, divided=False)
    sums: dict[str, ColumnSum] = {}
    for rank in sorted(images):
        entries = [entry for entry in headers[rank][0].entries if entry.name in common[rank]]
        sums.setdefault("layout", _layout_sum(entries, rank))
        for column in columns_of(entries, rank, world):
            shares[rank] = [*shares[rank], *column.parts(rank)]
            if column.name not in sums and not images.keys() >= set(column.ranks):
                sums[column.name] = _column_sum(column, rank, images[rank], headers[rank][0])
    names = frozenset(name for of_rank in common.values() for name in of_rank)
    return Shares(of=shares, divided=True, common=names, sums=sums)


def _common(images: Mapping[int, Slot], headers: Headers, world: int) -> dict[int, frozenset[str]]:
    """By rank, the names of what is divided; nothing at all where not all is known of all."""
    found = {}
    for rank, (layout, stamp) in headers.items():
        common = common_entries(layout.entries, _document(images[rank], layout, stamp), world) if layout.alike else None
        if common is None:
            return dict.fromkeys(headers, frozenset())
        found[rank] = frozenset(entry.name for entry in common)
    return found


def _document(slot: Slot, layout: ImageLayout, stamp: Stamp) -> Any:
    return jsontree.parse(slot.map[layout.json_start : layout.json_start + stamp.json_length])


def _layout_sum(entries: Sequence[Entry], rank: int) -> ColumnSum:
    """Of what the cuts are computed from: where ranks differ in it, something would be written twice, or not at all."""
    rows = [(e.name, e.dtype, e.real_dtype, e.global_shape, e.cuts) for e in sorted(entries, key=lambda e: e.name)]
    return ColumnSum(crc=checksum(repr(rows).encode()), rank=rank, tensors="names, shapes or layouts of tensors")


def _column_sum(column: Column, rank: int, slot: Slot, layout: ImageLayout) -> ColumnSum:
    starts = {entry.name: (start, entry.nbytes) for entry, start in zip(layout.entries, layout.starts, strict=True)}
    crc = 0
    for name in column.names:
        start, size = starts[name]
        crc = engine.crc32c(slot.address + start, size, crc)
    more = f" or {len(column.names) - 1} more" if len(column.names) > 1 else ""
    return ColumnSum(crc=crc, rank=rank, tensors=f"{column.names[0]}{more}")
