"""Modules as state: parameters and buffers under canonical names, extra states in the document."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from resilient_train.errors import StateMismatch
from resilient_train.spec import jsontree
from resilient_train.spec.shard import Entry
from resilient_train.worker import names
from resilient_train.worker.capture import Capture
from resilient_train.worker.targets import Targets
from resilient_train.worker.tensors import as_bytes, local_part


def walk(name: str, module: torch.nn.Module, capture: Capture) -> dict[str, Any]:
    """Add parameters and buffers to ``capture``; the document of what stays the same."""
    for part in names.modules(module):
        if isinstance(part, FSDPModule):
            # A forward without a backward (an evaluation) leaves whole parameters in the places of the sharded ones.
            part.reshard()
            capture.before.append(part.reshard)
    for path, parameter in names.parameters(module).items():
        capture.add(f"{name}/{path}", parameter, lazy=True, fixed=True)
    buffers = names.buffers(module)
    for path, buffer in buffers.items():
        # BatchNorm and its like change theirs in every forward.
        capture.add(f"{name}/{path}", buffer, fixed=True)
    for part in names.modules(module):
        capture.contents += [part._parameters.values, part._buffers.values, part._modules.values]
    return {"kind": "module", "aliases": names.aliases(module), "buffers": list(buffers)}


def fresh(module: torch.nn.Module) -> dict[str, Any]:
    """The document of what any step may change."""
    extra = {path: jsontree.encode(m.get_extra_state(), path) for path, m in names.extra_states(module).items()}
    return {"extra": extra}


def check(name: str, module: torch.nn.Module, document: Mapping[str, Any], partial: bool = False) -> None:
    """Raises:
    StateMismatch: if a checkpoint's document is of a module with other extra states; if ``partial``, more may be there.
    """
    here, there = set(names.extra_states(module)), set(document["extra"])
    if here != there and not (partial and here < there):
        raise StateMismatch(f"{name}: extra state differs in {', '.join(sorted(here ^ there))}")


def add_targets(
    name: str, module: torch.nn.Module, document: Mapping[str, Any], entries: Mapping[str, Entry], targets: Targets
) -> None:
    """Say where a checkpoint's elements belong in ``module``."""
    tensors = {**names.parameters(module), **names.buffers(module)}
    for path, tensor in tensors.items():
        targets.add(f"{name}/{path}", tensor)
    for alias, path in names.aliases(module).items():
        if f"{name}/{alias}" in entries and path in tensors:
            # Other libraries store tied tensors under each of their names.
            again = torch.empty_like(tensors[path], requires_grad=False)
            targets.add(f"{name}/{alias}", again)
            targets.after.append(functools.partial(_check_tied, f"{name}/{alias}", again, tensors[path]))
    for path, part in names.extra_states(module).items():
        value = jsontree.decode(document["extra"][path])
        targets.load(f"{name}.{path}", part.set_extra_state, value)


def _check_tied(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
    """What is one tensor here must have the same elements in the checkpoint."""
    (mine, _, _), (theirs, _, _) = local_part(name, one), local_part(name, other)
    if not torch.equal(as_bytes(mine), as_bytes(theirs)):
        raise StateMismatch(f"{name} is tied to another tensor here, and differs from it in the checkpoint")
