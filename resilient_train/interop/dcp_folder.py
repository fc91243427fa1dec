"""What stands in a folder that plain DCP wrote, by its ``.metadata``, which is a pickle: read without executing it.

A pickle says which classes to look up and what to call.  Here every name that DCP's own metadata needs leads to a
record or a function of this module, made anew for each file, which does nothing but hold what it was given; every other
name is an error.  So nothing of torch or of anybody else is called or changed, whatever the file says.  What comes out
is held against the types it must have before it is used.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from resilient_train.errors import CheckpointDamaged, FormatError, UnsupportedState
from resilient_train.interop.dcp_names import Path
from resilient_train.spec.jsontree import integer
from resilient_train.spec.layout import Box, uncovered
from resilient_train.storage.tier import Tier

METADATA = ".metadata"
_MAX_METADATA = 4 << 30
_CHECKPOINT = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_RECORDS = {
    (f"{_CHECKPOINT}.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    )
} | {(f"{_CHECKPOINT}.filesystem", "_StorageInfo"), (_SHARDED, "TensorProperties")}
_TUPLES = {("torch", "Size")}
# What says nothing that is needed here: the layout and memory format of tensors, and where they were once saved.
_IGNORED = {
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (_SHARDED, "MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A tensor's box, or a leaf that is no tensor, in a file."""

    fqn: str
    """What DCP calls it."""
    file: str
    """The file's name."""
    offset: int
    """Its first byte there."""
    length: int
    """How many bytes it has."""
    box: Box | None = None
    """Which part of the tensor; None for what is no tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpFolder:
    """A checkpoint of plain DCP."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """DCP's name of each tensor to its dtype and shape."""
    items: tuple[Item, ...]
    """What stands where."""
    paths: Mapping[str, Path]
    """DCP's name of each leaf to the keys that lead to it in the state dict, in its order."""


def read_folder(tier: Tier) -> DcpFolder:
    """Read the metadata of the checkpoint in a folder.

    Raises:
        UnsupportedState: naming the class, if the metadata needs one that DCP's own does not; or naming what cannot be
            taken over.
        CheckpointDamaged: if there is no metadata, or it is malformed.
        StorageError: if it could not be read.
    """
    where = f"{tier.name}/{METADATA}"
    size = tier.size(METADATA)
    if size > _MAX_METADATA:
        raise CheckpointDamaged(f"{where}: no metadata has {size:,} bytes")
    try:
        return _folder(_unpickled(tier.read(METADATA, 0, size), where))
    except (AttributeError, FormatError, LookupError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"{where}: not the metadata of a DCP checkpoint: {error!r:.500}") from error


class _Record:
    """Holds the state of an object of the class that it stands for."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


# What pickles of protocol 2 and later are made of, without what only others need: persistent ids, extension codes,
# old-style instances, bytes and buffers of any claimed length.
_OPCODES = [
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND),
    *(pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE),
]


_KEYS = {pickle.SETITEM: slice(-2, -1), pickle.SETITEMS: slice(0, None, 2)}
"""Where keys stand on the stack when they are about to be hashed."""


def _with_known_keys(opcode: bytes, keys: slice) -> Any:
    usual: Any = pickle._Unpickler.dispatch[opcode[0]]

    def load(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            # Hashing a tuple of tuples that are shared takes for ever: it doubles with every level.
            if not isinstance(key, (str, int, _Record)):
                raise FormatError(f"a {type(key).__name__} is a key")
        usual(unpickler)

    return load


# In Python: the one in C makes room for as many objects as a file claims to have.
class _Unpickler(pickle._Unpickler):
    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES}  # noqa: RUF012
    dispatch |= {code[0]: _with_known_keys(code, keys) for code, keys in _KEYS.items()}

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._known: dict[tuple[str, str], Any] = {name: type(name[1], (_Record,), {}) for name in _RECORDS}
        self._known |= {name: _tupled() for name in _TUPLES}
        self._known |= {name: _nothing() for name in _IGNORED}

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if module == "collections" and name == "OrderedDict":
            return _emptied
        raise UnsupportedState(f"{self._where}: names {module}.{name}, which DCP's metadata does not need: refused")


def _emptied() -> dict[Any, Any]:
    """What a pickled OrderedDict begins as."""
    return {}


def _tupled() -> Callable[..., tuple[Any, ...]]:
    return lambda values=(): tuple(values)


def _nothing() -> Callable[..., None]:
    return lambda *_: None


def _unpickled(data: bytes, where: str) -> Any:
    try:
        return _Unpickler(data, where).load()
    except UnsupportedState:
        raise
    except Exception as error:  # A malformed pickle raises whatever its opcodes happen to run into.
        raise CheckpointDamaged(f"{where}: not a pickle of DCP's metadata: {error!r:.500}") from error


def _folder(metadata: Any) -> DcpFolder:
    described = metadata["state_dict_metadata"]
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    boxes: dict[str, list[Box]] = {}
    for fqn, leaf in described.items():
        kind = type(leaf).__name__
        if kind == "TensorStorageMetadata":
            tensors[_text(fqn)] = _dtype(fqn, leaf["properties"].state), _shape(leaf["size"])
            boxes[fqn] = [Box(_shape(chunk["offsets"]), _shape(chunk["sizes"])) for chunk in leaf["chunks"]]
            _check_boxes(fqn, tensors[fqn][1], boxes[fqn])
        elif kind != "BytesStorageMetadata":
            raise FormatError(f"{_text(fqn)} is a {kind}")
    items = [_item(index, info, boxes) for index, info in metadata["storage_data"].items()]
    _check_items(described, boxes, items)
    given = metadata.state.get("planner_data") or {}
    paths = {_text(fqn): _path(path) for fqn, path in given.items() if fqn in described}
    return DcpFolder(
        tensors=tensors, items=tuple(items), paths={**paths, **{fqn: (fqn,) for fqn in described if fqn not in paths}}
    )


def _item(index: Any, info: Any, boxes: Mapping[str, list[Box]]) -> Item:
    fqn, offset = _text(index["fqn"]), index.state.get("offset")
    file = _text(info["relative_path"])
    if info.state.get("transform_descriptors"):
        raise UnsupportedState(f"{fqn}: stored through an extension of DCP, such as a compression")
    if not re.fullmatch(r"[^/\\\0]+", file) or file in (".", ".."):
        raise FormatError(f"{file!r:.100} is no name of a file in the folder")
    box = None
    if fqn in boxes:
        begin = (0,) * len(boxes[fqn][0].offset) if offset is None else _shape(offset)
        fitting = [one for one in boxes[fqn] if one.offset == begin]
        if not fitting:
            raise FormatError(f"{fqn} has no part at {begin}")
        box = max(fitting, key=lambda one: one.size)
    at, length = _number(info["offset"]), _number(info["length"])
    return Item(fqn=fqn, file=file, offset=at, length=length, box=box)


def _check_boxes(fqn: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    for box in boxes:
        if not len(box.offset) == len(box.shape) == len(shape) or any(
            end > whole for end, whole in zip(box.end, shape, strict=True)
        ):
            raise FormatError(f"{fqn}: a part lies outside of the tensor")
    if uncovered(Box.whole(shape), boxes):
        raise FormatError(f"{fqn}: the parts do not make up the tensor")


def _check_items(described: Mapping[str, Any], boxes: Mapping[str, list[Box]], items: list[Item]) -> None:
    """Everything that the metadata describes stands in a file."""
    there = {(item.fqn, item.box) for item in items}
    wanted: set[tuple[str, Box | None]] = {(fqn, box) for fqn, parts in boxes.items() for box in parts if box.size}
    wanted |= {(fqn, None) for fqn in described if fqn not in boxes}
    lacking = sorted(fqn for fqn, _ in wanted - there)
    if lacking:
        raise FormatError(f"nothing says in which file {lacking[0]} is")


def _dtype(fqn: str, state: Any) -> torch.dtype:
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"{fqn} has no dtype")
    return dtype


def _shape(values: Any) -> tuple[int, ...]:
    shape = tuple(_number(value) for value in values)
    if prod(n or 1 for n in shape) * 16 >= 1 << 63:
        raise FormatError(f"no tensor can have the shape {list(shape)}")
    return shape


def _number(value: Any) -> int:
    # What stands there instead could be printed without end: in a pickle one object may stand in many places.
    return integer(value if type(value) is int else -1)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormatError(f"a {type(value).__name__} is no name")
    return value


def _path(path: Any) -> Path:
    keys = tuple(path)
    if not keys or not all(type(key) in (str, int) for key in keys):
        raise FormatError("a path is made of names and numbers")
    return keys
