"""The image format: a valid safetensors file, exact under parsing, and refusing everything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import safetensors

from resilient_train.errors import FormatError
from resilient_train.spec.shard import PEEK, Entry, ImageLayout, Stamp, parse_header, peek, plan_image
from resilient_train.spec.sharding import Cut
from resilient_train.spec.world import Key

ENTRIES = [
    Entry(name="weight", dtype="F32", shape=(3, 4), global_shape=(6, 4), offset=(3, 0)),
    Entry(name="empty", dtype="F32", shape=(0, 4), global_shape=(6, 4), offset=(6, 0)),
    Entry(name="scalar", dtype="I64", shape=(), global_shape=(), offset=()),
    Entry(name="odd", dtype="U8", shape=(7,), global_shape=(7,), offset=(0,)),
    Entry(name="half", dtype="BF16", shape=(5,), global_shape=(5,), offset=(0,)),
    Entry(name="complex", dtype="U8", shape=(2, 16), global_shape=(2, 16), offset=(0, 0), real_dtype="complex128"),
    Entry(name="weight", dtype="F32", shape=(1, 4), global_shape=(6, 4), offset=(0, 0)),
]
STAMP = Stamp(key=Key(3, 17), rank=2, world=4, json_length=5, crc=0xDEADBEEF)


def image(layout: ImageLayout, stamp: Stamp = STAMP) -> bytearray:
    data = bytearray(layout.total)
    data[: layout.data_start] = layout.header
    for at, value in stamp.fields():
        data[at : at + len(value)] = value
    return data


def test_an_image_parses_to_what_was_planned() -> None:
    """Layout and stamp survive the round trip, several boxes of one tensor included."""
    layout = plan_image(ENTRIES, 100)
    data = image(layout)
    parsed, stamp = parse_header(data, len(data))
    assert stamp == STAMP == peek(data[:PEEK])
    assert (parsed.entries, parsed.starts, parsed.crc_start) == (layout.entries, layout.starts, layout.crc_start)


def test_tensors_are_aligned_and_without_holes() -> None:
    """Every tensor starts at a multiple of its element size, and data at a page."""
    layout = plan_image(ENTRIES, 100)
    assert layout.data_start % 4096 == 0
    assert layout.crc_start % 4096 == 0
    for entry, start in zip(layout.entries, layout.starts, strict=True):
        width = 8 if entry.dtype == "I64" else 4 if entry.dtype == "F32" else 2 if entry.dtype == "BF16" else 1
        assert start % width == 0


def test_safetensors_reads_it(tmp_path: Path) -> None:
    """The official reader opens an image and finds the tensors."""
    path = tmp_path / "image.safetensors"
    path.write_bytes(image(plan_image(ENTRIES, 100)))
    with safetensors.safe_open(str(path), "pt") as file:
        assert {"weight", "weight@1", "empty", "scalar", "odd", "half", "__json__"} <= set(file.keys())
        assert file.get_tensor("empty").shape == (0, 4)
        assert file.metadata()["step"] == "0000000000017"


def test_an_unpublished_image_is_none() -> None:
    """Zero in the first eight bytes means that there is nothing."""
    data = image(plan_image(ENTRIES, 100))
    data[:8] = bytes(8)
    assert peek(data) is None
    with pytest.raises(FormatError):
        parse_header(data, len(data))


def test_names_may_not_collide() -> None:
    """Reserved names and collisions with suffixes are refused."""
    for name in ("__crc__", "__metadata__", "weight@1"):
        bad = Entry(name=name, dtype="U8", shape=(1,), global_shape=(1,), offset=(0,))
        with pytest.raises(FormatError, match="collide"):
            plan_image([*ENTRIES, bad], 10)
    with pytest.raises(FormatError, match="collide"):
        plan_image([*ENTRIES, ENTRIES[0]], 10)


def test_damaged_headers_are_refused_or_harmless() -> None:
    """Random flips, truncations and hostile numbers: FormatError or the same layout, nothing else."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    plain = plan_image(ENTRIES, 100)
    cut = Entry(name="c", dtype="F32", shape=(2, 3), global_shape=(4, 3), offset=(0, 0), cuts=(Cut(0, 2, 1),))
    told = plan_image([*ENTRIES, cut], 100, alike=True, common=[cut], rest=0)
    parsed, _ = parse_header(image(told), told.total)
    assert (parsed.entries, parsed.common, parsed.rest) == (told.entries, told.common, 0)
    for turn in range(3000):
        layout = (plain, told)[turn % 2]
        data = bytearray(image(layout))
        kind = chance.randrange(4)
        if kind == 0:
            data[chance.randrange(layout.data_start)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data = data[: chance.randrange(len(data))]
        elif kind == 2:
            data[:8] = chance.randrange(1 << 64).to_bytes(8, "little")
        else:
            at = data.find(chance.choice([b"data_offsets", b"layouts"])) + chance.randrange(80)
            data[at : at + 1] = chance.choice([b"9", b"-", b"]", b"."])
        try:
            parsed, _ = parse_header(data, len(data))
        except FormatError:
            continue
        # Only names, boxes within bounds and spaces can differ; no tensor can reach outside of the data.
        ends = [s + e.nbytes for s, e in zip(parsed.starts, parsed.entries, strict=True)]
        assert max(ends) <= len(data)


def test_deep_json_is_refused() -> None:
    """A header that nests without end is an error, not a crash."""
    head = image(plan_image(ENTRIES, 100))
    data = bytearray(head)
    bomb = b"[" * 3000
    at = data.find(b'"boxes"')
    data[at : at + len(bomb)] = bomb
    with pytest.raises(FormatError):
        parse_header(data, len(data))
