"""``Reader``: our checkpoints for ``dcp.load``, whoever wrote them.

The checkpoint is described to DCP as the state dict that its users have (`dcp_view`), DCP's planner says which boxes
this rank needs, and these are read in whole blocks, each held against its checksum.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from resilient_train.errors import CheckpointDamaged, ConfigError, FormatError, StorageError
from resilient_train.image.verified import VerifiedImage
from resilient_train.interop.dcp_view import Place, view_of
from resilient_train.plan.recovery import missing
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import Entry
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.filesystem import open_tier
from resilient_train.storage.tier import Tier
from resilient_train.tools.images import contradictions, holders, open_image, parts_of, remembering
from resilient_train.worker.tensors import real_dtype, real_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """One box of a tensor."""

    image: int
    """Index of the image that has it."""
    entry: Entry
    """The entry that it is, or is in."""
    box: Box
    """The box, in elements of the tensor's own dtype."""
    first: int = 0
    """Its first element in the entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A checkpoint, its headers and document read."""

    key: Key
    """Which state."""
    images: Sequence[VerifiedImage]
    """All of its images."""
    tensors: Mapping[str, Mapping[tuple[int, ...], _Stored]]
    """DCP's name of every tensor to its boxes, each by its offset."""
    values: Mapping[str, Any]
    """DCP's name of every other leaf to the leaf."""


class Reader(StorageReader):
    """Reads a checkpoint that `Writer`, `rt.Checkpointer` or ``rtctl import`` wrote, for ``dcp.load``.

    Modules and optimizers that `rt.State` saved are there under the names that DCP gives them: ``State(model=model,
    optim=optim)`` as ``{"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optim)}``.

    Args:
        url: where the checkpoints are: a path or any URL that fsspec knows.
        step: which; None: the newest that is committed. If the step was computed several times, the newest of these.

    Raises:
        ConfigError: for a malformed argument.

    While loading, DCP wraps these in its ``CheckpointException``:

    - ``StorageError`` if there is no such checkpoint, or it could not be read;
    - ``CheckpointDamaged`` naming the file, and the block where one fails its checksum.

    Example::

        dcp.load({"model": model.state_dict()}, storage_reader=Reader("s3://bucket/run-1"))
    """

    def __init__(self, url: str | os.PathLike[str], *, step: int | None = None) -> None:
        self.url = os.fspath(url)
        if not isinstance(self.url, str) or not self.url:
            raise ConfigError(f"url must be a path or a URL, it is {url!r}")
        if step is not None and (type(step) is not int or step < 0):
            raise ConfigError(f"step must be a number of finished steps, it is {step!r}")
        self.step = step
        self._opened: _Opened | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """DCP begins; ``checkpoint_id`` has nothing to say here."""
        if checkpoint_id is not None:
            raise ConfigError("checkpoint_id and Reader exclude each other: Reader(url, step=...) says what to read")
        self._opened = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No id chooses this reader by itself."""
        del checkpoint_id
        return False

    # Under the name of ``kwargs`` DCP would try again to read what belongs to one rank alone, which there is not.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What the checkpoint holds.

        Raises:
            StorageError: if there is no such checkpoint, or it could not be read.
            CheckpointDamaged: naming the file that is missing or damaged.
        """
        del args, options
        tier = open_tier(self.url)
        key = _choose(tier, self.step)
        manifest, read = read_manifest(tier, key), remembering(tier)
        images = [open_image(tier, manifest, file, read) for file in manifest.files]
        held = _held(images, f"{tier.name}: {key}")
        leaves, paths, places = _leaves(images, held)
        tensors, values, told = {}, {}, dict[str, Any]()
        for fqn, leaf in leaves.items():
            if fqn in places:
                tensors[fqn] = _boxes(held[places[fqn].name], places[fqn])
                told[fqn] = _described(leaf, tensors[fqn].values())
            else:
                values[fqn] = leaf
                told[fqn] = BytesStorageMetadata()
        self._opened = _Opened(key=key, images=images, tensors=tensors, values=values)
        return Metadata(state_dict_metadata=told, planner_data=paths)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageReader`."""
        del metadata, is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See `StorageReader`."""
        return dataclasses.replace(plan, storage_data=self._open().key)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """All ranks must have chosen the same checkpoint."""
        keys = sorted({plan.storage_data for plan in plans})
        if len(keys) > 1:
            named = " and ".join(map(str, keys))
            raise StorageError(f"{self.url}: {named} were the newest for different ranks; say which step")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for."""
        opened = self._open()
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                # What stands in the image is JSON; DCP wants it pickled, and unpickles what was pickled here.
                data = io.BytesIO()
                torch.save(opened.values[item.storage_index.fqn], data)
                data.seek(0)
                planner.load_bytes(item, data)
            else:
                target = planner.resolve_tensor(item)
                with torch.no_grad():
                    target.copy_(_read(opened, item))
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _open(self) -> _Opened:
        if self._opened is None:
            raise ConfigError("the Reader has not read the checkpoint's metadata yet")
        return self._opened


def _choose(tier: Tier, step: int | None) -> Key:
    committed, unfinished = listing(tier)
    fitting = [key for key in committed if step in (None, key.step)]
    if not fitting:
        asked = "" if step is None else f" of step {step}"
        left = f" ({len(unfinished)} unfinished)" if unfinished else ""
        there = f"; the newest are {', '.join(map(str, committed[-10:]))}" if committed else ""
        raise StorageError(f"{tier.name}: there is no committed checkpoint{asked}{left}{there}")
    return max(fitting)


def _held(images: Sequence[VerifiedImage], where: str) -> dict[str, list[tuple[int, Entry]]]:
    """An entry's name to (index of the image, entry) of each of its parts, which make up the whole."""
    entries = [image.entries() for image in images]
    held = holders(entries)
    if bad := contradictions(held) or missing(entries):
        raise CheckpointDamaged(f"{where}: the images do not hold all of, or do not agree on, {', '.join(bad[:10])}")
    return held


def _leaves(
    images: Sequence[VerifiedImage], held: Mapping[str, Sequence[tuple[int, Entry]]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Place]]:
    """By DCP's names: all leaves, the paths that lead to them, and where those stand that are tensors."""
    told = next((image for image in images if parts_of(image)), images[0])
    try:
        view = view_of(told.json(), {name: found[0][1] for name, found in held.items()})
        flat, paths = flatten_state_dict(view.nested)
    except (FormatError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointDamaged(f"{told.name}: malformed document: {error!r:.500}") from error
    leaves = dict(flat)
    for fqn, value in view.repeated.items():
        if fqn in flat and flat[fqn] is not value and flat[fqn] != value:
            # By the form of the state dict it means one option or another: neither is handed out.
            leaves.pop(fqn, None)
        else:
            leaves.setdefault(fqn, value)
    places = {fqn: view.places[id(leaf)][1] for fqn, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    return leaves, {fqn: paths.get(fqn, (fqn,)) for fqn in leaves}, places


def _boxes(found: Sequence[tuple[int, Entry]], place: Place) -> dict[tuple[int, ...], _Stored]:
    """Every box of a tensor, by its offset, the lowest rank's; empty ones only of an empty tensor."""
    boxes: dict[tuple[int, ...], _Stored] = {}
    for image, entry in found:
        dims = len(entry.shape) - bool(entry.real_dtype)
        box = Box(entry.offset[:dims], entry.shape[:dims])
        if place.index is None:
            if box.size or not prod(real_shape(entry)):
                boxes.setdefault(box.offset, _Stored(image=image, entry=entry, box=box))
        elif box.offset[0] <= place.index < box.end[0]:
            first = place.index - box.offset[0]
            boxes.setdefault((), _Stored(image=image, entry=entry, box=Box((), ()), first=first))
    return boxes


def _described(leaf: torch.Tensor, boxes: Iterable[_Stored]) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(offsets=torch.Size(one.box.offset), sizes=torch.Size(one.box.shape)) for one in boxes
    ]
    return TensorStorageMetadata(properties=TensorProperties(dtype=leaf.dtype), size=leaf.shape, chunks=chunks)


def _read(opened: _Opened, item: ReadItem) -> torch.Tensor:
    """The elements that a read item asks for, verified; only the rows that it needs are read."""
    index = item.storage_index
    stored = opened.tensors[index.fqn][tuple(index.offset or ())]
    dtype, inner, rows = real_dtype(stored.entry), stored.box.shape[1:], tuple(item.lengths[:1])
    row = prod(inner) * dtype.itemsize
    first = item.storage_offsets[0] if rows else stored.first
    data = opened.images[stored.image].data(stored.entry, first * row, prod(rows) * row)
    if not len(data):
        return torch.empty(tuple(item.lengths), dtype=dtype)
    held = torch.frombuffer(bytearray(data), dtype=dtype).view((*rows, *inner))
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        held = held.narrow(dim, start if dim else 0, length)
    return held
