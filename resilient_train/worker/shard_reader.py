"""One shard of a stream: the user's loader for it, and its place as bytes that another rank can go on from."""

from __future__ import annotations

import json
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from resilient_train.errors import ConfigError, FormatError, StateMismatch, UnsupportedState
from resilient_train.image.snapshot import DTYPES
from resilient_train.plan.batch import mix
from resilient_train.spec import jsontree
from resilient_train.worker.rng import seed_generators
from resilient_train.worker.tensors import as_bytes, dtype_named

OpenShard = Callable[[int, int], Iterable[Any]]
"""``open_shard(shard, epoch)``: the batches of a shard in one epoch."""
_LENGTH = struct.Struct("<II")
"""How many bytes of a row are used, and of which shard it tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How far a shard has been read."""

    epoch: int = 0
    """How often it has been read to its end."""
    batches: int = 0
    """How many batches of this epoch have been delivered."""
    state: Any = None
    """What the loader said then, None if it says nothing."""


class ShardReader:
    """Reads a shard over and over again, epoch after epoch.

    Args:
        open_shard: makes the loader for an epoch.
        shard: which one.
        place: where to go on.
        seed: torch's generators are seeded from it, the shard, the epoch and the batch before each batch is asked for,
            so that a loader that shuffles with them does so alike whenever and wherever it is opened.
        device: whose generators.
    """

    def __init__(self, open_shard: OpenShard, shard: int, place: Place, seed: int, device: torch.device) -> None:
        self._open_shard = open_shard
        self._shard = shard
        self._from = place
        self._seed = seed
        self._device = device
        self._epoch, self._batches = place.epoch, place.batches
        self._loader: Iterable[Any] | None = None
        self._iterator: Iterator[Any] = iter(())

    def next(self) -> Any:
        """The next batch.

        Raises:
            ConfigError: if an epoch has no batch at all.
            StateMismatch: if the shard ends before the place from which to go on.
        """
        if self._loader is None:
            self._open()
            self._go_on()
        while True:
            try:
                return self._read()
            except StopIteration:
                if not self._batches:
                    raise ConfigError(f"shard {self._shard} has no batches in epoch {self._epoch}") from None
                self._epoch, self._batches, self._from = self._epoch + 1, 0, Place()
                self._open()

    def place(self) -> Place:
        """Where another reader goes on."""
        if self._loader is None:
            return self._from
        says = getattr(self._loader, "state_dict", None)
        return Place(epoch=self._epoch, batches=self._batches, state=None if says is None else says())

    def _open(self) -> None:
        # The worker processes of an epoch end before those of the next begin.
        self._loader, self._iterator = None, iter(())
        self._seed_for(-1)
        self._loader = self._open_shard(self._shard, self._epoch)
        if self._from.state is not None:
            load = getattr(self._loader, "load_state_dict", None)
            if load is None:
                kind = type(self._loader).__name__
                raise StateMismatch(f"shard {self._shard} has a saved state, which a {kind} does not take back")
            load(self._from.state)
        self._iterator = iter(self._loader)

    def _go_on(self) -> None:
        """Without a state of the loader's own, read again what was delivered."""
        if self._from.state is not None:
            return
        self._batches = 0
        for _ in range(self._from.batches):
            try:
                self._read()
            except StopIteration:
                raise StateMismatch(
                    f"shard {self._shard} ends after {self._batches} batches, {self._from.batches} were read before"
                ) from None

    def _read(self) -> Any:
        self._seed_for(self._batches)
        batch = next(self._iterator)
        self._batches += 1
        return batch

    def _seed_for(self, batch: int) -> None:
        seed_generators(mix(self._seed, self._shard, self._epoch, batch), self._device)


def encode_place(shard: int, place: Place, row: torch.Tensor) -> None:
    """Write a place into ``row``, uint8.

    Raises:
        UnsupportedState: if the loader's state is not of tensors and JSON values, or does not fit.
    """
    where = f"the state of shard {shard}"
    value = [place.epoch, place.batches, jsontree.encode(_with_bytes(place.state, where), where)]
    text = json.dumps(value, separators=(",", ":")).encode()
    data = _LENGTH.pack(len(text), shard) + text
    if len(data) > len(row):
        raise UnsupportedState(f"{where} takes {len(data)} bytes: the stream needs state_bytes of that at least")
    row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    row[len(data) :] = 0


def shard_of(row: torch.Tensor) -> int:
    """Of which shard a row tells."""
    return int(_LENGTH.unpack(bytes(row[: _LENGTH.size].numpy()))[1])


def decode_place(row: torch.Tensor) -> Place:
    """The inverse of `encode_place`.

    Raises:
        FormatError: if the row is malformed.
    """
    length, _ = _LENGTH.unpack(bytes(row[: _LENGTH.size].numpy()))
    value = jsontree.parse(bytes(row[_LENGTH.size : _LENGTH.size + length].numpy()))
    try:
        epoch, batches, state = value
        return Place(
            epoch=jsontree.integer(epoch),
            batches=jsontree.integer(batches),
            state=_with_tensors(jsontree.decode(state)),
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"malformed place of a shard: {error}") from error


def _with_bytes(tree: Any, path: str) -> Any:
    """``tree`` with the bytes of its tensors in their places."""
    if isinstance(tree, torch.Tensor):
        if type(tree) is not torch.Tensor or tree.dtype not in DTYPES:
            raise UnsupportedState(f"{path} is a {type(tree).__name__} of {tree.dtype}, which a checkpoint cannot hold")
        facts = {"dtype": str(tree.dtype).removeprefix("torch."), "shape": list(tree.shape)}
        return jsontree.TensorAt(as_bytes(tree.detach().cpu()).numpy().tobytes().hex(), facts)
    if isinstance(tree, Mapping):
        found = {key: _with_bytes(value, f"{path}.{key}") for key, value in tree.items()}
        return type(tree)(found) if isinstance(tree, (Counter, OrderedDict)) else found
    if isinstance(tree, (list, tuple)):
        items = [_with_bytes(value, f"{path}[{index}]") for index, value in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def _with_tensors(tree: Any) -> Any:
    if isinstance(tree, jsontree.TensorAt):
        data = bytearray.fromhex(tree.name)
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(dtype_named(tree["dtype"])).view(tree["shape"]).clone()
    if isinstance(tree, dict):
        found = {key: _with_tensors(value) for key, value in tree.items()}
        return found if type(tree) is dict else type(tree)(found)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_with_tensors(value) for value in tree)
    return tree
