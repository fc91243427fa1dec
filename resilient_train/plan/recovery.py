"""Recovery is coverage: from whatever images are left, the newest state that they jointly hold, and what to copy.

Images of one key only are combined, and only keys of the job's own past: a step that two worlds computed is two
different states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from resilient_train.errors import StateMismatch
from resilient_train.plan.partition import PRIVATE
from resilient_train.spec.layout import Box, uncovered
from resilient_train.spec.shard import Entry
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
    image: int
    """Index of the image to copy from."""
    entry: Entry
    """The part that the image holds."""
    box: Box
    """The block, within both."""


def complete_keys(found: Iterable[Found], past: Mapping[int, int | None]) -> list[Key]:
    """Keys of the job's past of which every rank's image is there, newest first."""
    ranks: dict[tuple[Key, int], set[int]] = {}
    for image in found:
        ranks.setdefault((image.key, image.world), set()).add(image.rank)
    whole = {key for (key, world), have in ranks.items() if have == set(range(world)) and in_ancestry(key, past)}
    return sorted(whole, reverse=True)


def missing(images: Sequence[Sequence[Entry]]) -> list[str]:
    """Names of tensors that the images of one key do not cover; empty if the state is whole."""
    parts: dict[tuple[str, tuple[int, ...]], list[Box]] = {}
    for entries in images:
        for entry in entries:
            parts.setdefault((entry.name, entry.global_shape), []).append(entry.box)
    return sorted(name for (name, shape), boxes in parts.items() if uncovered(Box.whole(shape), boxes))


def plan_copies(wants: Sequence[Want], images: Sequence[Sequence[Entry]], prefer: int = -1) -> list[Copy]:
    """What to copy so that every wanted box is filled exactly once.

    Args:
        wants: the boxes this rank needs.
        images: the entries of each image of one key.
        prefer: index of the image to use where it has the data (this rank's own), or -1.

    Raises:
        StateMismatch: if tensors are missing, have another shape or dtype, or the preferred image (without one: any)
            has tensors that are not wanted; every one is named.  What is in others' images may be theirs alone.
    """
    holders: dict[str, list[tuple[int, Entry]]] = {}
    order = sorted(range(len(images)), key=lambda i: (i != prefer, i))
    for index in order:
        for entry in images[index]:
            holders.setdefault(entry.name, []).append((index, entry))
    _check_fit(wants, holders, {entry.name for entry in images[prefer]} if prefer >= 0 else set(holders))
    copies = []
    for want in wants:
        left = [want.box] if want.box.size else []
        for index, entry in holders[want.name]:
            rest = []
            for box in left:
                common = box.intersect(entry.box)
                if common is None:
                    rest.append(box)
                    continue
                copies.append(Copy(name=want.name, image=index, entry=entry, box=common))
                rest += box.minus(common)
            left = rest
            if not left:
                break
        if left:
            raise StateMismatch(f"the checkpoint does not hold all of {want.name}: {left[0]} is missing")
    return copies


def _check_fit(wants: Sequence[Want], holders: Mapping[str, Sequence[tuple[int, Entry]]], own: set[str]) -> None:
    problems = []
    wanted = {want.name for want in wants}
    for want in wants:
        held = holders.get(want.name)
        if held is None:
            problems.append(f"{want.name} {list(want.global_shape)}: not in the checkpoint")
            continue
        shapes = {entry.global_shape for _, entry in held} - {want.global_shape}
        dtypes = {entry.real_dtype or entry.dtype for _, entry in held} - {want.dtype or ""}
        if shapes:
            problems.append(f"{want.name}: shape {list(want.global_shape)} here, {list(min(shapes))} there")
        elif want.dtype and dtypes:
            problems.append(f"{want.name}: dtype {want.dtype} here, {min(dtypes)} there")
    problems += [
        f"{name} {list(held[0][1].global_shape)}: in the checkpoint, not in this state"
        for name, held in sorted(holders.items())
        if name in own and name not in wanted and not name.startswith(PRIVATE)
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise StateMismatch(f"the checkpoint is of another model; {len(problems)} tensors differ:\n  {shown}{more}")
