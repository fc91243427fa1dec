"""What is read of an image: no more of a peer's than is wanted, give or take a tenth, and all of it verified."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from resilient_train.errors import CheckpointDamaged
from resilient_train.image.fetch import Range, Run, plan_runs, split, wanted_blocks
from resilient_train.image.native import checksum, engine
from resilient_train.image.verified import Row, VerifiedImage
from resilient_train.plan.recovery import Holders, Want, copies_by_layout
from resilient_train.spec.messages import encode
from resilient_train.spec.peers import Gather, Gathered, Read, rows_within
from resilient_train.spec.peers import Range as Follows
from resilient_train.spec.shard import BLOCK, Entry, ImageLayout, Stamp, plan_image
from resilient_train.spec.sharding import Cut, held_box
from resilient_train.spec.world import Key
from resilient_train.storage.filesystem import FilesystemTier


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a transformer, most of them matrices."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name, shape in {
            "wq": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
            "norm": (width,),
            "bias": (4 * width,),
        }.items():
            found[f"model/layers.{layer:03d}.{name}"] = shape
    return found


def entries(state: dict[str, tuple[int, ...]], world: int, dim: int, rank: int) -> list[Entry]:
    """What a rank holds; vectors are cut along their only dimension."""
    held = []
    for name, shape in state.items():
        cuts = (Cut(min(dim, len(shape) - 1), world, 1),)
        box = held_box(shape, cuts, rank)
        held.append(Entry(name=name, dtype="F32", shape=box.shape, global_shape=shape, offset=box.offset, cuts=cuts))
    return held


def moved(run: Run, begin: int) -> int:
    """Bytes that a run takes between two nodes, both messages included."""
    if run.sparse:
        rows = [[some.at, some.size, some.stride, some.count] for some in run.rows]
        asked = Gather(slot=10, lineage=10, step=1000, offset=begin, size=run.size, rows=rows)
        blocks = run.last - run.first + 1
        return len(encode(asked)) + len(encode(Gathered(size=run.wanted, gaps=[2**32 - 1] * blocks))) + run.wanted
    read = Read(slot=10, lineage=10, step=1000, offset=begin, size=run.size)
    return len(encode(read)) + len(encode(Follows(size=run.size))) + run.size


def moved_and_least(state: dict[str, tuple[int, ...]], dim: int, old: int, new: int) -> tuple[int, int]:
    """Bytes that all ranks of the new world read from the others' images, headers included, and those they lack."""
    total = least = 0
    for rank in range(new):
        wants = [
            Want(name=entry.name, dtype="F32", global_shape=entry.global_shape, box=entry.box)
            for entry in entries(state, new, dim, rank)
        ]
        held = Holders(world=old, ranks=range(old), near=(rank,))
        copies = copies_by_layout(wants, entries(state, old, dim, 0), held, rank)
        for source in {copy.rank for copy in copies} - {rank}:
            layout = plan_image(entries(state, old, dim, source), 1000)
            starts = dict(zip(layout.entries, layout.starts, strict=True))
            ranges = []
            for copy in copies:
                if copy.rank == source:
                    first, count = copy.box.span_in(copy.entry.box)
                    row, stride = copy.box.rows_in(copy.entry.box)
                    ranges.append(Range(starts[copy.entry] + 4 * first, 4 * count, 1, 4 * row, 4 * stride))
                    least += 4 * copy.box.size
            runs = [run for run in plan_runs(ranges, layout) if run.rows]
            total += sum(moved(run, layout.data_start + run.first * BLOCK) for run in runs)
            total += layout.data_start + 4 * layout.blocks
    return total, least


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("layers", "width"), [(12, 2048), (12, 512), (100, 256)])
def test_one_rank_less_moves_little_more_than_it_must(dim: int, layers: int, width: int) -> None:
    """From 4 ranks to 3: at most a tenth more than what no rank has itself, for large and small tensors."""
    total, least = moved_and_least(shapes(layers, width), dim, 4, 3)
    print(f"{total / least:.4f}")
    assert least <= total <= 1.1 * least


class Memory:
    """An image behind functions that count what they are asked for."""

    def __init__(self, nbytes: int, chance: random.Random) -> None:
        self.entry = Entry(name="t", dtype="U8", shape=(nbytes,), global_shape=(nbytes,), offset=(0,))
        layout = plan_image([self.entry], 100)
        data = np.frombuffer(chance.randbytes(layout.total), dtype=np.uint8).copy()
        ends = [*range(layout.data_start, layout.crc_start, BLOCK), layout.crc_start]
        sums = [checksum(data[at:end]) for at, end in itertools.pairwise(ends)]
        table = np.array(sums, dtype="<u4").view(np.uint8)
        data[layout.crc_start :][: len(table)] = table
        stamp = Stamp(key=Key(1, 1), rank=0, world=1, json_length=0, crc=checksum(table))
        for at, field in [(0, layout.header), *stamp.fields()]:
            data[at : at + len(field)] = np.frombuffer(field, dtype=np.uint8)
        self.data, self.layout = data, layout
        self.moved = 0

    def read(self, offset: int, length: int) -> memoryview:
        self.moved += length
        return self.data[offset : offset + length].data

    def gather(self, offset: int, size: int, rows: Sequence[Row], buffer: memoryview) -> list[int]:
        self.moved += len(buffer)
        checked = rows_within([[*row] for row in rows], size)
        target = np.frombuffer(buffer, dtype=np.uint8)
        assert len(target) == sum(width * count for _, width, _, count in checked)
        return engine.gather_rows(self.data.ctypes.data + offset, size, checked, target.ctypes.data)


def random_ranges(chance: random.Random, layout: ImageLayout, target: int) -> list[Range]:
    """Whole and in rows, neighbours and far apart, across blocks and runs; each has its place at ``target``."""
    found, at = [], layout.data_start
    while True:
        at += chance.choice([0, 1, 5000, 300_000, 3_000_000])
        row = chance.choice([1, 100, 4096, 600_000])
        stride = row + chance.choice([1, 40, 5000, 2_000_000])
        count = chance.choice([1, 2, 30, 1000])
        size = stride * (count - 1) + row
        if at + size > layout.crc_start:
            return found
        rows = (row, stride) if count > 1 and chance.random() < 0.8 else (0, 0)
        found.append(Range(at, size, target + at, *rows))
        at += size


def test_what_is_wanted_arrives_and_little_else_moves() -> None:
    """Any ranges; the same bytes as without gathering, wherever they are wanted, and a damaged gap is found."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    memory = Memory(20_000_000 + chance.randrange(100_000), chance)
    image = VerifiedImage("memory", len(memory.data), memory.read, gather=memory.gather)
    for _ in range(6):
        target = np.zeros(len(memory.data), dtype=np.uint8)
        ranges = random_ranges(chance, memory.layout, target.ctypes.data)
        wanted = np.zeros(len(memory.data), dtype=bool)
        for some in ranges:
            end = some.at + some.size
            for at in range(some.at, end, some.stride or some.size):
                wanted[at : min(end, at + (some.row or some.size))] = True
        memory.moved = 0
        for fetch in image.fetching(ranges):
            fetch()
        assert np.array_equal(target[wanted], memory.data[wanted])
        assert memory.moved <= wanted.sum() / 0.95 + 64 * sum(len(run.rows) for run in plan_runs(ranges, memory.layout))
    at = memory.layout.data_start + 5 * BLOCK + 3
    memory.data[at] ^= 1
    for some in (Range(at + 1000, 500, target.ctypes.data), Range(at - 1, 3, target.ctypes.data, 1, 2)):
        with pytest.raises(CheckpointDamaged, match="block 5"):
            image.fetching([some])[0]()
    with pytest.raises(CheckpointDamaged, match="block 5"):
        image.data(memory.entry, 5 * BLOCK, 1)
    assert image.data(memory.entry, 4 * BLOCK, 7) == memory.data[memory.layout.data_start + 4 * BLOCK :][:7].data


@pytest.mark.parametrize("how", ["mapped", "read", "gathered", "split"])
def test_rows_arrive_as_far_apart_as_they_are_wanted(how: str) -> None:
    """Columns of matrices go to matrices that are narrower or wider; what is between the rows there stays."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    memory = Memory(9_000_000 + chance.randrange(100_000), chance)
    gather = memory.gather if how == "gathered" else None
    address = memory.data.ctypes.data if how == "mapped" else 0
    image = VerifiedImage("memory", len(memory.data), memory.read, gather=gather, address=address)
    target = np.full(30_000_000, 77, dtype=np.uint8)
    expected = target.copy()
    ranges, at, to = [], memory.layout.data_start + 9, 5
    while True:
        row = chance.choice([70, 1000, 40_000, 700_000])
        stride, spread = row + chance.randrange(2 * row), row + chance.choice([0, 3, row])
        count = chance.randrange(2, 4 + 2_000_000 // stride)
        size = stride * (count - 1) + row
        if at + size > memory.layout.crc_start:
            break
        ranges.append(Range(at, size, target.ctypes.data + to, row, stride, spread))
        for index in range(count):
            expected[to + index * spread :][:row] = memory.data[at + index * stride :][:row]
        # The next one's first row may stand right behind this one's last.
        at, to = at + size + chance.choice([0, 300_000]), to + spread * count
    assert ranges
    if how == "split":
        cuts = sorted(chance.randrange(memory.layout.data_start, memory.layout.crc_start) for _ in range(8))
        within, outside = split(ranges, [*zip(cuts[::2], cuts[1::2], strict=True)])
        ranges = [some for part in (*within, outside) for some in part]
    for fetch in image.fetching(ranges):
        fetch()
    assert np.array_equal(target, expected)
    damaged = min(ranges).at
    memory.data[damaged] ^= 1
    again = VerifiedImage("memory", len(memory.data), memory.read, gather=gather, address=address)
    with pytest.raises(CheckpointDamaged, match=f"block {(damaged - memory.layout.data_start) // BLOCK} "):
        again.fetching(ranges)[0]()


def test_blocks_of_a_file_of_this_machine_come_by_its_handle(tmp_path: Path) -> None:
    """Straight to where they belong, in one piece or in rows; a flipped bit names its block, an early end the file."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    memory = Memory(20_000_000, random.Random(seed))
    layout, file, tier = memory.layout, tmp_path / "image", FilesystemTier(str(tmp_path))
    file.write_bytes(memory.data.tobytes())

    def read(offset: int, length: int) -> bytes:
        assert offset < layout.data_start or offset >= layout.crc_start, "blocks are not read by way of other memory"
        return bytes(memory.read(offset, length))

    image = VerifiedImage("image", len(memory.data), read, handle=partial(tier.handle, "image"))
    target = np.zeros(9_000_000, dtype=np.uint8)
    at, to = layout.data_start + 5 * BLOCK + 3, target.ctypes.data
    whole = [Range(at, 3_000_000, to + 1), Range(at + 4_000_000, 100, to + 3_000_001)]
    rows = [Range(at, 4_999_000, to + 4_000_000, 1000, 3000, 1500)]
    for fetch in image.fetching(whole) + image.fetching(rows):
        fetch()
    expected = np.zeros_like(target)
    expected[1:3_000_001] = memory.data[at:][:3_000_000]
    expected[3_000_001:3_000_101] = memory.data[at + 4_000_000 :][:100]
    for index in range(1667):
        expected[4_000_000 + 1500 * index :][:1000] = memory.data[at + 3000 * index :][:1000]
    assert np.array_equal(target, expected)
    with open(file, "r+b") as damaged:
        damaged.seek(at + BLOCK)
        damaged.write(bytes([memory.data[at + BLOCK] ^ 1]))
    for ranges in (whole, rows):
        with pytest.raises(CheckpointDamaged, match="image: block 6 "):
            image.fetching(ranges)[0]()
    os.truncate(file, at)
    for ranges in (whole, rows):
        with pytest.raises(CheckpointDamaged, match=r"image: truncated, .* byte"):
            image.fetching(ranges)[0]()


def test_blocks_between_rows_are_not_read() -> None:
    """Columns of a very wide matrix: what stands between them is neither moved nor summed."""
    chance = random.Random(5)
    memory = Memory(64 * BLOCK, chance)
    image = VerifiedImage("memory", len(memory.data), memory.read)
    at, row, stride = memory.layout.data_start + 5, BLOCK // 2, 8 * BLOCK
    for spread in (0, row):
        target = np.zeros(len(memory.data), dtype=np.uint8)
        wanted = Range(at, 7 * stride + row, target.ctypes.data, row, stride, spread)
        memory.moved = 0
        for fetch in image.fetching([wanted]):
            fetch()
        assert memory.moved <= 8 * 2 * BLOCK
        for index in range(8):
            here = target[index * (spread or stride) :][:row]
            assert np.array_equal(here, memory.data[at + index * stride :][:row])
    assert len(wanted_blocks([wanted], memory.layout)) == 8
