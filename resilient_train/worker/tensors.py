"""Tensors as boxes: what this rank holds of a tensor, plain or DTensor, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from resilient_train.errors import FormatError, StateMismatch, UnsupportedState
from resilient_train.image.snapshot import DTYPES, TORCH_DTYPES
from resilient_train.spec.layout import Box, shard_box
from resilient_train.spec.shard import Entry

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def local_part(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Box, tuple[int, ...]]:
    """(this rank's elements, their box, the global shape).

    Raises:
        UnsupportedState: naming the tensor, for subclasses and placements that have no boxes.
    """
    if isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        coordinate = tensor.device_mesh.get_coordinate()
        if coordinate is None:
            raise UnsupportedState(f"{name}: its mesh does not contain this rank")
        dims = [_shard_dim(name, placement) for placement in tensor.placements]
        box = shard_box(shape, tuple(tensor.device_mesh.shape), coordinate, dims)
        with torch.no_grad():
            local = tensor.to_local().detach()
        if tuple(local.shape) != box.shape:
            raise UnsupportedState(f"{name}: torch holds {tuple(local.shape)} here, its placements say {box.shape}")
        return local, box, shape
    if type(tensor) not in _PLAIN or tensor.is_nested or tensor.layout is not torch.strided:
        raise UnsupportedState(
            f"{name} is a {type(tensor).__name__} with layout {tensor.layout}, which a checkpoint cannot hold"
        )
    if tensor.is_quantized or tensor.is_meta:
        raise UnsupportedState(f"{name} has {'no elements' if tensor.is_meta else 'quantized elements'}")
    return tensor.detach(), Box.whole(tensor.shape), tuple(tensor.shape)


def _shard_dim(name: str, placement: object) -> int | None:
    if type(placement) is Replicate:
        return None
    if type(placement) is Shard:
        return placement.dim
    raise UnsupportedState(f"{name}: placement {placement!r} cannot be saved")


def stored(name: str, tensor: torch.Tensor) -> tuple[Entry, torch.Tensor]:
    """How a tensor stands in an image: (its entry, this rank's elements, whose bytes in order are the entry's)."""
    local, box, shape = local_part(name, tensor)
    dtype = DTYPES.get(local.dtype)
    if dtype is not None:
        return Entry(name=name, dtype=dtype, shape=box.shape, global_shape=shape, offset=box.offset), local
    width = local.element_size()
    entry = Entry(
        name=name,
        dtype="U8",
        shape=(*box.shape, width),
        global_shape=(*shape, width),
        offset=(*box.offset, 0),
        real_dtype=str(local.dtype).removeprefix("torch."),
    )
    return entry, local


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes with one more axis; a view if they stand in memory as they are."""
    width = tensor.element_size()
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).view(*tensor.shape, width)


def real_dtype(entry: Entry) -> torch.dtype:
    """The torch dtype that an entry's elements have.

    Raises:
        UnsupportedState: if this torch has no such dtype.
    """
    dtype = getattr(torch, entry.real_dtype, None) if entry.real_dtype else TORCH_DTYPES.get(entry.dtype)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedState(f"{entry.name}: this torch has no dtype {entry.real_dtype or entry.dtype:.50}")
    return dtype


def real_shape(entry: Entry) -> tuple[int, ...]:
    """The shape of the whole tensor that an entry is a part of."""
    return entry.global_shape[:-1] if entry.real_dtype else entry.global_shape


def dtype_named(name: Any) -> torch.dtype:
    """The inverse of how a document names dtypes.

    Raises:
        FormatError: if it is no dtype's name.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"{name!r:.50} is no dtype")
    return dtype


def device_named(name: Any) -> torch.device:
    """The device on which to put what stood on a device of this type.

    Raises:
        FormatError: if it is no type of device that holds elements.
        StateMismatch: if there is none of this type here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(name if isinstance(name, str) else "")
    except RuntimeError as error:
        raise FormatError(f"{name!r:.50} is no device") from error
    if device.index is not None or device.type == "meta":
        raise FormatError(f"{name!r:.50} is no type of device that holds elements")
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise StateMismatch(f"the checkpoint holds tensors of a {device.type} device, and here is none")
    return device


def like_parameter(parameter: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """Uninitialised optimizer state of a global ``shape``: sharded like the parameter if it has its shape."""
    if isinstance(parameter, DTensor) and tuple(shape) == tuple(parameter.shape):
        local = torch.empty_like(parameter.to_local(), dtype=dtype)
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    where = parameter.device if device == "parameter" else device_named(device)
    memory_format = torch.preserve_format if tuple(shape) == tuple(parameter.shape) else torch.contiguous_format
    if memory_format is torch.preserve_format and not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, dtype=dtype, device=where, requires_grad=False)
    return torch.empty(tuple(shape), dtype=dtype, device=where)
