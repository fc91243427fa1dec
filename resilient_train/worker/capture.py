"""What a snapshot consists of at one instant, and how most of it is found again without looking at every tensor.

Walking thousands of parameters and optimizer states at every step costs more than copying them.  So what modules and
optimizers contribute is walked once and kept with the identity of everything that was seen; as long as the same objects
stand in the same places, at the same addresses, the walk would find the same.
"""

from __future__ import annotations

import json
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from resilient_train.image.snapshot import Part
from resilient_train.spec import jsontree
from resilient_train.spec.shard import Entry
from resilient_train.worker.tensors import stored

SMALL = 4096
"""Bytes up to which a tensor is copied at once, because starting to copy it later costs as much."""

_address = torch.Tensor.data_ptr
_dtype = operator.attrgetter("dtype")
_same_strides = torch.Tensor.is_set_to
"""Whether two tensors have the same storage, offset, shape and strides."""
Contents = Callable[[], Iterable[Any]]
"""The objects that stand in one place: a module's parameters, an optimizer's state."""


@dataclass(kw_only=True)
class Capture:
    """A part of the state: tensors, and the JSON document of everything else."""

    parts: list[Part] = field(default_factory=list)
    """The tensors."""
    document: dict[str, Any] = field(default_factory=dict)
    """What is not a tensor."""
    contents: list[Contents] = field(default_factory=list)
    """Where to look for objects that came, went or were replaced."""
    origins: list[torch.Tensor] = field(default_factory=list)
    """The tensors, as they stand there, whose memory or shape may be exchanged (``parameter.data = other``)."""
    views: list[torch.Tensor] = field(default_factory=list)
    """What each of them was."""
    before: list[Callable[[], Any]] = field(default_factory=list)
    """What brings the state into the form that was walked."""
    fixed: bool = True
    """Whether a later walk finds the same as long as the same objects stand in the same places."""

    def add(self, name: str, tensor: torch.Tensor, *, lazy: bool = False, fixed: bool = False) -> None:
        """Add one tensor.

        Args:
            name: its canonical name.
            tensor: plain or DTensor.
            lazy: only an optimizer's step changes it.
            fixed: it is found here by later snapshots too.
        """
        entry, local = stored(name, tensor)
        if fixed:
            self.origins.append(tensor)
            self.views.append(local)
        watched = (tensor, local) if lazy and not tensor.is_inference() else ()
        self.parts.append(
            Part(
                entry=entry,
                sources=(local,),
                watched=watched,
                lazy=lazy and fixed and bool(watched) and entry.nbytes > SMALL,
                fixed=fixed,
            )
        )

    def add_pack(self, name: str, scalars: Iterable[torch.Tensor]) -> None:
        """Add many one-element tensors of one dtype as one entry."""
        originals = tuple(scalars)
        self.origins += originals
        sources = tuple(scalar.detach() for scalar in originals)
        self.views += sources
        first, _ = stored(name, sources[0])
        entry = Entry(
            name=name,
            dtype=first.dtype,
            shape=(len(sources), *first.shape),
            global_shape=(len(sources), *first.global_shape),
            offset=(0, *first.offset),
            real_dtype=first.real_dtype,
            cuts=(),
        )
        self.parts.append(Part(entry=entry, sources=sources, fixed=True))

    def take_tensors(self, tree: Any, path: str) -> Any:
        """``tree`` with its tensors added here and their names in their places."""
        if isinstance(tree, torch.Tensor):
            self.add(path, tree)
            return jsontree.TensorAt(path, {"device": tree.device.type})
        if isinstance(tree, Mapping):
            taken = {key: self.take_tensors(value, f"{path}/{key}") for key, value in tree.items()}
            return type(tree)(taken) if isinstance(tree, (Counter, OrderedDict)) else taken
        if isinstance(tree, (list, tuple)):
            items = [self.take_tensors(value, f"{path}/{index}") for index, value in enumerate(tree)]
            return items if isinstance(tree, list) else tuple(items)
        return tree

    def encode(self, tree: Any, path: str) -> Any:
        """``tree`` as JSON, its tensors added here."""
        return jsontree.encode(self.take_tensors(tree, path), path)


class Known:
    """The fixed part of a capture, and whether it still holds."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.text = {name: _inside(value) for name, value in capture.document.items()}
        self._ids = self._look()
        self._sharded = [i for i, tensor in enumerate(capture.origins) if isinstance(tensor, DTensor)]
        self._addresses = list(map(_address, capture.views))
        self._dtypes = list(map(_dtype, capture.views))
        parameters = [tensor for tensor in capture.origins if isinstance(tensor, torch.nn.Parameter)]
        self._sharded_parameters = [tensor for tensor in parameters if isinstance(tensor, DTensor)]
        self._parameters = [tensor for tensor in parameters if not isinstance(tensor, DTensor)]
        self._parameters_at = self._look_at_parameters()

    def _look(self) -> list[int]:
        # What was seen is held by the capture, so an identity or an address cannot have become another object's.
        return [id(thing) for contents in self.capture.contents for thing in contents()]

    def _look_at_parameters(self) -> list[int]:
        return [*map(_address, self._parameters), *(p._local_tensor.data_ptr() for p in self._sharded_parameters)]

    def in_place(self) -> bool:
        """Whether the objects that were seen, wherever they stand, have the same memory, shapes and dtypes."""
        # Thousands of tensors at every step, so without a loop in Python.  Storages may be given other memory.
        tensors = list(self.capture.origins)
        for index in self._sharded:
            tensors[index] = tensors[index]._local_tensor  # type: ignore[attr-defined]
        return (
            list(map(_address, tensors)) == self._addresses
            and list(map(_dtype, tensors)) == self._dtypes
            and all(map(_same_strides, tensors, self.capture.views))
        )

    def holds(self) -> bool:
        """Whether walking again would give the same parts with the same sources."""
        return self._stands() and self.in_place()

    def seems_to_hold(self) -> bool:
        """Whether the same objects stand in the same places, parameters at the same addresses.

        That takes a third of the time; `in_place` later tells the rest.
        """
        return self._stands() and self._look_at_parameters() == self._parameters_at

    def _stands(self) -> bool:
        for action in self.capture.before:
            action()
        return self.capture.fixed and self._look() == self._ids


def _inside(document: Mapping[str, Any]) -> str:
    """A JSON object's text without its braces."""
    return json.dumps(document, separators=(",", ":"))[1:-1]


def join(known: Known, changing: Capture) -> bytes:
    """The whole document: for every name the known and the changing fields in one object."""
    texts = []
    for name in dict.fromkeys((*known.text, *changing.document)):
        inside = [text for text in (known.text.get(name, ""), _inside(changing.document.get(name, {}))) if text]
        texts.append(f"{json.dumps(name)}:{{{','.join(inside)}}}")
    return ("{" + ",".join(texts) + "}").encode()
