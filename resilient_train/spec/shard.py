"""The shard image: one rank's part of the state at one step, as the bytes of a valid safetensors file.

Theory of operation.  An image is laid out once and then filled again and again in place::

    | 8 bytes: header length | header: JSON, padded with spaces to a 4 KiB boundary                            |
    | tensors, by dtype size, largest first (so that each is aligned without holes) | __json__ | __crc__ | __pad__ |

``__json__`` holds the state that is not tensors, in a fixed capacity.  ``__crc__`` holds the CRC32C of every 1 MiB
block of what stands before it.  What changes from snapshot to snapshot (key, length of the JSON, CRC of ``__crc__``)
stands in the header's metadata in fixed-width fields at fixed places, so publishing writes a few dozen bytes, and
readers can tell an image's key without parsing its header.  The 8 bytes of header length are zero while the image is
written, and are stored last: an image is complete or it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from resilient_train.errors import FormatError
from resilient_train.spec import jsontree
from resilient_train.spec.layout import Box
from resilient_train.spec.sharding import Cut, Cuts, held_box
from resilient_train.spec.world import Key

PAGE = 4096
BLOCK = 1 << 20
"""Bytes covered by one checksum."""
MAX_HEADER = 100_000_000
"""safetensors refuses longer headers."""
JSON_NAME, CRC_NAME, PAD_NAME = "__json__", "__crc__", "__pad__"
_RESERVED = (JSON_NAME, CRC_NAME, PAD_NAME)
_SPARE = 512
_MAX_DIMENSIONS = 64
_MAX_BYTES = (1 << 63) - 1

DTYPE_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
}
"""Bytes per element of the dtypes that safetensors knows."""

# The metadata begins with these fields in this order, so that their places never depend on the tensors.
_FIXED: tuple[tuple[str, int], ...] = (
    ("resilient_train", 1),
    ("lineage", 8),
    ("step", 13),
    ("rank", 6),
    ("world", 6),
    ("json", 10),
    ("crc", 8),
)


def _field_offsets() -> dict[str, int]:
    offsets, at = {}, 8 + len('{"__metadata__":{')
    for name, width in _FIXED:
        at += len(f'"{name}":"')
        offsets[name] = at
        at += width + len('",')
    return offsets


FIELD_AT = _field_offsets()
PEEK = max(FIELD_AT.values()) + 16
"""Number of leading bytes that `peek` needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor (or one rank's box of it) in an image."""

    name: str
    """Canonical name."""
    dtype: str
    """safetensors dtype of the stored bytes."""
    shape: tuple[int, ...]
    """Shape of the stored part."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Where the part begins in the whole."""
    real_dtype: str = ""
    """torch's name of the dtype where safetensors lacks it and the bytes are stored as U8 along the last axis."""
    cuts: Cuts | None = None
    """How the tensor is laid out over all ranks; None if that is not known."""

    @property
    def box(self) -> Box:
        """The part as a box."""
        return Box(self.offset, self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLayout:
    """Where everything stands in an image."""

    entries: tuple[Entry, ...]
    """The tensors in file order."""
    starts: tuple[int, ...]
    """Byte offset of each tensor from the beginning of the file."""
    data_start: int
    """First byte behind the header."""
    json_start: int
    """First byte of the non-tensor state."""
    json_capacity: int
    """Bytes reserved for it."""
    crc_start: int
    """First byte of the checksum table; checksummed blocks cover ``data_start`` up to here."""
    total: int
    """Length of the file."""
    header: bytes
    """The leading ``data_start`` bytes with the fixed-width fields zero and the header length in place."""
    alike: bool = False
    """Whether every rank's image has the same names, of the same global shapes, dtypes and `Entry.cuts`."""
    common: tuple[Entry, ...] = ()
    """Of an image that has not all of what its rank held: what all ranks held alike, as this one did.  One image of a
    checkpoint tells it for all."""
    rest: int = -1
    """Of such an image: the rank whose image has what this one's rank held like that, and is not ``common``; -1: it is
    all in this one."""

    @property
    def blocks(self) -> int:
        """Number of checksummed blocks."""
        return -(-(self.crc_start - self.data_start) // BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The fields that change from snapshot to snapshot."""

    key: Key
    """Which state this is a part of."""
    rank: int
    """Whose part."""
    world: int
    """Of how many."""
    json_length: int
    """Used bytes of ``__json__``."""
    crc: int
    """CRC32C of the ``__crc__`` table."""

    def fields(self) -> list[tuple[int, bytes]]:
        """(byte offset in the file, bytes to put there) for every field."""
        values = {
            "lineage": f"{self.key.lineage:08d}",
            "step": f"{self.key.step:013d}",
            "rank": f"{self.rank:06d}",
            "world": f"{self.world:06d}",
            "json": f"{self.json_length:010d}",
            "crc": f"{self.crc:08x}",
        }
        return [(FIELD_AT[name], value.encode()) for name, value in values.items()]


def plan_image(
    entries: Sequence[Entry],
    json_capacity: int,
    *,
    alike: bool = False,
    common: Sequence[Entry] = (),
    rest: int = -1,
) -> ImageLayout:
    """Lay out an image for ``entries`` and ``json_capacity`` bytes of non-tensor state.

    Args:
        entries: the tensors.
        json_capacity: bytes.
        alike: whether all ranks have the same, but for their boxes.
        common: see `ImageLayout.common`; all with `Entry.cuts`.
        rest: see `ImageLayout.rest`.

    Raises:
        FormatError: if a name is used twice or reserved, or the header grows beyond what safetensors reads.
    """
    ordered = sorted(entries, key=lambda e: (-DTYPE_SIZES[e.dtype], e.name, e.offset))
    names = _stored_names(ordered)
    table: dict[str, Any] = {}
    at = 0
    begins = []
    for entry, name in zip(ordered, names, strict=True):
        begins.append(at)
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    json_begin = at
    # The table of 32-bit checksums must be aligned, so the capacity is rounded up to what gets it there.
    crc_begin = -(-(at + json_capacity) // PAGE) * PAGE
    table[JSON_NAME] = {"dtype": "U8", "shape": [crc_begin - at], "data_offsets": [at, crc_begin]}
    blocks = -(-crc_begin // BLOCK)
    end = crc_begin + 4 * blocks
    table[CRC_NAME] = {"dtype": "U32", "shape": [blocks], "data_offsets": [crc_begin, end]}
    total = -(-end // PAGE) * PAGE
    if total > end:
        table[PAD_NAME] = {"dtype": "U8", "shape": [total - end], "data_offsets": [end, total]}
    header = _header(ordered, names, table, alike, common, rest)
    start = len(header)
    return ImageLayout(
        entries=tuple(ordered),
        starts=tuple(start + begin for begin in begins),
        data_start=start,
        json_start=start + json_begin,
        json_capacity=crc_begin - json_begin,
        crc_start=start + crc_begin,
        total=start + total,
        header=header,
        alike=alike,
        common=tuple(common),
        rest=rest,
    )


def _stored_names(entries: Sequence[Entry]) -> list[str]:
    """Names as they stand in the file: several boxes of one tensor get suffixes."""
    seen: dict[str, int] = {}
    names = []
    if len({(entry.name, entry.box) for entry in entries}) != len(entries):
        raise FormatError("tensor names collide: a box of a tensor stands there twice")
    for entry in entries:
        count = seen.get(entry.name, 0)
        seen[entry.name] = count + 1
        names.append(entry.name if count == 0 else f"{entry.name}@{count}")
    if len(set(names)) != len(names) or not set(names).isdisjoint((*_RESERVED, "__metadata__")):
        raise FormatError(f"tensor names collide with each other or with {', '.join(_RESERVED)}")
    return names


def _header(
    entries: Sequence[Entry],
    names: Sequence[str],
    table: Mapping[str, Any],
    alike: bool,
    common: Sequence[Entry],
    rest: int,
) -> bytes:
    boxes = {
        name: [list(e.global_shape), list(e.offset)]
        for name, e in zip(names, entries, strict=True)
        if e.shape != e.global_shape or any(e.offset)
    }
    dtypes = {name: e.real_dtype for name, e in zip(names, entries, strict=True) if e.real_dtype}
    aliases = {name: e.name for name, e in zip(names, entries, strict=True) if e.name != name}
    metadata = {name: "0" * width for name, width in _FIXED}
    metadata["resilient_train"] = "1"
    patterns = list(dict.fromkeys(e.cuts for e in (*entries, *common) if e.cuts is not None))
    number = {cuts: index for index, cuts in enumerate(patterns)}
    layouts = {
        "alike": int(alike),
        "patterns": [[[cut.dim, cut.parts, cut.stride] for cut in cuts] for cuts in patterns],
        "tensors": {name: number[e.cuts] for name, e in zip(names, entries, strict=True) if e.cuts is not None},
    }
    if common:
        layouts["common"] = [
            [e.name, e.dtype, e.real_dtype, list(e.global_shape), number[e.cuts]] for e in common if e.cuts is not None
        ]
    if rest >= 0:
        layouts["rest"] = rest
    for key, value in (("boxes", boxes), ("dtypes", dtypes), ("names", aliases), ("layouts", layouts)):
        metadata[key] = json.dumps(value, separators=(",", ":"))
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    length = -(-(8 + len(text) + _SPARE) // PAGE) * PAGE - 8
    if length > MAX_HEADER:
        raise FormatError(f"the header of the shard image needs {length} bytes, safetensors reads {MAX_HEADER}")
    return length.to_bytes(8, "little") + text.ljust(length)


def peek(prefix: bytes | memoryview) -> Stamp | None:
    """The stamp of a published image from its first `PEEK` bytes; None if it is not published or not an image."""
    data = bytes(prefix[:PEEK])
    if len(data) < PEEK or not any(data[:8]):
        return None
    raw = {name: data[FIELD_AT[name] : FIELD_AT[name] + width] for name, width in _FIXED}
    try:
        if raw["resilient_train"] != b"1" or data[8:25] != b'{"__metadata__":{':
            return None
        if not all(value.isdigit() for name, value in raw.items() if name != "crc") or not raw["crc"].isalnum():
            return None  # int() would take signs, spaces and underscores.
        return Stamp(
            key=Key(int(raw["lineage"]), int(raw["step"])),
            rank=int(raw["rank"]),
            world=int(raw["world"]),
            json_length=int(raw["json"]),
            crc=int(raw["crc"], 16),
        )
    except ValueError:
        return None


def header_size(prefix: bytes | memoryview) -> int:
    """How many bytes stand before the data, by a file's first 8; more than any image has if that is nonsense."""
    return 8 + min(int.from_bytes(bytes(prefix[:8]), "little"), MAX_HEADER + 1)


def parse_header(header: bytes | memoryview, file_size: int) -> tuple[ImageLayout, Stamp]:
    """Layout and stamp of an image from its leading bytes (at least the whole header).

    Args:
        header: the file's first bytes; ``8 + header length`` of them are used.
        file_size: length of the whole file in bytes.

    Raises:
        FormatError: if anything is not exactly as `plan_image` makes it: lengths, offsets, overlaps, holes.
    """
    stamp = peek(header)
    if stamp is None:
        raise FormatError("not a published shard image")
    start = header_size(header)
    if not PEEK <= start <= min(MAX_HEADER + 8, file_size) or start % PAGE or len(header) < start:
        raise FormatError(f"header length {start - 8} does not fit a file of {file_size} bytes")
    try:
        document = jsontree.parse(bytes(header[8:start]))
        return _parse_table(document, start, file_size, bytes(header[:start]), stamp.rank), stamp
    except (FormatError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"malformed header: {error!r:.500}") from error


def _parse_table(document: dict[str, Any], start: int, file_size: int, header: bytes, rank: int) -> ImageLayout:
    metadata = document.pop("__metadata__")
    boxes, dtypes, aliases = (jsontree.parse(metadata[name]) for name in ("boxes", "dtypes", "names"))
    layouts = jsontree.parse(metadata.get("layouts", "{}"))
    patterns = [tuple(Cut(*_numbers(cut)) for cut in cuts) for cuts in layouts.get("patterns", [])]
    pattern_of = layouts.get("tensors", {})
    spans = {name: _numbers(item["data_offsets"]) for name, item in document.items()}
    at = 0
    entries, starts = [], []
    for name, item in sorted(document.items(), key=lambda pair: spans[pair[0]]):
        begin, end = spans[name]
        shape = _shape(item["shape"])
        if begin != at or end - begin != prod(shape) * DTYPE_SIZES[item["dtype"]]:
            raise ValueError(f"{name!r:.200} does not stand where it must")
        at = end
        if name in _RESERVED:
            continue
        whole, offset = boxes.get(name, (item["shape"], [0] * len(shape)))
        entry = Entry(
            name=_text(aliases.get(name, name)),
            dtype=item["dtype"],
            shape=shape,
            global_shape=_shape(whole),
            offset=_numbers(offset),
            real_dtype=_text(dtypes.get(name, "")),
            cuts=patterns[jsontree.integer(pattern_of[name])] if name in pattern_of else None,
        )
        _check_box(entry, rank)
        entries.append(entry)
        starts.append(start + begin)
    if len({(entry.name, entry.box) for entry in entries}) != len(entries):
        raise ValueError("a box of a tensor stands there twice")
    common = tuple(_common(row, patterns, rank) for row in layouts.get("common", []))
    if len({entry.name for entry in common}) != len(common):
        raise ValueError("a tensor is told of twice")
    json_begin, crc_begin = spans[JSON_NAME]
    if start + at != file_size or spans[CRC_NAME][0] != crc_begin or crc_begin % 4:
        raise ValueError(f"the file has {file_size} bytes, its header says {start + at}")
    if spans[CRC_NAME][1] - crc_begin != 4 * -(-crc_begin // BLOCK):
        raise ValueError("the checksum table has another length than the data needs")
    return ImageLayout(
        entries=tuple(entries),
        starts=tuple(starts),
        data_start=start,
        json_start=start + json_begin,
        json_capacity=crc_begin - json_begin,
        crc_start=start + crc_begin,
        total=file_size,
        header=header,
        alike=jsontree.integer(layouts.get("alike", 0), 0, 1) == 1,
        common=common,
        rest=jsontree.integer(layouts.get("rest", -1), -1),
    )


def _common(row: Any, patterns: Sequence[Cuts], rank: int) -> Entry:
    """An entry of `ImageLayout.common`."""
    name, dtype, real_dtype, whole, number = row
    if dtype not in DTYPE_SIZES:
        raise ValueError(f"{dtype!r:.50} is no dtype")
    shape, cuts = _shape(whole), patterns[jsontree.integer(number)]
    _check_cuts(cuts, shape, name)
    box = held_box(shape, cuts, rank)
    entry = Entry(
        name=_text(name),
        dtype=dtype,
        shape=box.shape,
        global_shape=shape,
        offset=box.offset,
        real_dtype=_text(real_dtype),
        cuts=cuts,
    )
    _check_box(entry, rank)
    return entry


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"{values!r:.50} is no list of at most {_MAX_DIMENSIONS} numbers")
    return tuple(jsontree.integer(value) for value in values)


def _shape(values: Any) -> tuple[int, ...]:
    """A shape whose strides can be computed, even if another dimension is 0."""
    shape = _numbers(values)
    if prod(n or 1 for n in shape) * max(DTYPE_SIZES.values()) > _MAX_BYTES:
        raise ValueError(f"no tensor can have the shape {list(shape)}")
    return shape


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.50} is no name")
    return value


def _check_cuts(cuts: Cuts, shape: Sequence[int], name: object) -> None:
    if any(cut.dim >= len(shape) or not (cut.parts and cut.stride) for cut in cuts):
        raise ValueError(f"{name!r:.200}: malformed layout")


def _check_box(entry: Entry, rank: int) -> None:
    if not len(entry.shape) == len(entry.global_shape) == len(entry.offset):
        raise ValueError(f"{entry.name!r:.200}: box and shape differ in dimensions")
    if any(at + n > whole for n, whole, at in zip(entry.shape, entry.global_shape, entry.offset, strict=True)):
        raise ValueError(f"{entry.name!r:.200}: box outside of the tensor")
    # Of a dtype that is stored as bytes every part has all bytes of its elements.
    bytewise = entry.dtype == "U8" and entry.shape[-1:] == entry.global_shape[-1:] != ()
    if entry.real_dtype and not bytewise:
        raise ValueError(f"{entry.name!r:.200}: is not stored as the bytes of {entry.real_dtype!r:.50}")
    _check_cuts(entry.cuts or (), entry.shape, entry.name)
    if entry.cuts is not None and held_box(entry.global_shape, entry.cuts, rank) != entry.box:
        raise ValueError(f"{entry.name!r:.200}: is not what its layout says that rank {rank} holds")
