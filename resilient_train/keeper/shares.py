"""What a keeper writes of the images that it has, so that all keepers together write every byte once.

Where all ranks of the job hold alike, what they have in common is divided among all that have it, over all nodes; what
may differ between them, and everything where they do not hold alike, is written once by each node.  What is to be
written once has to be the same wherever it is: on one node it is compared, of several nodes the checksums are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from resilient_train.errors import ReplicasDiffer, UnsupportedState
from resilient_train.image.arena import Slot
from resilient_train.image.native import checksum, engine
from resilient_train.keeper.alike import Images, of_each_rank
from resilient_train.plan import division
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
    divided: int = 0
    """If it is divided over the nodes: `resilient_train.plan.division.LEAST`."""
    common: frozenset[str] = frozenset()
    """If so, the names of what is."""
    rest: Mapping[int, int] = field(default_factory=dict)
    """If so, by rank, the rank of its node whose image has what both hold alike besides."""
    sums: Mapping[str, ColumnSum] = field(default_factory=dict)
    """If so, what other nodes have to have, too."""


def shares_of(
    images: Mapping[int, Slot], headers: Headers, origins: Mapping[int, str], world: int, *, divide: bool
) -> Shares:
    """What to write of each image.

    Images that stand in for those of a node that is lost are divided as that node has divided them, or would have: it
    may have written some of them already.

    Args:
        images: this node's, and those that it stands in for.
        headers: theirs.
        origins: rank -> the node whose image it is.
        world: number of ranks.
        divide: whether to divide over the nodes what can be.

    Raises:
        UnsupportedState: if ranks of one node hold different values of what is to be saved once.
        ReplicasDiffer: if those of different nodes do.
    """
    read = {rank: (images[rank], *headers[rank]) for rank in sorted(images)}
    nodes = [[rank for rank in read if origins[rank] == origin] for origin in sorted(set(origins.values()))]
    own = [of_each_rank({rank: read[rank] for rank in node}) for node in nodes]
    common = _common(read, world) if divide else None
    if common is not None and len(nodes) > 1 and not _same_everywhere(read, common, whole=len(read) == world):
        common = None
    shares: dict[int, Sequence[Part]] = {}
    for node, names in zip(nodes, own, strict=True):
        rest = {rank: [e for e in headers[rank][0].entries if e.name not in (common or ())] for rank in node}
        written = assign(rest, names) if common is None else first_of(rest, names)
        shares |= {rank: [Part(entry=e, of=e) for e in entries] for rank, entries in written.items()}
    if common is None:
        return Shares(of=shares)
    least, sums = division.LEAST, dict[str, ColumnSum]()
    for rank, (slot, layout, _) in read.items():
        entries = [entry for entry in layout.entries if entry.name in common]
        sums.setdefault("layout", _layout_sum(entries, rank, least))
        for column in columns_of(entries, rank, world, least):
            shares[rank] = [*shares[rank], *column.parts(rank)]
            if column.name not in sums and not read.keys() >= set(column.ranks):
                sums[column.name] = _column_sum(column, rank, slot, layout)
    at = {rank: min(node) for node in nodes for rank in node}
    return Shares(of=shares, divided=least, common=common, rest=at, sums=sums)


def _common(read: Images, world: int) -> frozenset[str] | None:
    """The names of what is divided; None where not all is known of all, or ranks only seem to hold alike."""
    made = set()
    for rank, (slot, layout, stamp) in read.items():
        document = jsontree.parse(slot.map[layout.json_start : layout.json_start + stamp.json_length])
        common = common_entries(layout.entries, document, world) if layout.alike else None
        if common is None:
            return None
        made.add((frozenset(entry.name for entry in common), _layout_sum(common, rank, division.LEAST).crc))
    return next(iter(made))[0] if len(made) == 1 else None


def _same_everywhere(read: Images, common: Collection[str], *, whole: bool) -> bool:
    """Whether images that stand in for a lost node's hold what this node's do."""
    try:
        of_each_rank(read, common)
    except UnsupportedState as error:
        if whole:
            return False  # No other keeper has to know.
        raise ReplicasDiffer(f"{error}; these ranks were on different nodes") from error
    return True


def _layout_sum(entries: Sequence[Entry], rank: int, least: int) -> ColumnSum:
    """Of what the cuts are computed from: where ranks differ in it, something would be written twice, or not at all."""
    rows = [(e.name, e.dtype, e.real_dtype, e.global_shape, e.cuts) for e in sorted(entries, key=lambda e: e.name)]
    crc = checksum(repr((least, rows)).encode())
    return ColumnSum(crc=crc, rank=rank, tensors="names, shapes or layouts of tensors")


def _column_sum(column: Column, rank: int, slot: Slot, layout: ImageLayout) -> ColumnSum:
    starts = {entry.name: (start, entry.nbytes) for entry, start in zip(layout.entries, layout.starts, strict=True)}
    crc = 0
    for name in column.names:
        start, size = starts[name]
        crc = engine.crc32c(slot.address + start, size, crc)
    count = len(column.names)
    some = f"values in one or more of {count} tensors from {column.names[0]} on" if count > 1 else column.names[0]
    return ColumnSum(crc=crc, rank=rank, tensors=some)
