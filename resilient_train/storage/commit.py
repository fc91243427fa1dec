"""What makes a checkpoint: the manifest, a pure function of the parts that the keepers put.

A folder ``step-000000041.g3`` holds one image per rank and one part per keeper.  Whoever sees that the parts name every
rank, and agree on what their ranks hold alike, writes ``manifest.json``; all would write the same.  No manifest, no
checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from resilient_train.errors import CheckpointDamaged, FormatError, ReplicasDiffer
from resilient_train.spec import jsontree
from resilient_train.spec.world import Key

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-([0-9]{9,13})\.g([0-9]{1,8})")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")
_IMAGE = re.compile(r"rank-\d{5,}-of-(\d{5,})\.safetensors")
IMAGE_SUFFIX = ".safetensors"
FORMAT = 1
MAX_MANIFEST = 8 << 20
"""No manifest is longer, with some 200 bytes a rank: what is, is read by nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """One rank's image in a checkpoint."""

    name: str
    """File name within the folder."""
    rank: int
    """Whose part."""
    size: int
    """Length in bytes."""
    header_crc: int
    """CRC32C of everything before the data."""
    table_crc: int
    """CRC32C of the image's own checksum table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSum:
    """What a node holds that other nodes hold alike, of which each writes a part."""

    crc: int
    """CRC32C of all of it."""
    rank: int
    """One of its ranks that hold it."""
    tensors: str
    """What it is, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A committed checkpoint, or the part of it that one keeper has written."""

    key: Key
    """Which state."""
    world: int
    """Number of ranks that it is the state of."""
    files: tuple[ImageFile, ...]
    """One image per rank, by rank."""
    past: Mapping[int, int | None]
    """The job's ancestry: lineage to the last step of it that belongs to the past (None: all)."""
    divided: int = 0
    """If the ranks have divided what they hold alike as `resilient_train.plan.division` says: its `LEAST`."""
    differed: bool = False
    """Whether nodes were found to hold different values of what they should hold alike, so that each wrote its own."""
    sums: Mapping[str, ColumnSum] = field(default_factory=dict)
    """Of a part: what other parts have to say the same of, by `Column.name`."""


def folder_of(key: Key) -> str:
    """The folder's name."""
    return f"step-{key.step:09d}.g{key.lineage}"


def key_of(folder: str) -> Key | None:
    """The inverse of `folder_of`; None for other names."""
    match = _FOLDER.fullmatch(folder)
    key = Key(int(match[2]), int(match[1])) if match else None
    return key if key is not None and folder_of(key) == folder else None


def image_name(rank: int, world: int) -> str:
    """File name of a rank's image."""
    return f"rank-{rank:05d}-of-{world:05d}{IMAGE_SUFFIX}"


def world_of(name: str) -> int | None:
    """The number of ranks that an image's file name tells of; None for other names."""
    match = _IMAGE.fullmatch(name)
    return int(match[1]) if match else None


def part_name(files: Sequence[ImageFile]) -> str:
    """File name of the part that lists ``files``."""
    return f"part-{min(file.rank for file in files):05d}.json"


def encode_part(manifest: Manifest) -> bytes:
    """A part or a whole manifest as JSON."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "key": list(manifest.key),
        "world": manifest.world,
        "past": [[lineage, bound] for lineage, bound in sorted(manifest.past.items())],
        "divided": manifest.divided,
        "differed": manifest.differed,
        "sums": {name: [some.crc, some.rank, some.tensors] for name, some in sorted(manifest.sums.items())},
        "files": [asdict(file) for file in sorted(manifest.files, key=lambda file: file.rank)],
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def decode_part(data: bytes, path: str) -> Manifest:
    """The inverse of `encode_part`.

    Raises:
        CheckpointDamaged: naming ``path``, if ``data`` is anything else.
    """
    try:
        document = jsontree.parse(data)
        if document["format"] != FORMAT:
            raise CheckpointDamaged(f"{path}: format {document['format']!r:.50} is not known to this version")
        files = tuple(_file(item) for item in document["files"])
        lineage, step = map(jsontree.integer, document["key"])
        world = jsontree.integer(document["world"], 1)
        past = {
            jsontree.integer(one): None if bound is None else jsontree.integer(bound) for one, bound in document["past"]
        }
        divided = jsontree.integer(document.get("divided", 0))
        differed = bool(document.get("differed"))
        sums = {name: _sum(row) for name, row in document.get("sums", {}).items()}
        return Manifest(
            key=Key(lineage, step),
            world=world,
            files=files,
            past=past,
            divided=divided,
            differed=differed,
            sums=sums,
        )
    except (FormatError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, FormatError) else repr(error)
        raise CheckpointDamaged(f"{path}: not a manifest: {why:.500}") from error


def _file(item: Mapping[str, Any]) -> ImageFile:
    name = item["name"]
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise ValueError(f"{name!r:.100} is no name of an image file")
    numbers = {key: jsontree.integer(item[key]) for key in ("rank", "size", "header_crc", "table_crc")}
    return ImageFile(name=name, **numbers)


def _sum(row: Any) -> ColumnSum:
    crc, rank, tensors = row
    if not isinstance(tensors, str):
        raise ValueError(f"{tensors!r:.100} names no tensors")
    return ColumnSum(crc=jsontree.integer(crc), rank=jsontree.integer(rank), tensors=tensors)


def merge(parts: Iterable[Manifest]) -> Manifest | None:
    """The manifest that the parts add up to; None while they do not name every rank once.

    Raises:
        ReplicasDiffer: if nodes hold different values of what each has written a part of.
    """
    parts = list(parts)
    if not parts:
        return None
    first = parts[0]
    if any((part.key, part.world) != (first.key, first.world) for part in parts):
        return None
    files = {file.rank: file for part in parts for file in part.files}
    if len(files) != first.world or max(files) >= first.world:
        return None
    _check_same(parts)
    ordered = tuple(files[rank] for rank in range(first.world))
    differed = any(part.differed for part in parts)
    return replace(first, files=ordered, differed=differed, sums={})


def _check_same(parts: Sequence[Manifest]) -> None:
    if len({part.divided for part in parts}) > 1:
        raise ReplicasDiffer("some nodes have divided what they hold alike, and others have not")
    known: dict[str, ColumnSum] = {}
    for part in parts:
        for name, some in part.sums.items():
            other = known.setdefault(name, some)
            if other.crc != some.crc:
                raise ReplicasDiffer(
                    f"ranks {other.rank} and {some.rank}, on different nodes, hold different {some.tensors}, and should"
                    " hold the same: one of them computes wrongly, or as another kind of device does, or what is a"
                    " rank's own has no name of its own"
                )
