"""Optimizers as state: what they hold for each parameter, by the parameters' names, and the options of their groups.

Missing state is allocated in the recorded dtype, never made by stepping the optimizer or by ``load_state_dict``, which
casts and aliases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from resilient_train.errors import StateMismatch
from resilient_train.spec import jsontree
from resilient_train.spec.shard import Entry
from resilient_train.worker.capture import Capture
from resilient_train.worker.targets import Targets, put_tensors
from resilient_train.worker.tensors import like_parameter, real_dtype


def _names_in_groups(
    name: str, optimizer: torch.optim.Optimizer, known: Mapping[int, str]
) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) of everything the optimizer optimises, in the order of its groups."""
    named = []
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            named.append((known.get(id(parameter), f"{name}-group{index}-{place}"), parameter))
    return named


def walk(name: str, optimizer: torch.optim.Optimizer, known: Mapping[int, str], capture: Capture) -> dict[str, Any]:
    """Add the state of every parameter to ``capture``; the document of what stays the same.

    Args:
        name: the optimizer's, in the state.
        optimizer: any.
        known: id of a parameter to its canonical name.
        capture: receives the tensors.
    """
    named = _names_in_groups(name, optimizer, known)
    packs: dict[tuple[str, torch.dtype, str], list[torch.Tensor]] = {}
    state: dict[str, dict[str, Any]] = {}
    for path, parameter in named:
        described = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            described[key] = _describe(f"{name}/{path}", key, value, parameter, packs, capture)
        if described:
            state[path] = described
    # Thousands of one-element tensors (AdamW's step) travel as one.
    for (key, dtype, _), scalars in packs.items():
        capture.add_pack(_pack_name(name, key, dtype), scalars)
    capture.contents.append(lambda: (value for held in optimizer.state.values() for value in held.values()))
    capture.contents.append(lambda: (parameter for group in optimizer.param_groups for parameter in group["params"]))
    kind = type(optimizer).__name__
    return {"kind": "optimizer", "class": kind, "parameters": [path for path, _ in named], "state": state}


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
    if document["class"] != kind:
        raise StateMismatch(f"{name} is an optimizer {kind} here, {document['class']} in the checkpoint")
    here, there = len(optimizer.param_groups), len(document["groups"])
    if here != there:
        raise StateMismatch(f"{name} has {here} parameter groups here, {there} in the checkpoint")


def _pack_name(name: str, key: str, dtype: torch.dtype) -> str:
    return f"{name}/packed/{key}.{str(dtype).removeprefix('torch.')}"


def _describe(
    path: str,
    key: str,
    value: Any,
    parameter: torch.Tensor,
    packs: dict[tuple[str, torch.dtype, str], list[torch.Tensor]],
    capture: Capture,
) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        # Numbers and lists (LBFGS) change from step to step, and so does what they hold.
        capture.fixed = False
        return {"value": capture.encode(value, f"{path}/{key}")}
    device = "parameter" if value.device.type == parameter.device.type else value.device.type
    if value.dim() == 0 and type(value) is torch.Tensor and parameter.dim() > 0:
        pack = packs.setdefault((key, value.dtype, value.device.type), [])
        pack.append(value)
        return {"packed": len(pack) - 1, "dtype": str(value.dtype).removeprefix("torch."), "device": device}
    capture.add(f"{path}/{key}", value, lazy=True, fixed=True)
    return {"tensor": f"{path}/{key}", "device": device}


def add_targets(
    name: str,
    optimizer: torch.optim.Optimizer,
    known: Mapping[int, str],
    document: Mapping[str, Any],
    entries: Mapping[str, Entry],
    targets: Targets,
) -> None:
    """Say where a checkpoint's elements belong in ``optimizer``; what it has no room for yet is allocated."""
    named = _names_in_groups(name, optimizer, known)
    _check_parameters(name, [path for path, _ in named], document["parameters"])
    packs: dict[str, torch.Tensor] = {}
    for path, parameter in named:
        described = document["state"].get(path, {})
        state = optimizer.state[parameter] if described or parameter in optimizer.state else {}
        for key in [key for key in state if key not in described]:
            del state[key]
        for key, item in described.items():
            if "value" in item:
                value = put_tensors(jsontree.decode(item["value"]), entries, targets)
                targets.after.append(_setter(state, key, value))
            elif "packed" in item:
                dtype = getattr(torch, item["dtype"])
                pack = _pack(_pack_name(name, key, dtype), dtype, entries, packs, targets)
                scalar = _existing(state.get(key), (), dtype)
                if scalar is None:
                    where = parameter.device if item["device"] == "parameter" else torch.device(item["device"])
                    scalar = state[key] = torch.empty((), dtype=dtype, device=where)
                targets.after.append(_copy_scalar(scalar, pack, int(item["packed"])))
            else:
                targets.tensors[item["tensor"]] = _state_tensor(state, key, parameter, item, entries)
    for group, options in zip(optimizer.param_groups, document["groups"], strict=True):
        restored = put_tensors(jsontree.decode(options), entries, targets)
        targets.after.append(functools.partial(_update, group, restored))


def _setter(state: dict[str, Any], key: str, value: Callable[[], Any]) -> Callable[[], None]:
    def put() -> None:
        state[key] = value()

    return put


def _update(group: dict[str, Any], options: Callable[[], Any]) -> None:
    group.update(options())


def _pack(
    name: str, dtype: torch.dtype, entries: Mapping[str, Entry], packs: dict[str, torch.Tensor], targets: Targets
) -> torch.Tensor:
    if name not in packs:
        packs[name] = targets.tensors[name] = torch.empty(entries[name].global_shape, dtype=dtype)
    return packs[name]


def _copy_scalar(scalar: torch.Tensor, pack: torch.Tensor, index: int) -> Callable[[], None]:
    def copy() -> None:
        scalar.copy_(pack[index])

    return copy


def _state_tensor(
    state: dict[str, Any], key: str, parameter: torch.Tensor, item: Mapping[str, Any], entries: Mapping[str, Entry]
) -> torch.Tensor:
    entry = entries[item["tensor"]]
    dtype = real_dtype(entry)
    shape = entry.global_shape[:-1] if entry.real_dtype else entry.global_shape
    tensor = _existing(state.get(key), shape, dtype)
    if tensor is None:
        tensor = state[key] = like_parameter(parameter, shape, dtype, item["device"])
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
