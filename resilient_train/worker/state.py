"""``State``: the named things that make up a training's state, as tensors with boxes and a JSON document, and back.

Reading and writing are symmetric: `capture` walks the things and yields entries; `targets` walks them again, led by the
checkpoint's document, and yields where each tensor's elements belong.  Elements are written into parameters and
optimizer state directly.  What is missing is allocated in the recorded dtype, never made by stepping an optimizer.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from resilient_train.errors import FormatError, StateMismatch, UnsupportedState
from resilient_train.plan.partition import PRIVATE
from resilient_train.spec import jsontree
from resilient_train.spec.shard import Entry
from resilient_train.worker import names
from resilient_train.worker.tensors import like_parameter, local_part, real_dtype, stored


@runtime_checkable
class Stateful(Protocol):
    """Anything that can say and take back its state, made of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""
        ...


@dataclass(kw_only=True)
class Capture:
    """The state at one instant; the tensors are the live ones where nothing had to be packed."""

    entries: list[Entry] = field(default_factory=list)
    """What there is."""
    tensors: list[torch.Tensor] = field(default_factory=list)
    """The bytes to store for each entry."""
    document: dict[str, Any] = field(default_factory=dict)
    """Everything that is not a tensor."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor."""
        entry, data = stored(name, tensor)
        self.entries.append(entry)
        self.tensors.append(data)

    def document_bytes(self) -> bytes:
        """The document as JSON."""
        return json.dumps(self.document, separators=(",", ":")).encode()


@dataclass(kw_only=True)
class Targets:
    """Where a checkpoint's elements belong."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Entry name to the tensor (plain or DTensor) that receives it."""
    after: list[Callable[[], None]] = field(default_factory=list)
    """To be called once all tensors are filled."""


class State:
    """The things to save, by name.

    Args:
        stateful: modules, optimizers, learning rate schedulers, anything with ``state_dict`` and ``load_state_dict``
            of tensors and JSON values.  RNG states come along by themselves.

    Raises:
        UnsupportedState: if one has neither.

    Example::

        state = rt.State(model=model, optim=optim, schedule=schedule)
    """

    def __init__(self, **stateful: Any) -> None:
        for name, thing in stateful.items():
            if not isinstance(thing, Stateful):
                raise UnsupportedState(f"{name} is a {type(thing).__name__}, without state_dict and load_state_dict")
            if "/" in name or name == "rng":
                raise UnsupportedState(f"a part of the state cannot be called {name!r}")
        self._things: dict[str, Stateful] = dict(stateful)

    def capture(self, rank: int) -> Capture:
        """This rank's part of the state as it is now.

        Raises:
            UnsupportedState: naming what cannot be saved.
        """
        capture = Capture()
        known = self._parameter_names()
        for name, thing in self._things.items():
            if isinstance(thing, torch.nn.Module):
                capture.document[name] = _capture_module(name, thing, capture)
            elif isinstance(thing, torch.optim.Optimizer):
                capture.document[name] = _capture_optimizer(name, thing, known, capture)
            else:
                tree = _take_tensors(thing.state_dict(), name, capture)
                capture.document[name] = {"kind": "stateful", "value": jsontree.encode(tree, name)}
        capture.document["rng"] = _capture_rng(rank, capture)
        return capture

    def targets(self, document: Mapping[str, Any], entries: Mapping[str, Entry]) -> Targets:
        """Where the elements of a checkpoint go, and what else to set.

        Args:
            document: the checkpoint's.
            entries: one entry of every tensor in the checkpoint, for shapes and dtypes.

        Raises:
            StateMismatch: if the document describes other things than this state.
            FormatError: if it is malformed.
        """
        here, there = set(self._things), set(document) - {"rng"}
        if here != there:
            raise StateMismatch(
                f"the checkpoint holds {', '.join(sorted(there))}; this state has {', '.join(sorted(here))}"
            )
        targets = Targets()
        known = self._parameter_names()
        try:
            for name, thing in self._things.items():
                _check_kind(name, thing, document[name])
            for name, thing in self._things.items():
                if isinstance(thing, torch.nn.Module):
                    _module_targets(name, thing, document[name], targets)
                elif isinstance(thing, torch.optim.Optimizer):
                    _optimizer_targets(name, thing, known, document[name], entries, targets)
                else:
                    _stateful_targets(name, thing, document[name], entries, targets)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise FormatError(f"malformed document in the checkpoint: {error!r}") from error
        return targets

    def _parameter_names(self) -> dict[int, str]:
        known: dict[int, str] = {}
        for thing in self._things.values():
            if isinstance(thing, torch.nn.Module):
                for name, parameter in names.parameters(thing).items():
                    known.setdefault(id(parameter), name)
        return known


def _check_kind(name: str, thing: Stateful, document: Mapping[str, Any]) -> None:
    """The checkpoint's part of this name is of the same kind and shape as ours."""
    kind = _kind(thing)
    if document["kind"] != kind:
        raise StateMismatch(f"{name} is a {kind} here, a {document['kind']} in the checkpoint")
    if isinstance(thing, torch.nn.Module):
        here, there = set(names.extra_states(thing)), set(document["extra"])
        if here != there:
            raise StateMismatch(f"{name}: extra state differs in {', '.join(sorted(here ^ there))}")
    if isinstance(thing, torch.optim.Optimizer) and len(thing.param_groups) != len(document["groups"]):
        raise StateMismatch(
            f"{name} has {len(thing.param_groups)} parameter groups here, {len(document['groups'])} in the checkpoint"
        )


def _kind(thing: Stateful) -> str:
    if isinstance(thing, torch.nn.Module):
        return "module"
    return "optimizer" if isinstance(thing, torch.optim.Optimizer) else "stateful"


# ---- modules --------------------------------------------------------------------------------------------------------


def _capture_module(name: str, module: torch.nn.Module, capture: Capture) -> dict[str, Any]:
    for path, tensor in {**names.parameters(module), **names.buffers(module)}.items():
        capture.add(f"{name}/{path}", tensor)
    extra = {path: jsontree.encode(m.get_extra_state(), path) for path, m in names.extra_states(module).items()}
    return {"kind": "module", "aliases": names.aliases(module), "extra": extra}


def _module_targets(name: str, module: torch.nn.Module, document: Mapping[str, Any], targets: Targets) -> None:
    for path, tensor in {**names.parameters(module), **names.buffers(module)}.items():
        targets.tensors[f"{name}/{path}"] = tensor
    for path, part in names.extra_states(module).items():
        value = jsontree.decode(document["extra"][path])
        targets.after.append(functools.partial(part.set_extra_state, value))


# ---- optimizers -----------------------------------------------------------------------------------------------------


def _names_in_groups(
    name: str, optimizer: torch.optim.Optimizer, known: Mapping[int, str]
) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) of everything the optimizer optimises, in the order of its groups."""
    named = []
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            named.append((known.get(id(parameter), f"{name}-group{index}-{place}"), parameter))
    return named


def _capture_optimizer(
    name: str, optimizer: torch.optim.Optimizer, known: Mapping[int, str], capture: Capture
) -> dict[str, Any]:
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
        capture.add(_pack_name(name, key, dtype), torch.stack([scalar.reshape(()) for scalar in scalars]))
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        tree = _take_tensors(options, f"{name}/group{index}", capture)
        groups.append(jsontree.encode(tree, f"{name}.param_groups[{index}]"))
    return {"kind": "optimizer", "parameters": [path for path, _ in named], "state": state, "groups": groups}


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
        return {"value": jsontree.encode(value, f"{path}.{key}")}
    device = "parameter" if value.device.type == parameter.device.type else value.device.type
    if value.dim() == 0 and type(value) is torch.Tensor and parameter.dim() > 0:
        pack = packs.setdefault((key, value.dtype, value.device.type), [])
        pack.append(value.detach())
        return {"packed": len(pack) - 1, "dtype": str(value.dtype).removeprefix("torch."), "device": device}
    capture.add(f"{path}/{key}", value)
    return {"tensor": f"{path}/{key}", "device": device}


def _optimizer_targets(
    name: str,
    optimizer: torch.optim.Optimizer,
    known: Mapping[int, str],
    document: Mapping[str, Any],
    entries: Mapping[str, Entry],
    targets: Targets,
) -> None:
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
                state[key] = jsontree.decode(item["value"])
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
        restored = _put_tensors(jsontree.decode(options), entries, targets)
        targets.after.append(functools.partial(_update, group, restored))


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


# ---- everything else ------------------------------------------------------------------------------------------------


def _take_tensors(tree: Any, path: str, capture: Capture) -> Any:
    """``tree`` with its tensors moved into ``capture`` and their names in their places."""
    if isinstance(tree, torch.Tensor):
        capture.add(path, tree)
        return {"$tensor": path, "device": tree.device.type}
    if isinstance(tree, Mapping):
        return {key: _take_tensors(value, f"{path}/{key}", capture) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_take_tensors(value, f"{path}/{index}", capture) for index, value in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def _put_tensors(tree: Any, entries: Mapping[str, Entry], targets: Targets) -> Callable[[], Any]:
    """The inverse; the result is complete once the targets are filled."""
    fresh: dict[str, torch.Tensor] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, dict) and "$tensor" in node:
            name = str(node["$tensor"])
            entry = entries[name]
            dtype = real_dtype(entry)
            shape = entry.global_shape[:-1] if entry.real_dtype else entry.global_shape
            fresh[name] = targets.tensors[name] = torch.empty(shape, dtype=dtype, device=str(node["device"]))
            return fresh[name]
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(visit(value) for value in node)
        return node

    built = visit(tree)
    return lambda: built


def _stateful_targets(
    name: str, thing: Stateful, document: Mapping[str, Any], entries: Mapping[str, Entry], targets: Targets
) -> None:
    value = _put_tensors(jsontree.decode(document["value"]), entries, targets)
    targets.after.append(lambda: _load(name, thing, value()))


def _load(name: str, thing: Stateful, value: dict[str, Any]) -> None:
    try:
        thing.load_state_dict(value)
    except (KeyError, ValueError, RuntimeError) as error:
        raise StateMismatch(f"{name} does not take the checkpoint's state: {error}") from error


# ---- random number generators ---------------------------------------------------------------------------------------


def rng_name(rank: int, which: str) -> str:
    """Entry name of a rank's own generator state."""
    return f"{PRIVATE}{rank}/{which}"


def _capture_rng(rank: int, capture: Capture) -> dict[str, Any]:
    capture.add(rng_name(rank, "torch"), torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        capture.add(rng_name(rank, "cuda"), torch.cuda.get_rng_state())
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, np.array(words, dtype=np.uint32).tobytes().hex(), gauss],
        "numpy": [np.asarray(keys, dtype=np.uint32).tobytes().hex(), int(position), int(has_gauss), float(cached)],
    }


def restore_rng(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the generators of this process back.

    Args:
        document: the ``rng`` part of this rank's own image.
        tensors: ``torch`` and, if there was one, ``cuda`` generator states.
    """
    torch.set_rng_state(tensors["torch"].clone())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].clone())
    version, words, gauss = document["python"]
    random.setstate((version, tuple(np.frombuffer(bytes.fromhex(words), dtype=np.uint32).tolist()), gauss))
    keys, position, has_gauss, cached = document["numpy"]
    state = np.frombuffer(bytes.fromhex(keys), dtype=np.uint32)
    np.random.set_state(("MT19937", state, position, has_gauss, cached))


__all__ = ["Capture", "State", "Stateful", "Targets", "local_part", "restore_rng", "rng_name"]
