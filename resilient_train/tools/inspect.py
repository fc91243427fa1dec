"""What a checkpoint holds: facts of the manifest, parts of the state, tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.arena import SLOTS
from resilient_train.plan.partition import PRIVATE
from resilient_train.spec.shard import DTYPE_SIZES, Entry
from resilient_train.spec.sharding import Cuts, held_box
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import read_manifest
from resilient_train.storage.commit import Manifest
from resilient_train.storage.tier import Tier
from resilient_train.tools.images import contradictions, holders, open_image, parts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLine:
    """One tensor of the state."""

    name: str
    """Part of the state and canonical name."""
    dtype: str
    """safetensors' dtype, or torch's where safetensors has none."""
    shape: tuple[int, ...]
    """The whole tensor's."""
    shards: int
    """Number of boxes it is stored in."""
    nbytes: int
    """Bytes of the whole tensor."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "shards": self.shards,
            "bytes": self.nbytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A checkpoint."""

    manifest: Manifest
    """Its manifest."""
    parts: Mapping[str, str]
    """Name of a part of the state to its kind: ``module``, ``optimizer``, ``stateful``."""
    tensors: tuple[TensorLine, ...]
    """All tensors by name."""
    image: int
    """Bytes, about, of the image that each rank makes of the state in memory, on as many ranks as made this one."""

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of shared memory that each rank's snapshots take on as many ranks: (always, while one is written)."""
        return SLOTS * self.image, (SLOTS + 1) * self.image

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        manifest = self.manifest
        return {
            "step": manifest.key.step,
            "lineage": manifest.key.lineage,
            "ranks": manifest.world,
            "files": [{"name": file.name, "rank": file.rank, "bytes": file.size} for file in manifest.files],
            "past": [[lineage, bound] for lineage, bound in sorted(manifest.past.items())],
            "parts": dict(self.parts),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "tensor_bytes": self.nbytes,
            "memory_per_rank": {"snapshots": self.memory[0], "while_one_is_written": self.memory[1]},
        }


def inspect(tier: Tier, key: Key) -> Content:
    """Read a checkpoint's manifest, headers and document, not its tensors.

    Raises:
        CheckpointDamaged: if one of these is missing or damaged.
    """
    manifest = read_manifest(tier, key)
    images = [open_image(tier, manifest, file) for file in manifest.files]
    parts = {name: str(part["kind"]) for name, part in parts_of(images[0]).items()} if images else {}
    held = holders(image.entries() for image in images)
    if bad := contradictions(held):
        raise CheckpointDamaged(f"{tier.name}: {key}: the images do not agree on {', '.join(bad[:10])}")
    # What ranks hold alike they may have divided among them, which says nothing of how they hold it.
    told = {
        entry.name: entry.cuts
        for image in images
        for entry in (*image.entries(), *image.layout.common)
        if entry.cuts is not None
    }
    lines = tuple(_line(found[0][1], _shards(name, found, told)) for name, found in sorted(held.items()))
    # Of what belongs to one rank each, one such part counts.
    one = {name: found for name, found in held.items() if not name.startswith(PRIVATE) or found[0][0] == 0}
    image = sum(_part_of_a_rank(found[0][1], told.get(name) or ()) for name, found in one.items())
    return Content(manifest=manifest, parts=parts, tensors=lines, image=image)


def _shards(name: str, found: list[tuple[int, Entry]], told: Mapping[str, Cuts]) -> int:
    return prod(cut.parts for cut in told[name]) if name in told else len({entry.box for _, entry in found})


def _part_of_a_rank(entry: Entry, cuts: Cuts) -> int:
    """Bytes of a tensor that the first rank holds, and no other more: what is not cut stands on all of them."""
    return held_box(entry.global_shape, cuts, 0).size * DTYPE_SIZES[entry.dtype]


def _line(entry: Entry, shards: int) -> TensorLine:
    return TensorLine(
        name=entry.name,
        dtype=entry.real_dtype or entry.dtype,
        shape=entry.global_shape[:-1] if entry.real_dtype else entry.global_shape,
        shards=shards,
        nbytes=prod(entry.global_shape) * DTYPE_SIZES[entry.dtype],
    )
