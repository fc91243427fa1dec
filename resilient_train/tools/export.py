"""Write a module of a checkpoint as whole tensors: safetensors files as Hugging Face has them.

Tensors are gathered from the images' boxes slab by slab and written as they come, so the memory that is needed does not
depend on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resilient_train.errors import CheckpointDamaged, ConfigError, UnsupportedState
from resilient_train.image.verified import VerifiedImage
from resilient_train.plan.consolidated import INDEX, OutFile, Whole, index_of, plan_files, slabs
from resilient_train.plan.recovery import Want, copies_by_entries, missing
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import DTYPE_SIZES, Entry
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import read_manifest
from resilient_train.storage.tier import Tier
from resilient_train.tools.folder import check, filling, flush, settle
from resilient_train.tools.images import Progress, contradictions, holders, open_image, parts_of, remembering

SLAB = 32 << 20
"""Bytes gathered at once."""
_STALE = (INDEX, "model.safetensors", "model-*-of-*.safetensors")

Held = Mapping[str, Sequence[tuple[int, Entry]]]
"""Canonical name within the module to its (index of the image, entry)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    key: Key
    """Which state."""
    part: str
    """Which part of it."""
    files: tuple[str, ...]
    """The safetensors files."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of them."""
    aliases: Mapping[str, str]
    """Further names of tied tensors, with the name each is stored under."""
    left_out: tuple[str, ...]
    """Extra states of modules, which are no tensors and stay behind."""


def export(
    tier: Tier, key: Key, folder: Path, *, part: str | None, limit: int, force: bool, progress: Progress
) -> Exported:
    """Write a module's parameters and buffers to ``folder``, all of them or nothing.

    Args:
        tier: where the checkpoint is.
        key: which.
        folder: where to.
        part: the module's name in the state; None if there is one only.
        limit: bytes of tensors in one file.
        force: whether the model in ``folder``, if there is one, is replaced.
        progress: hears how far it is.

    Raises:
        ConfigError: if the part is no module, or ``folder`` is not empty.
        UnsupportedState: naming tensors whose dtypes safetensors lacks.
        CheckpointDamaged: if something that is needed is missing or fails its checksum.
        StorageError: if anything could not be read or written.
    """
    check(folder, force=force)
    manifest = read_manifest(tier, key)
    read = remembering(tier)
    images = [open_image(tier, manifest, file, read) for file in manifest.files]
    if not images:
        raise CheckpointDamaged(f"{tier.name}: {key} consists of no images")
    part, document = _module(parts_of(images[0]), part)
    where = f"{tier.name}: {key}: {part}"
    held = _tensors_of(part, images, where)
    aliases = _aliases(document, held, where)
    tensors = [_whole(name, found[0][1]) for name, found in sorted(held.items())]
    _refuse(part, held)
    files = plan_files(tensors, aliases, limit)
    _write(folder, files, images, held, force, progress)
    return Exported(
        key=key,
        part=part,
        files=tuple(file.name for file in files),
        tensors=len(tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        aliases=aliases,
        left_out=tuple(sorted(document.get("extra", {}))),
    )


def _module(parts: Mapping[str, Mapping[str, Any]], wanted: str | None) -> tuple[str, Mapping[str, Any]]:
    modules = sorted(name for name, part in parts.items() if part["kind"] == "module")
    there = ", ".join(f"{name} ({part['kind']})" for name, part in sorted(parts.items()))
    if wanted is not None and wanted not in modules:
        raise ConfigError(f"--part {wanted}: not a module of this checkpoint, which holds {there}")
    if wanted is None and len(modules) != 1:
        raise ConfigError(f"say with --part which module to export; the checkpoint holds {there}")
    name = wanted if wanted is not None else modules[0]
    return name, parts[name]


def _tensors_of(part: str, images: Sequence[VerifiedImage], where: str) -> Held:
    prefix = f"{part}/"
    mine = [[entry for entry in image.entries() if entry.name.startswith(prefix)] for image in images]
    held = holders(mine)
    bad = contradictions(held) or missing(mine)
    if bad:
        raise CheckpointDamaged(f"{where}: the images do not hold all of, or do not agree on, {', '.join(bad[:10])}")
    return {name.removeprefix(prefix): found for name, found in held.items()}


def _aliases(document: Mapping[str, Any], held: Held, where: str) -> dict[str, str]:
    aliases = document.get("aliases", {})
    if not isinstance(aliases, dict) or not isinstance(document.get("extra", {}), dict):
        raise CheckpointDamaged(f"{where}: the document of the module is malformed")
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in held or alias in held:
            raise CheckpointDamaged(f"{where}: {alias} is said to be the same as {name}, which is not so")
    return aliases


def _refuse(part: str, held: Held) -> None:
    lacking = [f"{name} ({found[0][1].real_dtype})" for name, found in sorted(held.items()) if found[0][1].real_dtype]
    if lacking:
        raise UnsupportedState(f"{part} has tensors whose dtypes safetensors lacks: {', '.join(lacking)}")


def _whole(name: str, entry: Entry) -> Whole:
    return Whole(name=name, dtype=entry.dtype, shape=entry.global_shape)


def _write(
    folder: Path,
    files: Sequence[OutFile],
    images: Sequence[VerifiedImage],
    held: Held,
    force: bool,
    progress: Progress,
) -> None:
    total, done = sum(file.nbytes for file in files), 0
    with filling(folder, force=force) as temporary:
        for file in files:
            with (temporary / file.name).open("wb") as out:
                done += out.write(file.header)
                for tensor in file.tensors:
                    for piece in _pieces(tensor, images, held[tensor.name]):
                        done += out.write(piece)
                        progress(done, total)
            flush(temporary / file.name)
        names = [file.name for file in files]
        if len(files) > 1:
            (temporary / INDEX).write_bytes(index_of(files))
            flush(temporary / INDEX)
            names.append(INDEX)
        settle(temporary, names, _STALE)


def _pieces(tensor: Whole, images: Sequence[VerifiedImage], found: Sequence[tuple[int, Entry]]) -> Iterator[memoryview]:
    """The bytes of a tensor, slab after slab."""
    width = DTYPE_SIZES[tensor.dtype]
    name = found[0][1].name
    for box in slabs(tensor, SLAB):
        gathered = np.empty((*box.shape, width), dtype=np.uint8)
        want = Want(name=name, dtype=tensor.dtype, global_shape=tensor.shape, box=box)
        for copy in copies_by_entries([want], {place: [entry] for place, (_, entry) in enumerate(found)}):
            image = images[found[copy.rank][0]]
            gathered[copy.box.slices_in(box)] = _rows(image, copy.entry, copy.box, width)
        yield gathered.reshape(-1).data


def _rows(image: VerifiedImage, entry: Entry, box: Box, width: int) -> npt.NDArray[np.uint8]:
    """The elements in ``box``, each as ``width`` bytes: the rows it needs are read, and cut to it."""
    if not entry.shape:
        return np.frombuffer(image.data(entry), dtype=np.uint8)
    inner = entry.shape[1:]
    row = prod(inner) * width
    first, count = box.offset[0] - entry.offset[0], box.shape[0]
    data = np.frombuffer(image.data(entry, first * row, count * row), dtype=np.uint8)
    held = Box((box.offset[0], *entry.offset[1:]), (count, *inner))
    return data.reshape(count, *inner, width)[box.slices_in(held)]
