"""The document of an image that holds a DCP state dict: what `rt.State` writes for the same modules and optimizers.

Two things a state dict does not tell are said to be unknown: the class of an optimizer, and the random generators.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from resilient_train.interop.dcp_names import EXTRA, Leaf, Part, Path, entry_name, joined, nested, split
from resilient_train.spec import jsontree

EMPTY = json.dumps({"rng": None}).encode()
"""The document of an image that leaves the description to another image of the same checkpoint."""


def document_of(parts: Sequence[Part], values: Mapping[str, Any]) -> bytes:
    """The document.

    Args:
        parts: of the state.
        values: DCP's name of every leaf that is no tensor to the leaf.

    Raises:
        UnsupportedState: naming a leaf that JSON cannot hold.
    """
    document: dict[str, Any] = {}
    for part in parts:
        described = _optimizer(part, values) if part.kind == "optimizer" else None
        if described is None:
            described = _module(part, values) if part.kind == "module" else _stateful(part, values)
        document[part.name] = described
        if part.prefix != (part.name,):
            document[part.name]["prefix"] = list(part.prefix)
    document["rng"] = None
    return json.dumps(document, separators=(",", ":")).encode()


def _module(part: Part, values: Mapping[str, Any]) -> dict[str, Any]:
    extra: dict[str, list[tuple[Path, Any]]] = {}
    for leaf in part.leaves:
        if not leaf.tensor:
            where = str(leaf.path[0]).removesuffix(EXTRA)
            extra.setdefault(where, []).append((leaf.path[1:], values[leaf.fqn]))
    states = {where: jsontree.encode(nested(found), f"{part.name}.{where}{EXTRA}") for where, found in extra.items()}
    return {"kind": "module", "aliases": {}, "extra": states}


def _stateful(part: Part, values: Mapping[str, Any]) -> dict[str, Any]:
    tree = nested((leaf.path, _value(part, leaf, values)) for leaf in part.leaves)
    return {"kind": "stateful", "value": jsontree.encode(tree, part.name)}


def _value(part: Part, leaf: Leaf, values: Mapping[str, Any]) -> Any:
    if leaf.tensor:
        return jsontree.TensorAt(entry_name(part, leaf), {"device": "cpu"})
    return values[leaf.fqn]


def _optimizer(part: Part, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """None if the values are not those of an optimizer whose parameters are the module's."""
    groups = _joined_groups(part, values) if joined(part.leaves[0]) else _nested_groups(part, values)
    if groups is None:
        return None
    options = {name: group for names, group in groups for name in names}
    state: dict[str, dict[str, list[tuple[Path, Leaf]]]] = {}
    for leaf in part.leaves:
        found = split(leaf, part.parameters)
        if found is not None and found[0] == "state":
            _, name, (key, *rest) = found
            if name not in options:
                return None
            state.setdefault(f"{part.owner}.{name}", {}).setdefault(str(key), []).append((tuple(rest), leaf))
    return {
        "kind": "optimizer",
        "class": None,
        "parameters": [f"{part.owner}.{name}" for name in options],
        "sizes": [len(names) for names, _ in groups],
        "state": {
            name: {
                key: _item(part, key, leaves, values, options[name.removeprefix(f"{part.owner}.")])
                for key, leaves in keys.items()
            }
            for name, keys in state.items()
        },
        "groups": [jsontree.encode(group, f"{part.name}.param_groups[{i}]") for i, (_, group) in enumerate(groups)],
    }


def _item(
    part: Part, key: str, leaves: Sequence[tuple[Path, Leaf]], values: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What an optimizer holds for a parameter under one key."""
    path, leaf = leaves[0]
    if leaf.tensor and not path:
        # As torch has it when it loads a state dict.
        beside = key != "step" or bool(options.get("fused")) or bool(options.get("capturable"))
        return {"tensor": entry_name(part, leaf), "device": "parameter" if beside else "cpu"}
    tree = nested((path, _value(part, leaf, values)) for path, leaf in leaves)
    return {"value": jsontree.encode(tree, leaf.fqn)}


Groups = list[tuple[list[str], dict[str, Any]]]
"""For each group the names of its parameters, and its options."""


def _nested_groups(part: Part, values: Mapping[str, Any]) -> Groups | None:
    leaves = [leaf for leaf in part.leaves if leaf.path[0] == "param_groups"]
    tree = nested((leaf.path[1:], _value(part, leaf, values)) for leaf in leaves)
    groups = [(group.pop("params", None), group) for group in tree if isinstance(group, dict)]
    seen: list[str] = []
    for names, _ in groups:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None
        seen += names
    return groups if len(groups) == len(tree) and len(set(seen)) == len(seen) and part.parameters >= set(seen) else None


def _joined_groups(part: Part, values: Mapping[str, Any]) -> Groups | None:
    """The joined form repeats the options for every parameter: neighbours with the same ones are a group."""
    options: dict[str, dict[str, Any]] = {}
    for leaf in part.leaves:
        found = split(leaf, part.parameters)
        if found is not None and found[0] == "param_groups":
            _, name, (key,) = found
            options.setdefault(name, {})[str(key)] = values[leaf.fqn]
    groups: Groups = []
    for name, mine in options.items():
        if groups and groups[-1][1] == mine:
            groups[-1][0].append(name)
        else:
            groups.append(([name], mine))
    return groups or None
