"""Fill the training state from the images of one key: what `plan.recovery` planned, carried out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resilient_train.errors import CheckpointDamaged, FormatError
from resilient_train.image.device import Uploads
from resilient_train.image.reader import ImageReader
from resilient_train.plan.recovery import Copy, Want, missing, plan_copies
from resilient_train.spec.shard import Entry
from resilient_train.worker.rng import rng_name, rng_setters
from resilient_train.worker.state import State
from resilient_train.worker.tensors import as_bytes, local_part, stored


def fill(state: State, readers: Sequence[ImageReader], rank: int, world: int) -> None:
    """Write the images' state into ``state``; nothing of it refers to the images afterwards.

    Raises:
        StateMismatch: if the images are of another model; every tensor that differs is named.
        CheckpointDamaged: if a block fails its checksum or the images do not cover the state.
    """
    images = [reader.entries() for reader in readers]
    holes = missing(images)
    if holes:
        raise CheckpointDamaged(f"{readers[0].name} and its siblings do not cover {', '.join(holes[:10])}")
    entries = {entry.name: entry for image in images for entry in image}
    # A rank's document differs from the others' only in its generators; any rank's will do for the rest.
    own = next((r for r in readers if (r.stamp.rank, r.stamp.world) == (rank, world)), None)
    told = own or readers[0]
    document = told.json()
    if not isinstance(document, dict):
        raise CheckpointDamaged(f"{told.name}: the document is not an object")
    try:
        targets = state.targets(document, entries)
        setters = rng_setters(document.get("rng"), _generators(own, rank)) if own is not None else []
    except FormatError as error:
        raise CheckpointDamaged(f"{told.name}: {error}") from error
    wants, places = [], {}
    for name, tensor in targets.tensors.items():
        entry, _ = stored(name, tensor)
        wants.append(Want(name=name, dtype=_dtype(entry), global_shape=entry.global_shape, box=entry.box))
        places[name] = (tensor, entry)
    copies = plan_copies(wants, images, prefer=readers.index(own) if own is not None else -1)
    # Everything is read and verified before the first element is written; room for optimizer state has been made.
    sources = [readers[copy.image].tensor(copy.entry) for copy in copies]
    uploads = Uploads()
    with torch.no_grad():
        for copy, source in zip(copies, sources, strict=True):
            tensor, entry = places[copy.name]
            _copy(source, copy, tensor, entry, uploads)
        uploads.finish()
        for action in (*targets.after, *setters):
            action()


def _dtype(entry: Entry) -> str:
    return entry.real_dtype or entry.dtype


def _copy(held: torch.Tensor, copy: Copy, tensor: torch.Tensor, entry: Entry, uploads: Uploads) -> None:
    source = held[copy.box.slices_in(copy.entry.box)]
    local, _, _ = local_part(copy.name, tensor)
    if not entry.real_dtype:
        uploads.copy(local[copy.box.slices_in(entry.box)], source)
        return
    # Stored as bytes: a view of the target's bytes where it is contiguous, else through a copy.
    data = as_bytes(local)
    if local.is_contiguous():
        uploads.copy(data[copy.box.slices_in(entry.box)], source)
    else:
        data[copy.box.slices_in(entry.box)].copy_(source)
        local.copy_(data.view(-1).view(local.dtype).view(local.shape))


def _generators(reader: ImageReader, rank: int) -> dict[str, torch.Tensor]:
    """The states of this rank's own random generators."""
    held = {entry.name: entry for entry in reader.entries()}
    return {
        which: reader.tensor(held[rng_name(rank, which)])
        for which in ("torch", "cuda")
        if rng_name(rank, which) in held
    }
