"""Where the elements of a checkpoint belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resilient_train.errors import FormatError, StateMismatch
from resilient_train.spec import jsontree
from resilient_train.spec.shard import Entry
from resilient_train.worker.tensors import device_named, real_dtype, real_shape


@dataclass(kw_only=True)
class Targets:
    """Where a checkpoint's elements belong."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Entry name to the tensor (plain or DTensor) that receives it."""
    after: list[Callable[[], None]] = field(default_factory=list)
    """To be called once all tensors are filled."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Say that ``tensor`` receives the elements of ``name``.

        Raises:
            FormatError: if another receives them already, which would be left as it is.
        """
        if name in self.tensors:
            raise FormatError(f"{name} is named twice by the document")
        self.tensors[name] = tensor

    def load(self, name: str, load: Callable[[Any], Any], value: Any) -> None:
        """Have ``load(value)`` called at the end, whose code is the user's."""

        def action() -> None:
            try:
                load(value)
            except Exception as error:  # Whatever it raises, it has been given another state than it expects.
                raise StateMismatch(
                    f"{name} does not take the checkpoint's state: {type(error).__name__}: {error}"
                ) from error

        self.after.append(action)


def built(encoded: Any, path: str, entries: Mapping[str, Entry], targets: Targets) -> Any:
    """The inverse of `Capture.encode`; its tensors are complete once the targets are filled.

    Raises:
        FormatError: if ``encoded`` is malformed, or names a tensor that does not stand where `Capture.encode` put it.
    """

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, jsontree.TensorAt):
            if node.name != path or path not in entries:
                raise FormatError(f"{path} is said to be the tensor {node.name!r:.200}")
            entry = entries[path]
            tensor = torch.empty(real_shape(entry), dtype=real_dtype(entry), device=device_named(node.get("device")))
            targets.add(path, tensor)
            return tensor
        if isinstance(node, dict):
            found = {key: visit(value, f"{path}/{key}") for key, value in node.items()}
            return found if type(node) is dict else type(node)(found)
        if isinstance(node, (list, tuple)):
            return type(node)(visit(value, f"{path}/{index}") for index, value in enumerate(node))
        return node

    return visit(jsontree.decode(encoded), path)
