"""Tensors and other leaves out of the files that plain DCP wrote, one at a time, without executing anything."""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any

import torch

from resilient_train.errors import CheckpointDamaged, FormatError, UnsupportedState
from resilient_train.image.snapshot import TORCH_DTYPES
from resilient_train.interop.dcp_folder import Item
from resilient_train.spec import jsontree
from resilient_train.spec.shard import MAX_HEADER
from resilient_train.storage.tier import Tier

_ZIP = b"PK\x03\x04"
"""What ``torch.save`` writes begins with it."""


def read_value(tier: Tier, item: Item) -> Any:
    """A leaf that is no tensor.

    Raises:
        UnsupportedState: naming the leaf and the class, if it is made of more than plain values.
        CheckpointDamaged: if it cannot be read.
    """
    return _loaded(tier, item, tier.read(item.file, item.offset, item.length))


def read_tensor(tier: Tier, item: Item) -> torch.Tensor:
    """A box of a tensor; its shape and dtype are for the caller to check.

    Raises:
        UnsupportedState: naming it, if it is something else than a tensor.
        CheckpointDamaged: if it cannot be read.
    """
    if tier.read(item.file, item.offset, len(_ZIP)) != _ZIP:
        return _from_safetensors(tier, item)
    tensor = _loaded(tier, item, tier.read(item.file, item.offset, item.length))
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedState(f"{_where(tier, item)} is a {type(tensor).__name__} where a tensor must be")
    return tensor


def _where(tier: Tier, item: Item) -> str:
    return f"{tier.name}/{item.file}: {item.fqn} (from byte {item.offset})"


def _loaded(tier: Tier, item: Item, data: bytes) -> Any:
    """What ``torch.save`` wrote, by torch's unpickler for tensors and plain values."""
    try:
        # torch does not look at the checksums.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if bad := archive.testzip():
                raise FormatError(f"{bad} fails its checksum")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever torch raises for what it does not read.
        named = re.search(r"GLOBAL (\S+)|Unsupported (?:class|global): (\S+)", str(error))
        if named:
            what = named[1] or named[2]
            raise UnsupportedState(f"{_where(tier, item)} needs {what}, which is no plain value: refused") from error
        raise CheckpointDamaged(f"{_where(tier, item)} cannot be read: {error!r:.300}") from error


def _from_safetensors(tier: Tier, item: Item) -> torch.Tensor:
    """A tensor of a safetensors file that begins at the item's offset and ends with the file."""
    try:
        length = int.from_bytes(tier.read(item.file, item.offset, 8), "little")
        if length > MAX_HEADER:
            raise FormatError("neither torch.save nor safetensors wrote it")
        described = jsontree.parse(tier.read(item.file, item.offset + 8, length))[item.fqn]
        begin, end = map(jsontree.integer, described["data_offsets"])
        dtype, shape = TORCH_DTYPES[described["dtype"]], [jsontree.integer(n) for n in described["shape"]]
        data = bytearray(tier.read(item.file, item.offset + 8 + length + begin, end - begin))
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
    except (FormatError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"{_where(tier, item)} cannot be read: {error!r:.300}") from error
