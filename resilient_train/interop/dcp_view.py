"""A checkpoint of ours as the state dict that a DCP user has of the same modules and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resilient_train.errors import FormatError
from resilient_train.interop.dcp_names import EXTRA
from resilient_train.spec import jsontree
from resilient_train.spec.shard import Entry
from resilient_train.worker.tensors import real_dtype, real_shape


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's elements stand: an entry, or one element of it."""

    name: str
    """The entry's name."""
    index: int | None = None
    """Which element, of an entry that packs scalars."""


@dataclass(kw_only=True)
class View:
    """A state dict whose tensors are placeholders."""

    nested: dict[str, Any] = field(default_factory=dict)
    """The state dict."""
    places: dict[int, tuple[torch.Tensor, Place]] = field(default_factory=dict)
    """id of a placeholder to the placeholder and what it stands for."""
    repeated: dict[str, Any] = field(default_factory=dict)
    """Flattened names under which options of parameter groups stand too, for `flatten_optimizer_state_dict`."""


def view_of(document: Mapping[str, Any], entries: Mapping[str, Entry]) -> View:
    """The state dict that a checkpoint holds.

    Args:
        document: the checkpoint's.
        entries: one entry of every tensor, for shapes and dtypes.

    Raises:
        FormatError: if the document is malformed.
    """
    builder = _Builder(entries)
    parts = {name: part for name, part in document.items() if name != "rng"}
    modules = [name for name, part in parts.items() if part["kind"] == "module"]
    kinds: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
        "module": builder.module,
        "optimizer": lambda name, part: builder.optimizer(name, part, modules),
        "stateful": lambda _, part: builder.tree(jsontree.decode(part["value"])),
    }
    for name, part in parts.items():
        content = kinds[part["kind"]](name, part)
        top = top_of(name, part)
        builder.view.nested.update(content if top is None else {top: content})
    return builder.view


def top_of(name: str, part: Mapping[str, Any]) -> str | None:
    """The key under which a part stands in the state dict; None if its content stands there itself."""
    prefix = part.get("prefix", [name])
    return str(prefix[0]) if prefix else None


class _Builder:
    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self.view = View()

    def tensor(self, name: Any, index: int | None = None) -> torch.Tensor:
        """A placeholder."""
        entry = self._entries.get(name)
        if entry is None:
            raise FormatError(f"the document names the tensor {name!r:.200}, which is not there")
        shape = real_shape(entry)
        if index is not None and not (type(index) is int and len(shape) == 1 and 0 <= index < shape[0]):
            raise FormatError(f"the document names element {index!r:.50} of {name}")
        made = torch.empty(shape if index is None else (), dtype=real_dtype(entry), device="meta")
        self.view.places[id(made)] = made, Place(name, index)
        return made

    def tree(self, node: Any) -> Any:
        """A decoded tree with placeholders for its tensors."""
        if isinstance(node, jsontree.TensorAt):
            return self.tensor(node.name)
        if isinstance(node, dict):
            found = {key: self.tree(value) for key, value in node.items()}
            return found if type(node) is dict else type(node)(found)
        if isinstance(node, (list, tuple)):
            return type(node)(self.tree(value) for value in node)
        return node

    def module(self, name: str, part: Mapping[str, Any]) -> dict[str, Any]:
        """``module.state_dict()``."""
        start = f"{name}/"
        state = {entry.removeprefix(start): self.tensor(entry) for entry in self._entries if entry.startswith(start)}
        for alias, first in part["aliases"].items():
            state.setdefault(alias, self.tensor(start + first))
        for where, value in part["extra"].items():
            state[f"{where}{EXTRA}"] = jsontree.decode(value)
        return state

    def optimizer(self, name: str, part: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
        """``get_optimizer_state_dict(module, optimizer)``."""
        named = part["parameters"]
        # DCP names parameters within the one module that it is asked for.
        owner = next((f"{m}." for m in modules if all(path.startswith(f"{m}.") for path in named)), "")
        state = {
            path.removeprefix(owner): {key: self._item(name, key, item) for key, item in described.items()}
            for path, described in part["state"].items()
        }
        groups = [self.tree(jsontree.decode(group)) for group in part["groups"]]
        sizes = part.get("sizes", [len(named)] if len(groups) == 1 else [])
        at = 0
        for group, size in zip(groups, sizes, strict=False):
            parameters = [path.removeprefix(owner) for path in named[at : at + size]]
            at += size
            for parameter in parameters:
                for key, value in group.items():
                    self.view.repeated[f"{top_of(name, part)}.param_groups.{parameter}.{key}"] = value
            group["params"] = parameters
        return {"state": state, "param_groups": groups}

    def _item(self, name: str, key: str, item: Mapping[str, Any]) -> Any:
        if "value" in item:
            return self.tree(jsontree.decode(item["value"]))
        if "packed" in item:
            return self.tensor(f"{name}/packed/{key}.{item['dtype']}.{item['pack']}", item["packed"])
        return self.tensor(item["tensor"])
