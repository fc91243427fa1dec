"""The checkpoints of a tier: list, read, commit, thin out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from resilient_train.errors import CheckpointDamaged, StorageError
from resilient_train.spec.world import Key
from resilient_train.storage.commit import (
    MANIFEST,
    MAX_MANIFEST,
    Manifest,
    decode_part,
    encode_part,
    folder_of,
    key_of,
    merge,
    part_name,
)
from resilient_train.storage.tier import Tier


def listing(tier: Tier) -> tuple[list[Key], list[Key]]:
    """(committed keys, unfinished keys), each oldest first."""
    return sorted_keys(tier.folders())


def with_begun(tier: Tier) -> dict[str, set[str]]:
    """What a tier's `folders` tells, and what its `begun` tells besides: folders without any file."""
    # In this order, so that nothing that is completed in between is missed.
    begun = tier.begun()
    return {**{folder: set[str]() for folder in begun}, **tier.folders()}


def sorted_keys(folders: Mapping[str, Collection[str]]) -> tuple[list[Key], list[Key]]:
    """The same of what a tier's `folders` has told."""
    committed: list[Key] = []
    unfinished: list[Key] = []
    for folder, files in folders.items():
        key = key_of(folder)
        if key is not None:
            (committed if MANIFEST in files else unfinished).append(key)
    return sorted(committed), sorted(unfinished)


def read_manifest(tier: Tier, key: Key) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises:
        CheckpointDamaged: if it is missing, malformed, or another checkpoint's.
    """
    path = f"{folder_of(key)}/{MANIFEST}"
    manifest = _read_part(tier, path)
    if manifest.key != key or merge([manifest]) != manifest:
        raise CheckpointDamaged(f"{tier.name}/{path}: does not describe this checkpoint")
    return manifest


def _read_part(tier: Tier, path: str) -> Manifest:
    size = tier.size(path)
    if size > MAX_MANIFEST:
        raise CheckpointDamaged(f"{tier.name}/{path}: not a manifest, it has {size:,} bytes")
    return decode_part(tier.read(path, 0, size), f"{tier.name}/{path}")


def commit(tier: Tier, part: Manifest) -> bool:
    """Put this keeper's part, and the manifest if the parts are complete; whether the checkpoint is committed.

    If it is not, whoever puts the last part commits it.

    Raises:
        StorageError: if images that the part names are not there any more, or anything cannot be written.
        ReplicasDiffer: if the parts do not agree.
    """
    put_part(tier, part)
    names = tier.folders().get(folder_of(part.key), set())
    return MANIFEST in names or complete(tier, part, names)


def put_part(tier: Tier, part: Manifest) -> None:
    """Put a keeper's part; the checkpoint is committed by whoever finds all parts there.

    Raises:
        StorageError: if it cannot be written.
    """
    tier.put(f"{folder_of(part.key)}/{part_name(part.files)}", [encode_part(part)])


def complete(tier: Tier, part: Manifest, names: Collection[str]) -> bool:
    """Put the manifest if the parts are complete; whether they are.

    Args:
        tier: the location.
        part: a keeper's own, which is there.
        names: the files in the checkpoint's folder.

    Raises:
        StorageError: if images that the parts name are not there any more, or the manifest cannot be written.
        CheckpointDamaged: if another part cannot be read.
        ReplicasDiffer: if the parts do not agree.
    """
    folder, own = folder_of(part.key), part_name(part.files)
    parts = {name for name in names if name.startswith("part-") and name.endswith(".json")}
    _check_there(tier, part, names)
    if len(set(names) - parts) < part.world:
        return False  # Of a thousand keepers not each is to read what all before it have put.
    manifest = merge([*(_read_part(tier, f"{folder}/{name}") for name in sorted(parts - {own})), part])
    if manifest is None:
        return False
    _check_there(tier, manifest, names)
    tier.put(f"{folder}/{MANIFEST}", [encode_part(manifest)])
    return True


def _check_there(tier: Tier, part: Manifest, names: Collection[str]) -> None:
    gone = [file.name for file in part.files if file.name not in names]
    if gone:
        # The job was started again while this was written, and took the folder for a leftover.
        raise StorageError(
            f"{tier.name}/{folder_of(part.key)}: {gone[0]} was removed before the checkpoint was complete"
        )
