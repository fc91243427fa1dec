"""Optimizers as state: what they hold for each parameter, by the parameters' names, and the options of their groups.

Missing state is allocated in the recorded dtype, never made by stepping the optimizer or by ``load_state_dict``, which
casts and aliases.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from resilient_train.errors import FormatError, StateMismatch
from resilient_train.spec.shard import Entry
from resilient_train.worker.capture import Capture
from resilient_train.worker.documents import restricted
from resilient_train.worker.targets import Targets, built
from resilient_train.worker.tensors import device_named, dtype_named, like_parameter, real_dtype, real_shape

_LATER = frozenset({"decoupled_weight_decay"})
"""Options that torch added in versions that are still in use; what an optimizer has here is what older ones did."""


def _names_in_groups(
    name: str, optimizer: torch.optim.Optimizer, known: Mapping[int, str]
) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) of everything the optimizer optimises, in the order of its groups."""
    named = []
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            named.append((known.get(id(parameter), f"{name}-group{index}-{place}"), parameter))
    return named


def parameters(name: str, optimizer: torch.optim.Optimizer, known: Mapping[int, str]) -> list[str]:
    """The names of everything the optimizer optimises, in the order of its groups."""
    return [path for path, _ in _names_in_groups(name, optimizer, known)]


def walk(name: str, optimizer: torch.optim.Optimizer, known: Mapping[int, str], capture: Capture) -> dict[str, Any]:
    """Add the state of every parameter to ``capture``; the document of what stays the same.

    Args:
        name: the optimizer's, in the state.
        optimizer: any.
        known: id of a parameter to its canonical name.
        capture: receives the tensors.
    """
    named = _names_in_groups(name, optimizer, known)
    packs: dict[tuple[str, torch.dtype], list[torch.Tensor]] = {}
    state: dict[str, dict[str, Any]] = {}
    for path, parameter in named:
        described = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            described[key] = _describe(f"{name}/{path}", key, value, parameter, packs, capture)
        if described:
            state[path] = described
    # Thousands of one-element tensors (AdamW's step) travel as one.
    for (key, dtype), scalars in packs.items():
        paths = [path for path in state if state[path].get(key, {}).get("dtype") == _dtype_name(dtype)]
        # Ranks that have the same parameters share it; those of other pipeline stages have their own.
        which = f"{zlib.crc32(chr(0).join(paths).encode()):08x}"
        for path in paths:
            state[path][key]["pack"] = which
        capture.add_pack(_pack_name(name, key, dtype, which), scalars)
    capture.contents.append(lambda: (value for held in optimizer.state.values() for value in held.values()))
    capture.contents.append(lambda: (parameter for group in optimizer.param_groups for parameter in group["params"]))
    kind = type(optimizer).__name__
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    parameters = [path for path, _ in named]
    return {"kind": "optimizer", "class": kind, "parameters": parameters, "sizes": sizes, "state": state}


def fresh(name: str, optimizer: torch.optim.Optimizer, capture: Capture) -> dict[str, Any]:
    """The document of what any step may change: the options of the groups."""
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(capture.encode(options, f"{name}/group{index}"))
    return {"groups": groups}


def check(name: str, optimizer: torch.optim.Optimizer, document: Mapping[str, Any]) -> None:
    """Raises:
    StateMismatch: if a checkpoint's document is of another kind of optimizer or has another number of groups.
    """
    kind = type(optimizer).__name__
    if document["class"] is None:
        _check_options(name, optimizer, document)
    elif document["class"] != kind:
        raise StateMismatch(f"{name} is an optimizer {kind} here, {document['class']} in the checkpoint")
    here, there = len(optimizer.param_groups), len(document["groups"])
    if here != there:
        raise StateMismatch(f"{name} has {here} parameter groups here, {there} in the checkpoint")


def _check_options(name: str, optimizer: torch.optim.Optimizer, document: Mapping[str, Any]) -> None:
    """Of an optimizer that another library saved the class is not known, but its options tell much of it."""
    for index, group in enumerate(document["groups"]):
        lacking = sorted(optimizer.defaults.keys() - group.keys() - _LATER)
        if lacking:
            kind = type(optimizer).__name__
            raise StateMismatch(
                f"{name} is an optimizer {kind} here, and group {index} of the checkpoint's has no {', '.join(lacking)}"
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pack_name(name: str, key: str, dtype: torch.dtype, which: str) -> str:
    return f"{name}/packed/{key}.{_dtype_name(dtype)}.{which}"


def _describe(
    path: str,
    key: str,
    value: Any,
    parameter: torch.Tensor,
    packs: dict[tuple[str, torch.dtype], list[torch.Tensor]],
    capture: Capture,
) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        # Numbers and lists (LBFGS) change from step to step, and so does what they hold.
        capture.fixed = False
        return {"value": capture.encode(value, f"{path}/{key}")}
    device = "parameter" if value.device.type == parameter.device.type else value.device.type
    if value.dim() == 0 and type(value) is torch.Tensor and parameter.dim() > 0:
        pack = packs.setdefault((key, value.dtype), [])
        pack.append(value)
        return {"packed": len(pack) - 1, "dtype": _dtype_name(value.dtype), "device": device}
    capture.add(f"{path}/{key}", value, lazy=True, fixed=True)
    distributed = {"distributed": True} if isinstance(value, DTensor) and value.shape != parameter.shape else {}
    return {"tensor": f"{path}/{key}", "device": device, **distributed}


def add_targets(
    name: str,
    optimizer: torch.optim.Optimizer,
    known: Mapping[int, str],
    document: Mapping[str, Any],
    entries: Mapping[str, Entry],
    targets: Targets,
    *,
    partial: bool = False,
) -> None:
    """Say where a checkpoint's elements belong in ``optimizer``; what it has no room for yet is allocated.

    With ``partial``, the document may describe parameters of other ranks besides.
    """
    named = _names_in_groups(name, optimizer, known)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if partial:
        document = restricted(document, [path for path, _ in named], sizes)
    _check_parameters(name, [path for path, _ in named], document["parameters"])
    if document.get("sizes", sizes) != sizes:
        raise StateMismatch(f"{name} has groups of {sizes} parameters here, of {document['sizes']} in the checkpoint")
    packs: dict[str, _Pack] = {}
    for path, parameter in named:
        described = document["state"].get(path, {})
        state = optimizer.state[parameter] if described or parameter in optimizer.state else {}
        for key in [key for key in state if key not in described]:
            del state[key]
        for key, item in described.items():
            place = f"{name}/{path}/{key}"
            if "value" in item:
                value = built(item["value"], place, entries, targets)
                targets.after.append(functools.partial(state.__setitem__, key, value))
            elif "packed" in item:
                dtype = dtype_named(item["dtype"])
                pack_name = _pack_name(name, key, dtype, _text(item["pack"]))
                if pack_name not in packs:
                    packs[pack_name] = _Pack(pack_name, dtype, entries[pack_name], targets)
                scalar = _existing(state.get(key), (), dtype)
                if scalar is None:
                    where = parameter.device if item["device"] == "parameter" else device_named(item["device"])
                    scalar = state[key] = torch.empty((), dtype=dtype, device=where)
                packs[pack_name].take(item["packed"], scalar)
            elif item["tensor"] == place:
                targets.add(place, _state_tensor(state, key, parameter, item, entries[place]))
            else:
                raise FormatError(f"{place} is said to be the tensor {item['tensor']!r:.200}")
    for pack in packs.values():
        pack.close(partial)
    for index, (group, encoded) in enumerate(zip(optimizer.param_groups, document["groups"], strict=True)):
        options = built(encoded, f"{name}/group{index}", entries, targets)
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options) or "params" in options:
            raise FormatError(f"{name}/group{index} has no options")
        targets.after.append(functools.partial(group.update, options))


class _Pack:
    """One-element tensors of a checkpoint that are filled from one entry, in the order in which they were packed."""

    def __init__(self, name: str, dtype: torch.dtype, entry: Entry, targets: Targets) -> None:
        self._name = name
        self._whole = torch.empty(real_shape(entry), dtype=dtype)
        self._scalars: dict[int, torch.Tensor] = {}
        targets.add(name, self._whole)
        targets.after.append(self._fill)

    def take(self, index: Any, scalar: torch.Tensor) -> None:
        """Element number ``index`` belongs to ``scalar``."""
        if self._whole.dim() != 1 or type(index) is not int or not 0 <= index < len(self._whole):
            raise FormatError(f"{self._name} of the shape {list(self._whole.shape)} has no element {index!r:.50}")
        if index in self._scalars:
            raise FormatError(f"{self._name}: element {index} is named twice")
        self._scalars[index] = scalar

    def close(self, partial: bool) -> None:
        """There are no further ones; unless it is ``partial``, all have been named."""
        if not partial and len(self._scalars) != len(self._whole):
            raise FormatError(f"{self._name} has the shape {list(self._whole.shape)} for {len(self._scalars)} elements")

    def _fill(self) -> None:
        for index, scalar in self._scalars.items():
            scalar.copy_(self._whole[index])


def _state_tensor(
    state: dict[str, Any], key: str, parameter: torch.Tensor, item: Mapping[str, Any], entry: Entry
) -> torch.Tensor:
    dtype, shape = real_dtype(entry), real_shape(entry)
    tensor = _existing(state.get(key), shape, dtype)
    if tensor is None:
        distributed = item.get("distributed") is True
        tensor = like_parameter(parameter, shape, dtype, item["device"], distributed=distributed)
        state[key] = tensor
    return tensor


def _existing(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """``value`` if it can be written into as it is."""
    if isinstance(value, torch.Tensor) and tuple(value.shape) == shape and value.dtype == dtype:
        return value
    return None


def _check_parameters(name: str, here: list[str], there: list[str]) -> None:
    if here == there:
        return
    missing = [path for path in here if path not in set(there)]
    extra = [path for path in there if path not in set(here)]
    if not missing and not extra:
        raise StateMismatch(f"{name} has the same parameters as the checkpoint in another order of groups")
    said = [f"{path}: not in the checkpoint" for path in missing] + [f"{path}: only there" for path in extra]
    raise StateMismatch(f"{name} optimises other parameters than the checkpoint:\n  " + "\n  ".join(said[:20]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{value!r:.50} is no name")
    return value
