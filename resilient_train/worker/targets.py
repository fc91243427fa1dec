"""Where the elements of a checkpoint belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resilient_train.spec.shard import Entry
from resilient_train.worker.tensors import real_dtype


@dataclass(kw_only=True)
class Targets:
    """Where a checkpoint's elements belong."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Entry name to the tensor (plain or DTensor) that receives it."""
    after: list[Callable[[], None]] = field(default_factory=list)
    """To be called once all tensors are filled."""


def put_tensors(tree: Any, entries: Mapping[str, Entry], targets: Targets) -> Callable[[], Any]:
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
