"""Make a checkpoint of ours of one that plain DCP wrote; ``rtctl import``.

Each file of tensors becomes an image.  Tensors are read one at a time, twice; the memory that is needed depends on the
largest only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from resilient_train.errors import CheckpointDamaged, ConfigError, FormatError, StorageError
from resilient_train.interop.dcp_document import EMPTY, document_of
from resilient_train.interop.dcp_folder import METADATA, DcpFolder, read_folder
from resilient_train.interop.dcp_items import read_tensor, read_value
from resilient_train.interop.dcp_names import Part, entry_name, parts_of
from resilient_train.interop.image_file import ImageSource, Load, entry_of, next_key, or_nothing
from resilient_train.spec.shard import Entry
from resilient_train.spec.world import MAX_STEP, Key
from resilient_train.storage.catalogue import commit
from resilient_train.storage.commit import Manifest, folder_of
from resilient_train.storage.tier import Tier
from resilient_train.tools.images import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was written."""

    key: Key
    """Which state it became."""
    parts: Mapping[str, str]
    """Name of each part of the state to its kind."""
    images: int
    """Number of images."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of them."""


def step_of(source: str) -> int:
    """The step that the name of a folder ends with.

    Raises:
        ConfigError: if it ends with no number.
    """
    found = re.search(r"(\d{1,12})$", source.rstrip("/"))
    if found is None:
        raise ConfigError(f"say with --step how many steps are finished in {source}: its name ends with no number")
    return int(found[1])


def import_checkpoint(source: Tier, target: Tier, step: int, progress: Progress) -> Imported:
    """Write the checkpoint in the folder ``source`` to ``target``, all of it or nothing.

    Args:
        source: the folder.
        target: where checkpoints of ours are.
        step: number of finished steps.
        progress: hears how far it is.

    Raises:
        ConfigError: if ``step`` is out of range.
        UnsupportedState: naming what cannot be taken over: it needs a class, or is more than tensors and plain values.
        CheckpointDamaged: if the folder is not what its metadata says.
        StorageError: if anything could not be read or written.
    """
    if not 0 <= step <= MAX_STEP:
        raise ConfigError(f"--step must be a number of finished steps, it is {step}")
    folder = read_folder(source)
    target.check_writable()
    parts = parts_of(folder.paths, set(folder.tensors))
    values = {item.fqn: read_value(source, item) for item in folder.items if item.fqn not in folder.tensors}
    try:
        document = document_of(parts, values)
    except FormatError as error:
        raise CheckpointDamaged(f"{source.name}/{METADATA}: {error}") from error
    images = _images(source, folder, parts)
    nbytes = sum(entry.nbytes for image in images for entry in image)
    done = 0

    def passed(count: int) -> None:
        nonlocal done
        done += count
        progress(done // 2, nbytes)

    key = next_key(target, step)
    with or_nothing(target, key):
        files = []
        for rank, loads in enumerate(images):
            told = document if rank == 0 else EMPTY
            files.append(ImageSource(key, rank, len(images), loads, told, passed).put(target))
        if not commit(target, Manifest(key=key, world=len(images), files=tuple(files), past={key.lineage: None})):
            raise StorageError(f"{target.name}/{folder_of(key)}: somebody else wrote there")
    return Imported(
        key=key,
        parts={part.name: part.kind for part in parts},
        images=len(images),
        tensors=len(folder.tensors),
        nbytes=nbytes,
    )


def _images(source: Tier, folder: DcpFolder, parts: Sequence[Part]) -> list[dict[Entry, Load]]:
    """For each file what gives the tensors in it."""
    names = {leaf.fqn: entry_name(part, leaf) for part in parts for leaf in part.leaves if leaf.tensor}
    images: dict[str, dict[Entry, Load]] = {}
    for item in sorted(folder.items, key=lambda item: (_natural(item.file), item.offset)):
        if item.box is not None:
            dtype, shape = folder.tensors[item.fqn]
            if item.box.size or not prod(shape):
                entry = entry_of(names[item.fqn], dtype, item.box, shape)
                images.setdefault(item.file, {})[entry] = partial(read_tensor, source, item)
    return list(images.values()) or [{}]


def _natural(name: str) -> list[tuple[int, str]]:
    """``__10_0.distcp`` comes after ``__9_0.distcp``."""
    return [(int(text) if text.isdigit() else 0, text) for text in re.split(r"(\d+)", name)]
