"""Tensors as boxes: what this rank holds of a tensor, plain or DTensor, and how it is stored."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from resilient_train.errors import FormatError, StateMismatch, UnsupportedState
from resilient_train.image.snapshot import DTYPES, TORCH_DTYPES
from resilient_train.spec.layout import Box
from resilient_train.spec.shard import Entry
from resilient_train.spec.sharding import Cut, held_box

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_CUTTING = (Shard, _StridedShard)


def local_part(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Box, tuple[int, ...]]:
    """(this rank's elements, their box, the global shape).

    Raises:
        UnsupportedState: naming the tensor, for subclasses and placements that have no boxes.
    """
    if isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        box = box_here(name, shape, tensor.device_mesh, tensor.placements)
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


def cuts_of(
    name: str, placements: Sequence[Placement], mesh_shape: Sequence[int], strides: Sequence[int]
) -> tuple[Cut, ...]:
    """A DTensor's layout over a mesh, whose dimensions have these sizes and distances between neighbouring ranks.

    ``Shard`` cuts in the order of the mesh's dimensions, as ``torch.chunk`` does.  ``_StridedShard`` is what FSDP makes
    of a tensor that dimensions further inside (TP) have cut before: it cuts after them.

    Raises:
        UnsupportedState: naming the tensor, for placements that leave a rank with more than one block, or none.
    """
    dims = list(zip(placements, mesh_shape, strides, strict=True))
    first, later = [], []
    for at, (placement, parts, stride) in enumerate(dims):
        if type(placement) is Shard:
            first.append(Cut(placement.dim, parts, stride))
        elif type(placement) is _StridedShard:
            inside = [n for other, n, _ in dims[at + 1 :] if isinstance(other, _CUTTING) and other.dim == placement.dim]
            if placement.split_factor != prod(inside):
                raise UnsupportedState(f"{name}: placement {placement!r} leaves every rank with several blocks")
            later.append(Cut(placement.dim, parts, stride))
        elif type(placement) is not Replicate:
            raise UnsupportedState(f"{name}: placement {placement!r} cannot be saved")
    return (*first, *reversed(later))


def box_here(name: str, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> Box:
    """The box that this rank holds of a tensor of global ``shape``.

    Raises:
        UnsupportedState: naming the tensor, if it holds none, or several.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UnsupportedState(f"{name}: its mesh does not contain this rank")
    # A model's layers repeat each other.  The meshes of two generations may be equal, and this rank's place another.
    known, layout = _boxes.setdefault(mesh, {}), (tuple(shape), tuple(placements), tuple(coordinate))
    if layout not in known:
        # Numbered as if the mesh were all there is: a selection of ranks may have no regular numbers of its own.
        sizes = tuple(mesh.shape)
        strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
        here = sum(at * stride for at, stride in zip(coordinate, strides, strict=True))
        known[layout] = held_box(shape, cuts_of(name, placements, sizes, strides), here)
    return known[layout]


_boxes: weakref.WeakKeyDictionary[DeviceMesh, dict[tuple[Any, ...], Box]] = weakref.WeakKeyDictionary()
"""Of each mesh, what a rank at some coordinate holds of tensors of a shape that are placed alike."""
_strides: weakref.WeakKeyDictionary[DeviceMesh, tuple[int, ...] | None] = weakref.WeakKeyDictionary()


def _strides_of(mesh: DeviceMesh) -> tuple[int, ...] | None:
    """Distance of neighbouring ranks along each dimension; None if ranks are not numbered row by row."""
    if mesh not in _strides:
        ranks = mesh.mesh
        first = int(ranks.flatten()[0])
        strides = tuple(
            int(ranks.select(dim, 1).flatten()[0]) - first if n > 1 else 1 for dim, n in enumerate(ranks.shape)
        )
        places = [ranks // max(1, stride) % n for stride, n in zip(strides, ranks.shape, strict=True)]
        grid = torch.meshgrid(*map(torch.arange, ranks.shape), indexing="ij")
        regular = min(strides) > 0 and all(map(torch.equal, places, grid))
        _strides[mesh] = strides if regular else None
    return _strides[mesh]


def job_cuts(name: str, tensor: torch.Tensor) -> tuple[Cut, ...] | None:
    """How a tensor is laid out over all ranks of the job; None where it cannot be told."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    strides = _strides_of(mesh)
    return cuts_of(name, tensor.placements, tuple(mesh.shape), strides) if strides else None


def stored(name: str, tensor: torch.Tensor) -> tuple[Entry, torch.Tensor]:
    """How a tensor stands in an image: (its entry, this rank's elements, whose bytes in order are the entry's)."""
    local, box, shape = local_part(name, tensor)
    cuts = job_cuts(name, tensor)
    dtype = DTYPES.get(local.dtype)
    if dtype is not None:
        return Entry(name=name, dtype=dtype, shape=box.shape, global_shape=shape, offset=box.offset, cuts=cuts), local
    width = local.element_size()
    entry = Entry(
        name=name,
        dtype="U8",
        shape=(*box.shape, width),
        global_shape=(*shape, width),
        offset=(*box.offset, 0),
        real_dtype=str(local.dtype).removeprefix("torch."),
        cuts=cuts,
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


def like_parameter(
    parameter: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, device: Any, *, distributed: bool = False
) -> torch.Tensor:
    """Uninitialised optimizer state of a global ``shape``: sharded like the parameter if it has its shape.

    State of another shape that is ``distributed`` (factored moments) is sharded along the dimensions that it shares
    with the parameter.
    """
    if distributed and isinstance(parameter, DTensor) and tuple(shape) != tuple(parameter.shape):
        return _factor(parameter, tuple(shape), dtype)
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


def _factor(parameter: DTensor, shape: tuple[int, ...], dtype: torch.dtype) -> DTensor:
    def fits(placement: Placement) -> bool:
        dim = placement.dim if isinstance(placement, _CUTTING) else -1
        return 0 <= dim < len(shape) and shape[dim] == parameter.shape[dim]

    placements = [placement if fits(placement) else Replicate() for placement in parameter.placements]
    mesh = parameter.device_mesh
    local = box_here("optimizer state", shape, mesh, placements).shape
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        torch.empty(local, dtype=dtype, device=parameter.to_local().device),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
