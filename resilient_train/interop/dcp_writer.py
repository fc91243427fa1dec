"""``Writer``: a checkpoint that ``dcp.save`` writes and everything here reads.

DCP plans who writes what; every rank writes what it was given as one image.  Tensors are named by the coordinator,
which alone sees all ranks' plans.  What is not a tensor stands in the coordinator's image only.  Usually it has all
of it itself; where other ranks have keys of their own (pipelines), it writes its image last, when it knows them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint import SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from resilient_train.errors import ConfigError, StorageError, UnsupportedState
from resilient_train.interop.dcp_document import EMPTY, document_of
from resilient_train.interop.dcp_names import Part, Path, entry_name, parts_of
from resilient_train.interop.image_file import ImageSource, Load, entry_of, next_key, or_nothing
from resilient_train.spec import jsontree
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import Entry
from resilient_train.spec.world import MAX_STEP, Key
from resilient_train.storage.catalogue import commit
from resilient_train.storage.commit import ImageFile, Manifest, folder_of
from resilient_train.storage.filesystem import open_tier
from resilient_train.storage.tier import Tier

_CACHED = "enable_plan_caching is not supported: every checkpoint has a key of its own, which a cached plan has not"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What the coordinator tells a rank."""

    key: Key
    """The state's identity."""
    rank: int
    """Whose image to write."""
    world: int
    """Number of ranks."""
    names: Mapping[str, str]
    """DCP's name of each of the rank's tensors to its name in the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What a rank tells the coordinator."""

    file: ImageFile | None
    """Its image; None while the coordinator's is not written."""
    values: Mapping[str, Any]
    """DCP's name of each of the rank's leaves that are no tensors to the leaf as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """What the coordinator remembers until all ranks are done."""

    order: _Order
    """Its own."""
    loads: Mapping[Entry, Load]
    """Its tensors."""
    values: Mapping[str, Any]
    """Leaves that are no tensors, as JSON."""


class Writer(StorageWriter):
    """Writes one checkpoint of a training, for ``dcp.save`` and ``dcp.async_save``.

    The checkpoint is a folder ``step-000001200.g4/`` as `rt.Checkpointer` writes it, with a lineage of its own, higher
    than any at the URL: nothing that is there is overwritten.  It exists when its manifest does, which is written last.

    Args:
        url: where to: a path or any URL that fsspec knows.
        step: number of finished steps.

    Raises:
        ConfigError: for a malformed argument.

    While saving, DCP wraps these in its ``CheckpointException``:

    - ``UnsupportedState`` naming what cannot be saved, which is never pickled;
    - ``StorageError`` if anything could not be written.  There is no checkpoint then.

    Example::

        dcp.save({"model": model.state_dict()}, storage_writer=Writer("s3://bucket/run-1", step=1200))
    """

    def __init__(self, url: str | os.PathLike[str], *, step: int) -> None:
        self.url = os.fspath(url)
        if not isinstance(self.url, str) or not self.url:
            raise ConfigError(f"url must be a path or a URL, it is {url!r}")
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise ConfigError(f"step must be the number of finished steps, it is {step!r}")
        self.step = step
        self._coordinator = False
        self._parts: list[Part] = []
        self._bytes: list[str] = []
        self._begun: _Begun | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """DCP begins; ``checkpoint_id`` has nothing to say here."""
        if checkpoint_id is not None:
            raise ConfigError("checkpoint_id and Writer exclude each other: Writer(url, step=...) says where to")
        self._begun = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No id chooses this writer by itself."""
        del checkpoint_id
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter`."""
        del args
        if kwargs.get("use_collectives", True) is not True:
            raise ConfigError("use_collectives=False is not supported: the ranks must agree on one checkpoint")
        self._coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter`."""
        _check_fresh([plan])
        return dataclasses.replace(plan, storage_data=self.step)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Choose the key and name everything."""
        _check_fresh(plans)
        steps = sorted({plan.storage_data for plan in plans})
        if len(steps) > 1:
            raise ConfigError(f"the ranks are about to save different steps: {', '.join(map(str, steps))}")
        tier = open_tier(self.url)
        tier.check_writable()
        key = next_key(tier, self.step)
        self._parts, self._bytes = _named(plans)
        names = {leaf.fqn: entry_name(part, leaf) for part in self._parts for leaf in part.leaves if leaf.tensor}
        return [
            dataclasses.replace(
                plan,
                storage_data=_Order(
                    key=key,
                    rank=rank,
                    world=len(plans),
                    names={item.index.fqn: names[item.index.fqn] for item in plan.items if _is_tensor(item)},
                ),
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's image."""
        order = plan.storage_data
        if not isinstance(order, _Order) or order.key.step != self.step:
            raise ConfigError(_CACHED)
        if self._coordinator and order.rank != 0:
            raise ConfigError(f"rank 0 must coordinate the save, not rank {order.rank}")
        tier = open_tier(self.url)
        with or_nothing(tier, order.key):
            done = self._write(tier, order, plan.items, planner)
        future: Future[list[WriteResult]] = Future()
        size = done.file.size if done.file is not None else 0
        future.set_result([WriteResult(index=MetadataIndex(str(order.rank)), size_in_bytes=size, storage_data=done)])
        return future

    def _write(self, tier: Tier, order: _Order, items: Sequence[WriteItem], planner: SavePlanner) -> _Done:
        mine = [item.index.fqn for item in items if not _is_tensor(item)]
        values = {fqn: jsontree.encode(_looked_up(planner, fqn), fqn) for fqn in mine}
        loads = _loads(order, items, planner)
        if not self._coordinator:
            return _Done(file=_put(tier, order, loads, EMPTY), values=values)
        for fqn in self._bytes:
            with contextlib.suppress(KeyError):
                if fqn not in values:
                    values[fqn] = jsontree.encode(_looked_up(planner, fqn), fqn)
        self._begun = _Begun(order=order, loads=loads, values=values)
        if len(values) < len(self._bytes):
            return _Done(file=None, values={})
        return _Done(file=_put(tier, order, loads, self._document(values)), values={})

    def _document(self, values: Mapping[str, Any]) -> bytes:
        return document_of(self._parts, {fqn: jsontree.decode(value) for fqn, value in values.items()})

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, once every rank has written its image."""
        del metadata
        begun, self._begun = self._begun, None
        assert begun is not None
        order, tier = begun.order, open_tier(self.url)
        done: list[_Done] = [result.storage_data for one in results for result in one]
        files = [one.file for one in done if one.file is not None]
        with or_nothing(tier, order.key):
            if len(files) < order.world:
                values = {**begun.values, **{fqn: value for one in done for fqn, value in one.values.items()}}
                files.append(_put(tier, order, begun.loads, self._document(values)))
            past = {order.key.lineage: None}
            if not commit(tier, Manifest(key=order.key, world=order.world, files=tuple(files), past=past)):
                raise StorageError(f"{self.url}/{folder_of(order.key)}: the ranks' images do not make up a checkpoint")


def _check_fresh(plans: Sequence[SavePlan]) -> None:
    # Versions of torch that cannot cache plans do not say of one that it is to be used.
    if not all(getattr(plan, "usable", True) for plan in plans):
        raise ConfigError(_CACHED)


def _is_tensor(item: WriteItem) -> bool:
    return item.type is not WriteItemType.BYTE_IO


def _named(plans: Sequence[SavePlan]) -> tuple[list[Part], list[str]]:
    """The parts of the state that all ranks have together, and DCP's names of the leaves that are no tensors."""
    tensors = {item.index.fqn for plan in plans for item in plan.items if _is_tensor(item)}
    others = [item.index.fqn for plan in plans for item in plan.items if not _is_tensor(item)]
    paths: dict[str, Path] = {}
    for plan in plans:
        # In the order of the state dict, which is that of the parameters; the plan's items were divided over the ranks.
        paths.update((fqn, path) for fqn, path in (plan.planner_data or {}).items() if fqn not in paths)
    there = tensors.union(others)
    paths = {fqn: path for fqn, path in paths.items() if fqn in there}
    paths.update((fqn, (fqn,)) for fqn in [*sorted(tensors), *others] if fqn not in paths)
    return parts_of(paths, tensors), others


def _looked_up(planner: SavePlanner, fqn: str) -> Any:
    """A leaf that is no tensor, itself: what the planner would hand out is pickled.

    Raises:
        KeyError: if this rank does not have it.
    """
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        kind = type(planner).__name__
        raise ConfigError(f"the planner {kind} has no lookup_object: derive it from DefaultSavePlanner")
    try:
        return look_up(MetadataIndex(fqn))
    except ValueError as error:
        raise KeyError(fqn) from error


def _loads(order: _Order, items: Sequence[WriteItem], planner: SavePlanner) -> dict[Entry, Load]:
    loads: dict[Entry, Load] = {}
    for item in items:
        data = item.tensor_data
        if not _is_tensor(item) or data is None:
            continue
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        shape = tuple(data.size)
        # An empty shard says nothing, an empty tensor has to be there.
        if box.size or not prod(shape):
            entry = entry_of(order.names[item.index.fqn], data.properties.dtype, box, shape)
            loads[entry] = partial(_resolved, planner, item)
    return loads


def _resolved(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    data = planner.resolve_data(item)
    if not isinstance(data, torch.Tensor):
        raise UnsupportedState(f"{item.index.fqn}: the planner gives a {type(data).__name__} for a tensor")
    return data


def _put(tier: Tier, order: _Order, loads: Mapping[Entry, Load], document: bytes) -> ImageFile:
    source = ImageSource(order.key, order.rank, order.world, loads, document)
    return source.put(tier)
