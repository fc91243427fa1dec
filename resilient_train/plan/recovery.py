"""Recovery is coverage: from whatever images are left, the newest state that they jointly hold, and what to copy.

Images of one key only are combined, and only keys of the job's own past: a step that two worlds computed is two
different states.

Theory of operation.  Where all ranks hold alike (`ImageLayout.alike`), one image's header tells what every rank's image
has: which chunk of each tensor, by `Entry.cuts`.  Then nothing but arithmetic is needed to say whether the ranks whose
images are left cover the state, and whose image has what this rank wants; the work grows with what this rank wants, not
with the number of ranks, and only the images that something is copied from are opened.  Otherwise the headers of all
images are needed, and every rank's image has to be there, because what only a lost one had nobody knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from resilient_train.errors import CheckpointDamaged, StateMismatch
from resilient_train.plan.partition import PRIVATE
from resilient_train.spec.layout import Box, uncovered
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cuts, box_of, chunks_within, holders, is_covered, is_regular
from resilient_train.spec.world import Key, in_ancestry


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An image that exists somewhere."""

    key: Key
    """Which state it is a part of."""
    rank: int
    """Whose part."""
    world: int
    """Of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A box that a rank must fill."""

    name: str
    """The tensor."""
    dtype: str
    """Its stored dtype; empty if any will do."""
    global_shape: tuple[int, ...]
    """Its shape."""
    box: Box
    """The part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One block to copy."""

    name: str
    """The tensor."""
    rank: int
    """Whose image to copy from."""
    entry: Entry
    """The part that the image holds."""
    box: Box
    """The block, within both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """The images of one state that are left."""

    world: int
    """Number of ranks that it is the state of."""
    ranks: Collection[int]
    """Those whose images are left."""
    near: Sequence[int] = ()
    """Those of them whose images cost the least to read, best first."""


def ranks_by_key(found: Iterable[Found], past: Mapping[int, int | None]) -> list[tuple[Key, int, frozenset[int]]]:
    """(key, number of its ranks, those whose image is there) of every key of the job's past, newest first."""
    ranks: dict[tuple[Key, int], set[int]] = {}
    for image in found:
        if in_ancestry(image.key, past):
            ranks.setdefault((image.key, image.world), set()).add(image.rank)
    return sorted(((key, world, frozenset(have)) for (key, world), have in ranks.items()), key=lambda k: k[:2])[::-1]


def complete_keys(found: Iterable[Found], past: Mapping[int, int | None]) -> list[Key]:
    """Keys of the job's past of which every rank's image is there, newest first."""
    return [key for key, world, have in ranks_by_key(found, past) if have == set(range(world))]


def missing(images: Iterable[Sequence[Entry]]) -> list[str]:
    """Names of tensors that the images of one key do not cover; empty if the state is whole."""
    parts: dict[tuple[str, tuple[int, ...]], list[Box]] = {}
    for entries in images:
        for entry in entries:
            parts.setdefault((entry.name, entry.global_shape), []).append(entry.box)
    return sorted(name for (name, shape), boxes in parts.items() if uncovered(Box.whole(shape), boxes))


def not_covered(entries: Iterable[Entry], held: Holders) -> list[str]:
    """Names of tensors that the ranks that are left do not cover, or of which that cannot be told.

    Args:
        entries: of any image of the state, all being alike.
        held: whose images are left.
    """
    ranks = sorted(held.ranks)
    sound: dict[Cuts, bool] = {}
    names = []
    for entry in entries:
        if entry.name.startswith(PRIVATE):
            continue
        if entry.cuts is not None and entry.cuts not in sound:
            sound[entry.cuts] = is_regular(entry.cuts, held.world) and is_covered(entry.cuts, ranks)
        if entry.cuts is None or not sound[entry.cuts]:
            names.append(entry.name)
    return sorted(names)


def copies_by_layout(
    wants: Sequence[Want],
    entries: Sequence[Entry],
    held: Holders,
    rank: int,
    differing: Collection[str] = (),
    *,
    own: bool = False,
) -> list[Copy]:
    """What to copy so that every wanted box is filled exactly once, where all images are alike.

    Of those that hold a chunk the nearest is chosen; among equals every rank begins elsewhere, so that they share the
    load.

    Args:
        wants: the boxes this rank needs.
        entries: of any image.
        held: whose images are left; they cover the entries.
        rank: this rank, in the new world.
        differing: names under which ranks may hold something of their own each: what the first of them has, unless
            this rank has its own.
        own: whether ``rank`` had the same number in a world of the same size.

    Raises:
        StateMismatch: if tensors are missing, surplus, or have another shape or dtype; every one is named.
        CheckpointDamaged: if something is not covered.
    """
    by_name = {entry.name: entry for entry in entries}
    check_fit(wants, {name: [entry] for name, entry in by_name.items()}, set(by_name))
    ranks = frozenset(held.ranks)
    alone = [rank] if own and rank in ranks else [min(ranks)]
    # A model's layers repeat each other: what is wanted of tensors of one shape is planned once.
    planned: dict[tuple[tuple[int, ...], Cuts, Box, bool], list[tuple[int, Box, Box]]] = {}
    copies = []
    for want in wants:
        entry, differs = by_name[want.name], want.name in differing
        assert entry.cuts is not None
        place = entry.global_shape, entry.cuts, want.box, differs
        if place not in planned:
            near = alone if differs else held.near
            planned[place] = list(_sources(want, entry.cuts, held.world, near, ranks, rank))
        for source, box, common in planned[place]:
            part = replace(entry, offset=box.offset, shape=box.shape)
            copies.append(Copy(name=want.name, rank=source, entry=part, box=common))
    return copies


def _sources(
    want: Want, cuts: Cuts, world: int, near: Sequence[int], ranks: frozenset[int], rank: int
) -> Iterator[tuple[int, Box, Box]]:
    """(whose image, the box that it holds, what is wanted of that) of everything in a wanted box.

    Raises:
        CheckpointDamaged: if nobody is left who has some of it.
    """
    for chunks in chunks_within(want.global_shape, cuts, want.box):
        source = _nearest(cuts, chunks, world, near, ranks, rank)
        box = box_of(want.global_shape, cuts, chunks)
        common = box.intersect(want.box)
        if source is None or common is None:
            raise CheckpointDamaged(f"nobody who is left holds {box} of {want.name}")
        yield source, box, common


def _nearest(
    cuts: Cuts, chunks: Sequence[int], world: int, near: Sequence[int], ranks: frozenset[int], rank: int
) -> int | None:
    """Whose image to take these chunks from; None if nobody is left that has them."""
    numbered = list(zip(cuts, chunks, strict=True))
    for source in near:
        if all(cut.chunk(source) == number for cut, number in numbered):
            return source
    return next((source for source in holders(cuts, chunks, world, rank) if source in ranks), None)


def copies_by_entries(
    wants: Sequence[Want],
    images: Mapping[int, Sequence[Entry]],
    prefer: int = -1,
    *,
    partial: bool = False,
    alike: bool = False,
) -> list[Copy]:
    """What to copy so that every wanted box is filled exactly once.

    Args:
        wants: the boxes this rank needs.
        images: by rank, the entries of each image of one key.
        prefer: the rank whose image to use where it has the data (this rank's own), or -1.
        partial: whether others may have what is not wanted here.
        alike: whether all ranks held the same tensors, so that what is in any image belongs to this rank, too.

    Raises:
        StateMismatch: if tensors are missing, have another shape or dtype, or the preferred image (without one, or
            where ranks held alike: any) has tensors that are not wanted; every one is named.
        CheckpointDamaged: if something is not covered.
    """
    held: dict[str, list[tuple[int, Entry]]] = {}
    for rank in sorted(images, key=lambda rank: (rank != prefer, rank)):
        for entry in images[rank]:
            held.setdefault(entry.name, []).append((rank, entry))
    everybodys = alike or prefer < 0
    mine = set() if partial else set(held) if everybodys else {entry.name for entry in images[prefer]}
    check_fit(wants, {name: [entry for _, entry in places] for name, places in held.items()}, mine)
    return [copy for want in wants for copy in copies_of(want, held[want.name])]


def copies_of(want: Want, places: Iterable[tuple[int, Entry]]) -> list[Copy]:
    """What to copy for one box.

    Args:
        want: the box.
        places: who has what of the tensor, best first: (rank, entry).

    Raises:
        CheckpointDamaged: if something is not covered.
    """
    copies: list[Copy] = []
    left = [want.box] if want.box.size else []
    for rank, entry in places:
        rest = []
        for box in left:
            common = box.intersect(entry.box)
            if common is None:
                rest.append(box)
                continue
            copies.append(Copy(name=want.name, rank=rank, entry=entry, box=common))
            rest += box.minus(common)
        left = rest
        if not left:
            break
    if left:
        raise CheckpointDamaged(f"the checkpoint does not hold all of {want.name}: {left[0]} is missing")
    return copies


def prove(wants: Sequence[Want], copies: Sequence[Copy]) -> None:
    """Every element of every wanted box is written by exactly one copy, out of a part that holds it.

    Independent of how the copies were planned: boxes that are disjoint, within the wanted one, and have as many
    elements together as it has, fill it exactly once.

    Raises:
        CheckpointDamaged: naming the tensor and the box.
    """
    by_name: dict[str, list[Copy]] = {}
    for copy in copies:
        by_name.setdefault(copy.name, []).append(copy)
    proven: set[tuple[Box, tuple[tuple[Box, Box], ...]]] = set()
    for want in wants:
        mine = tuple((copy.box, copy.entry.box) for copy in by_name.pop(want.name, []))
        # What holds for one tensor holds for another with the very same boxes.
        if (want.box, mine) not in proven:
            _prove_one(want, mine)
            proven.add((want.box, mine))
    if by_name:
        raise CheckpointDamaged(f"{min(by_name)} would be filled, and nobody wants it")


def _prove_one(want: Want, mine: Sequence[tuple[Box, Box]]) -> None:
    """The same of one wanted box: (box that is filled, box that it is taken from) of each copy."""
    filled = [box for box, _ in mine]
    for box, source in mine:
        if box.intersect(want.box) != box or box.intersect(source) != box:
            raise CheckpointDamaged(f"{want.name}: {box} would be copied from where it is not")
    twice = _overlap(filled)
    if twice is not None:
        raise CheckpointDamaged(f"{want.name}: {twice} would be filled twice")
    if sum(box.size for box in filled) != want.box.size:
        raise CheckpointDamaged(f"{want.name}: {uncovered(want.box, filled)[0]} has no source")


def _overlap(boxes: list[Box]) -> Box | None:
    """Something that two of the boxes have in common."""
    # Along the dimension of the first offsets, so that boxes that were cut along it are compared with neighbours only.
    ordered = sorted(boxes, key=lambda box: box.offset)
    open_: list[Box] = []
    for box in ordered:
        open_ = [other for other in open_ if not box.offset or other.end[0] > box.offset[0]]
        for other in open_:
            common = box.intersect(other)
            if common is not None:
                return common
        open_.append(box)
    return None


def check_fit(wants: Sequence[Want], held: Mapping[str, Sequence[Entry]], own: Collection[str]) -> None:
    """What is wanted is there, in its shape and dtype, and of ``own`` everything is wanted.

    Raises:
        StateMismatch: naming every tensor of which that is not so.
    """
    problems = []
    wanted = {want.name for want in wants}
    for want in wants:
        entries = held.get(want.name)
        if entries is None:
            problems.append(f"{want.name} {list(want.global_shape)}: not in the checkpoint")
            continue
        shapes = {entry.global_shape for entry in entries} - {want.global_shape}
        dtypes = {entry.real_dtype or entry.dtype for entry in entries} - {want.dtype or ""}
        if shapes:
            problems.append(f"{want.name}: shape {list(want.global_shape)} here, {list(min(shapes))} there")
        elif want.dtype and dtypes:
            problems.append(f"{want.name}: dtype {want.dtype} here, {min(dtypes)} there")
    problems += [
        f"{name} {list(entries[0].global_shape)}: in the checkpoint, not in this state"
        for name, entries in sorted(held.items())
        if name in own and name not in wanted and not name.startswith(PRIVATE)
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise StateMismatch(f"the checkpoint is of another model; {len(problems)} tensors differ:\n  {shown}{more}")
