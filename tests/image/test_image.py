"""Slots and images: written whole or not at all, read only when verified."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import torch

from resilient_train.errors import CheckpointDamaged, MemoryRefused
from resilient_train.image.arena import Board, Slot, create_memory
from resilient_train.image.reader import ImageReader, memory_reader
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.spec.shard import BLOCK, MAX_HEADER, Entry, plan_image
from resilient_train.spec.world import Key

KEY = Key(2, 5)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "big": torch.randn(700, 1000),
        "strided": torch.randn(30, 20).t(),
        "half": torch.randn(33).to(torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
    }


def write(slot: Slot, writer: ImageWriter, key: Key, parts: list[Part], document: bytes = b"{}") -> bool:
    if not writer.begin(slot, key, parts, document):
        return False
    assert writer.conclude() == []
    return True


def written() -> tuple[Slot, ImageWriter, list[Part]]:
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.int64: "I64"}
    parts = {}
    for name, value in tensors().items():
        shape = tuple(value.shape)
        dtype = kinds.get(value.dtype, "F8_E4M3")
        entry = Entry(name=name, dtype=dtype, shape=shape, global_shape=shape, offset=(0,) * len(shape))
        lazy = name in ("big", "half")
        parts[name] = Part(entry=entry, sources=(value,), watched=(value,), lazy=lazy, fixed=lazy or name == "flag")
    layout = plan_image([part.entry for part in parts.values()], 100)
    fd = create_memory("test", layout.total)
    slot = Slot(fd)
    os.close(fd)
    ordered = [parts[entry.name] for entry in layout.entries]
    writer = ImageWriter(layout, ordered, rank=1, world=2)
    assert write(slot, writer, KEY, ordered, b'{"a": 1}')
    return slot, writer, ordered


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Every dtype, strided and empty tensors, and the document; also through safetensors itself."""
    slot, writer, ordered = written()
    with slot.reading(KEY) as view:
        assert view is not None
        reader = memory_reader("image", view)
        assert reader.json() == {"a": 1}
        assert (reader.stamp.rank, reader.stamp.world) == (1, 2)
        for entry, (value,) in zip(writer.layout.entries, [part.sources for part in ordered], strict=True):
            read = reader.tensor(entry)
            assert read.dtype == value.dtype
            assert read.shape == value.shape
            assert read.reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))
        path = tmp_path / "x.safetensors"
        path.write_bytes(view)
    with safetensors.safe_open(str(path), "pt") as file:
        assert torch.equal(file.get_tensor("big"), tensors()["big"])


def test_a_key_that_was_overwritten_is_not_read() -> None:
    """Readers name the state they mean."""
    slot, writer, ordered = written()
    assert write(slot, writer, Key(2, 6), ordered)
    with slot.reading(KEY) as view:
        assert view is None


def test_a_slot_that_is_read_is_not_written() -> None:
    """The writer goes elsewhere instead of waiting or tearing."""
    slot, writer, ordered = written()
    other = Slot(slot.fd)
    with other.reading(KEY) as view:
        assert view is not None
        assert not write(slot, writer, Key(2, 6), ordered)
    assert write(slot, writer, Key(2, 6), ordered)


def test_nothing_is_published_before_the_copy_is_complete() -> None:
    """Between begin and conclude there is no image, and nobody can read the slot."""
    slot, writer, ordered = written()
    assert writer.begin(slot, Key(2, 6), ordered, b"{}")
    assert slot.stamp() is None
    other = Slot(slot.fd)
    with other.reading(Key(2, 6)) as view:
        assert view is None
    assert writer.conclude() == []
    with other.reading(Key(2, 6)) as view:
        assert view is not None
        read_all(view)


def test_a_source_that_changes_under_the_copy_leaves_no_image() -> None:
    """The entry is named; the state that half of it belongs to is never published."""
    slot, writer, ordered = written()
    assert writer.begin(slot, Key(2, 6), ordered, b"{}")
    next(part for part in ordered if part.entry.name == "big").sources[0].add_(1)
    assert writer.conclude() == ["big"]
    assert slot.stamp() is None
    assert write(slot, writer, Key(2, 7), ordered)


def test_an_audit_finds_changes_that_no_version_counter_shows() -> None:
    """The audited image is that of the boundary; the entry that changed later is named."""
    slot, writer, ordered = written()
    source = next(part for part in ordered if part.entry.name == "half").sources[0]
    before = source.clone()
    assert writer.begin(slot, Key(2, 6), ordered, b"{}", audit=True)
    source.data.view(torch.uint8)[3] += 1
    assert writer.conclude() == []
    assert writer.changed() == ["half"]
    with slot.reading(Key(2, 6)) as view:
        assert view is not None
        reader = memory_reader("image", view)
        entry = next(entry for entry in reader.entries() if entry.name == "half")
        assert torch.equal(reader.tensor(entry), before)


def read_all(view: memoryview) -> None:
    reader = memory_reader("my image", view)
    for entry in reader.entries():
        reader.tensor(entry)
    reader.json()


def test_every_flipped_bit_of_the_data_is_found() -> None:
    """A flip in any block, the document or the checksum table is an error that names the image."""
    slot, writer, _ = written()
    layout = writer.layout
    places = [layout.data_start + 1, layout.data_start + BLOCK + 5, layout.json_start, layout.crc_start + 2]
    for place in places:
        slot.map[place] ^= 4
        with slot.reading(KEY) as view, pytest.raises(CheckpointDamaged, match="my image"):
            read_all(view)
        slot.map[place] ^= 4


@pytest.mark.parametrize("length", [1 << 39, (1 << 64) - 1])
def test_no_more_is_read_than_a_header_can_have(length: int) -> None:
    """One damaged bit of the length does not bring a terabyte into memory."""
    asked = []

    def read(offset: int, count: int) -> bytes:
        asked.append(offset + count)
        return length.to_bytes(8, "little") + bytes(100)

    with pytest.raises(CheckpointDamaged, match="my file"):
        ImageReader("my file", 1 << 40, read)
    assert max(asked) <= MAX_HEADER + 16


def test_a_writer_killed_at_any_instant_leaves_the_old_image_or_none() -> None:
    """SIGKILL inside of a snapshot: no torn image, and the lock goes with the process."""
    slot, writer, ordered = written()
    script = """
import sys, torch
from resilient_train.image.arena import Slot
from resilient_train.image.snapshot import ImageWriter, Part
from resilient_train.spec.shard import parse_header
from resilient_train.spec.world import Key
slot = Slot(int(sys.argv[1]))
length = 8 + int.from_bytes(slot.map[:8], "little")
layout, _ = parse_header(slot.map[:length], slot.size)
names = {"F32": torch.float32, "BF16": torch.bfloat16, "BOOL": torch.bool, "I64": torch.int64,
         "F8_E4M3": torch.float8_e4m3fn}
values = [torch.ones(e.shape, dtype=torch.float32).to(names[e.dtype]) for e in layout.entries]
parts = [Part(entry=e, sources=(v,), watched=(v,), lazy=True, fixed=True)
         for e, v in zip(layout.entries, values, strict=True)]
writer = ImageWriter(layout, parts, 1, 2)
print("ready", flush=True)
step = 10
while True:
    if writer.begin(slot, Key(2, step), parts, b"{}"):
        writer.conclude()
    step += 1
"""
    complete = 0
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(slot.fd)], pass_fds=[slot.fd], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGSTOP)
        for _ in range(40):
            # Stop and look, again and again: what is published is whole at every instant.
            os.kill(process.pid, signal.SIGCONT)
            os.sched_yield()
            os.kill(process.pid, signal.SIGSTOP)
            status = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED)
            assert status is not None
            assert status.si_code == os.CLD_STOPPED, "the writer died"
            stamp = slot.stamp()
            if stamp is not None:
                complete += 1
                reader = memory_reader("image", memoryview(slot.map))
                for entry in reader.entries():
                    reader.tensor(entry)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert write(slot, writer, Key(3, 1), ordered), "the killed writer's lock outlived it"


def test_a_header_that_was_not_committed_is_not_looked_into() -> None:
    """Parsing takes much more memory than reading, and whoever has a manifest knows what must be there."""
    header = b"[" * 50_000_000
    data = len(header).to_bytes(8, "little") + header
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointDamaged, match="not the one that was committed"):
            ImageReader("image", len(data), lambda at, size: data[at : at + size], header_crc=1)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data)
    finally:
        tracemalloc.stop()


def test_refused_memory_says_what_to_do() -> None:
    """An impossible size is an error here, not a SIGBUS later."""
    with pytest.raises(MemoryRefused, match="raise the container's memory limit"):
        create_memory("huge", 1 << 60)


def test_the_board_shows_progress_and_the_watermark() -> None:
    """The watermark is what all have published in one lineage."""
    fd = Board.create(3)
    mine, theirs = Board(fd), Board(fd)
    os.close(fd)
    assert theirs.progress(2) == (0, 0)
    mine.report_progress(2, 4, 17)
    assert theirs.progress(2) == (4, 17)
    mine.report_published(0, Key(1, 5))
    mine.report_published(1, Key(1, 7))
    assert theirs.watermark(1, (0, 1)) == 5
    assert theirs.watermark(1, (0, 1, 2)) == -1
    mine.report_published(1, Key(2, 7))
    assert theirs.watermark(1, (0, 1)) == -1
    mine.ask_to_persist(9)
    assert theirs.persist_at() == 9
    mine.clear(0)
    assert theirs.published(0) is None
    with pytest.raises(IndexError):
        mine.progress(3)
