"""What there is at a URL, as far as can be told without reading images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resilient_train.errors import CheckpointDamaged
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import read_manifest, with_begun
from resilient_train.storage.commit import MANIFEST, Manifest, folder_of, key_of, world_of
from resilient_train.storage.tier import Tier

COMMITTED, UNFINISHED, DAMAGED = "committed", "unfinished", "damaged"
DIFFERED = "nodes held different replicas, and each wrote its own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One folder."""

    key: Key
    """Which state."""
    state: str
    """``committed``, ``unfinished`` (no manifest) or ``damaged`` (a manifest that is not kept to)."""
    ranks: int | None
    """Of how many ranks; None if nothing says so."""
    nbytes: int | None
    """Bytes of its images; None if nothing says so."""
    note: str = ""
    """What is missing or wrong, for people."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "step": self.key.step,
            "lineage": self.key.lineage,
            "ranks": self.ranks,
            "bytes": self.nbytes,
            "state": self.state,
            "note": self.note,
        }


def survey(tier: Tier, *, sizes: bool = False, wanted: Callable[[Key], bool] = lambda _: True) -> list[Checkpoint]:
    """All checkpoints that are wanted, newest last.

    Args:
        tier: where.
        wanted: which.
        sizes: whether to ask for the length of every image of the committed ones, too.

    Raises:
        StorageError: if the place cannot be read.
    """
    found = []
    for folder, names in with_begun(tier).items():
        key = key_of(folder)
        if key is not None and wanted(key):
            found.append(_committed(tier, key, names, sizes) if MANIFEST in names else _unfinished(tier, key, names))
    if any(one.state == DAMAGED for one in found):
        # What a running job removed meanwhile only looks damaged.
        left = with_begun(tier)
        found = [one for one in found if folder_of(one.key) in left]
    return sorted(found, key=lambda one: one.key)


def _committed(tier: Tier, key: Key, names: set[str], sizes: bool) -> Checkpoint:
    try:
        manifest = read_manifest(tier, key)
    except CheckpointDamaged as error:
        return Checkpoint(
            key=key,
            state=DAMAGED,
            ranks=None,
            nbytes=None,
            note=str(error).removeprefix(f"{tier.name}/{folder_of(key)}/"),
        )
    note = _note(tier, manifest, names, sizes)
    return Checkpoint(
        key=key,
        state=DAMAGED if note else COMMITTED,
        ranks=manifest.world,
        nbytes=sum(file.size for file in manifest.files),
        note=note or DIFFERED * manifest.differed,
    )


def _note(tier: Tier, manifest: Manifest, names: set[str], sizes: bool) -> str:
    """What of the files is not as the manifest says; empty if nothing was found."""
    missing = [file.name for file in manifest.files if file.name not in names]
    if missing:
        return f"{', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} missing"
    for file in manifest.files if sizes else ():
        size = _size(tier, f"{folder_of(manifest.key)}/{file.name}")
        if size != file.size:
            return f"{file.name} has {size} bytes, the manifest says {file.size}"
    return ""


def _size(tier: Tier, path: str) -> int | None:
    try:
        return tier.size(path)
    except CheckpointDamaged:
        return None


def _unfinished(tier: Tier, key: Key, names: set[str]) -> Checkpoint:
    images = sorted(name for name in names if world_of(name) is not None)
    worlds = {world_of(name) for name in images}
    lengths = [_size(tier, f"{folder_of(key)}/{name}") for name in images]
    ranks = worlds.pop() if len(worlds) == 1 else None
    return Checkpoint(
        key=key,
        state=UNFINISHED,
        ranks=ranks,
        nbytes=sum(length or 0 for length in lengths),
        note=f"{len(images)} of {ranks if ranks is not None else '?'} images are there",
    )
