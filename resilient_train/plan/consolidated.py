"""Whole tensors in safetensors files as Hugging Face names, splits and indexes them: which goes where, the headers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from resilient_train.errors import FormatError
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import DTYPE_SIZES, MAX_HEADER

INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A tensor with all of its elements."""

    name: str
    """Canonical name within the module."""
    dtype: str
    """safetensors dtype."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutFile:
    """One safetensors file to write."""

    name: str
    """File name."""
    header: bytes
    """Its leading bytes."""
    tensors: tuple[Whole, ...]
    """What follows, one after the other without holes."""

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan_files(tensors: Sequence[Whole], aliases: Mapping[str, str], limit: int) -> tuple[OutFile, ...]:
    """Distribute tensors over files of at most ``limit`` bytes of data, in the order of their names.

    A tensor above the limit gets a file of its own.  Aliases stand in the metadata of the file that has what they are
    aliases of (``alias: name``), as `safetensors.torch.save_model` puts them.

    Raises:
        FormatError: if a header grows beyond what safetensors reads, or a tensor is called what it cannot be.
    """
    groups: list[list[Whole]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda one: one.name):
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return tuple(_file(_file_name(i, len(groups)), group, aliases) for i, group in enumerate(groups))


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _file(name: str, tensors: Sequence[Whole], aliases: Mapping[str, str]) -> OutFile:
    # Largest elements first, so that every tensor is aligned without holes.
    ordered = tuple(sorted(tensors, key=lambda one: (-DTYPE_SIZES[one.dtype], one.name)))
    here = {tensor.name for tensor in ordered}
    if _METADATA in here:
        raise FormatError(f"safetensors cannot hold a tensor that is called {_METADATA}")
    shared = {alias: first for alias, first in sorted(aliases.items()) if first in here}
    table: dict[str, Any] = {_METADATA: {**shared, "format": "pt"}}
    at = 0
    for tensor in ordered:
        end = at + tensor.nbytes
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    length = -(-len(text) // _ALIGNMENT) * _ALIGNMENT
    if length > MAX_HEADER:
        raise FormatError(f"the header of {name} needs {length} bytes, safetensors reads {MAX_HEADER}")
    return OutFile(name=name, header=length.to_bytes(8, "little") + text.ljust(length), tensors=ordered)


def index_of(files: Sequence[OutFile]) -> bytes:
    """The document that says which file has which tensor."""
    weights = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()


def slabs(tensor: Whole, limit: int) -> Iterator[Box]:
    """The tensor cut along its first dimension into boxes of about ``limit`` bytes; bytes of each follow the last's."""
    if not tensor.shape or tensor.nbytes <= limit:
        if tensor.nbytes:
            yield Box.whole(tensor.shape)
        return
    row = tensor.nbytes // tensor.shape[0]
    step = max(1, limit // row)
    inner = tensor.shape[1:]
    for begin in range(0, tensor.shape[0], step):
        yield Box((begin, *(0 for _ in inner)), (min(step, tensor.shape[0] - begin), *inner))
