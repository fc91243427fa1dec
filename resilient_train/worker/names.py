"""Canonical names: a tensor is called the same however its module is wrapped."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from resilient_train.errors import UnsupportedState

_WRAPPED = {"OptimizedModule": "_orig_mod", "CheckpointWrapper": "_checkpoint_wrapped_module"}


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside of DDP, ``torch.compile`` and activation checkpointing wrappers.

    Raises:
        UnsupportedState: for FSDP1, whose flat parameters have no names of their own.
    """
    while True:
        kind = type(module).__name__
        if kind == "FullyShardedDataParallel":
            raise UnsupportedState("FullyShardedDataParallel (FSDP1) is not supported: use fully_shard")
        inner = module.module if isinstance(module, DistributedDataParallel) else None
        if kind in _WRAPPED:
            inner = getattr(module, _WRAPPED[kind])
        if inner is None:
            return module
        module = inner


def _modules(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    module = unwrap(module)
    yield prefix, module
    for name, child in module.named_children():
        yield from _modules(child, f"{prefix}{name}.")


def modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """All modules, wrappers left out."""
    return [part for _, part in _modules(module, "")]


def parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Canonical name to parameter; tied ones stand under their first name."""
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, part in _modules(module, ""):
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[prefix + name] = parameter
    return found


def buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name to persistent buffer; shared ones stand under their first name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, part in _modules(module, ""):
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                found[prefix + name] = buffer
    return found


def aliases(module: torch.nn.Module) -> dict[str, str]:
    """Further names of tied parameters and buffers, each with the name it is stored under."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for prefix, part in _modules(module, ""):
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None or name in part._non_persistent_buffers_set:
                continue
            if id(tensor) in first and first[id(tensor)] != prefix + name:
                found[prefix + name] = first[id(tensor)]
            first.setdefault(id(tensor), prefix + name)
    return found


def extra_states(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules with a ``get_extra_state`` of their own, by name."""
    plain = torch.nn.Module.get_extra_state
    return {prefix: part for prefix, part in _modules(module, "") if type(part).get_extra_state is not plain}
