"""A committed checkpoint's images, opened and held against the manifest, and the parts of the state they hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.verified import VerifiedImage
from resilient_train.spec.shard import BLOCK, Entry
from resilient_train.storage.commit import ImageFile, Manifest, folder_of
from resilient_train.storage.tier import Tier

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""
ReadFile = Callable[[str, int, int], bytes]
"""(path, offset, length) -> exactly those bytes."""

_SMALL = 2 * BLOCK
"""Bytes up to which a read is remembered."""


def remembering(tier: Tier, reads: int = 64) -> ReadFile:
    """``tier.read`` with its last ``reads`` small reads remembered: many small tensors stand in one block."""
    remembered = functools.lru_cache(maxsize=reads)(tier.read)

    def read(path: str, offset: int, length: int) -> bytes:
        return remembered(path, offset, length) if length <= _SMALL else tier.read(path, offset, length)

    return read


def open_image(tier: Tier, manifest: Manifest, file: ImageFile, read: ReadFile | None = None) -> VerifiedImage:
    """One image of a checkpoint, its header read.

    Args:
        tier: where.
        manifest: the checkpoint's.
        file: which of its images.
        read: how to read it; default: ``tier.read``.

    Raises:
        CheckpointDamaged: if the file is missing, has another length, or another header than the manifest says.
    """
    path = f"{folder_of(manifest.key)}/{file.name}"
    name = f"{tier.name}/{path}"
    size = tier.size(path)
    if size != file.size:
        raise CheckpointDamaged(f"{name}: has {size} bytes, the manifest says {file.size}")
    image = VerifiedImage(name, size, functools.partial(read or tier.read, path), header_crc=file.header_crc)
    image.check(
        key=manifest.key, rank=file.rank, world=manifest.world, header_crc=file.header_crc, table_crc=file.table_crc
    )
    return image


def parts_of(image: VerifiedImage) -> dict[str, Mapping[str, Any]]:
    """The document's parts of the state by name; the random generators are none.

    Raises:
        CheckpointDamaged: if the image's document describes no state.
    """
    document = image.json()
    if not isinstance(document, dict):
        raise CheckpointDamaged(f"{image.name}: the document is not an object")
    parts = {name: part for name, part in document.items() if name != "rng"}
    for name, part in parts.items():
        if not isinstance(part, dict) or not isinstance(part.get("kind"), str):
            raise CheckpointDamaged(f"{image.name}: the document does not say what {name} is")
    return parts


def holders(images: Iterable[Sequence[Entry]]) -> dict[str, list[tuple[int, Entry]]]:
    """Tensor name to its (index of the image, entry)."""
    found: dict[str, list[tuple[int, Entry]]] = {}
    for index, entries in enumerate(images):
        for entry in entries:
            found.setdefault(entry.name, []).append((index, entry))
    return found


def contradictions(held: Mapping[str, Sequence[tuple[int, Entry]]]) -> list[str]:
    """Names of tensors whose parts do not agree on shape and dtype."""
    return sorted(
        name
        for name, parts in held.items()
        if len({(entry.global_shape, entry.dtype, entry.real_dtype) for _, entry in parts}) > 1
    )
