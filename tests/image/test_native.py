"""The engines: the extension, its table-driven twin and the Python fallback give the same results."""

from __future__ import annotations

import ctypes
import errno
import random
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest

from resilient_train import _native
from resilient_train.image.native import Engine, PythonEngine, checksum, crc32c_numpy, load
from resilient_train.spec.shard import BLOCK

ENGINES = [PythonEngine(), _native]


def test_known_values() -> None:
    """The check values of RFC 3720."""
    for data, value in [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0)]:
        assert checksum(data) == value
        assert crc32c_numpy(np.frombuffer(data, dtype=np.uint8)) == value


def test_all_engines_agree() -> None:
    """Any length, any alignment, any split into pieces."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    data = np.frombuffer(chance.randbytes(200_000), dtype=np.uint8).copy()
    for _ in range(60):
        begin = chance.randrange(64)
        size = chance.choice([0, 1, 7, 8, 1023, 4096, 12_288, 12_289, 100_000, chance.randrange(150_000)])
        address = data.ctypes.data + begin
        values = {engine.crc32c(address, size) for engine in ENGINES} | {_native.crc32c_portable(address, size)}
        cut = chance.randint(0, size)
        values.add(_native.crc32c(address + cut, size - cut, _native.crc32c(address, cut)))
        values.add(ENGINES[0].crc32c(address + cut, size - cut, ENGINES[0].crc32c(address, cut)))
        assert len(values) == 1


@pytest.mark.parametrize("engine", ENGINES, ids=["python", "native"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_copier_copies_every_piece_and_sums_every_block(engine: Engine, threads: int) -> None:
    """Pieces of any size and alignment, some of them in place already; the bytes around the image are untouched."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    source = np.frombuffer(chance.randbytes(4_000_000), dtype=np.uint8).copy()
    image = np.zeros(5_100_000, dtype=np.uint8)
    start = 4096 + chance.randrange(64)
    pieces, expected, at = [], b"", start
    while at < 3_500_000:
        size = chance.choice([0, 1, 5, 4096, 40_000, 70_000, 1_500_000])
        begin = chance.randrange(len(source) - size)
        there = chance.random() < 0.2
        pieces.append((at, 0 if there else source.ctypes.data + begin, size, chance.random() < 0.3))
        if there:
            image[at : at + size] = source[begin : begin + size]
        expected += source[begin : begin + size].tobytes()
        at += size
    copier = engine.Copier(pieces, start, at, threads)
    for all_now in (False, True):
        for piece in pieces:
            if piece[1]:
                image[piece[0] : piece[0] + piece[2]] = 0
        copier.start(image.ctypes.data, all_now)
        copier.wait()
        assert not copier.running()
        assert image[start:at].tobytes() == expected
        sums = [checksum(expected[i : i + BLOCK]) for i in range(0, len(expected), BLOCK)]
        table = image[at : at + 4 * len(sums)].tobytes()
        assert table == b"".join(value.to_bytes(4, "little") for value in sums)
        assert not image[:start].any()
        assert not image[at + len(table) :].any()
    assert copier.changed() == []
    index = next(i for i, piece in enumerate(pieces) if piece[1] and piece[2] and not piece[3])
    for at, _, size, now in pieces:
        image[at] ^= int(size > 0 and (now or at == pieces[index][0]))
    assert copier.changed() == [index], "what was copied at once may have changed since"


@pytest.mark.parametrize("engine", ENGINES, ids=["python", "native"])
def test_pieces_with_holes_are_refused(engine: Engine) -> None:
    """A plan that would leave bytes unsummed is no plan."""
    for pieces in ([(10, 0, 5, True)], [(0, 0, 5, True), (6, 0, 4, True)], [(0, 0, 11, True)], [(0, 0, 9, True)]):
        with pytest.raises(ValueError, match=r"piece"):
            engine.Copier(pieces, 0, 10)


def test_a_copier_is_started_once_at_a_time() -> None:
    """A second start while a copy runs would tear the first."""
    source, image = np.ones(200 << 20, dtype=np.uint8), np.zeros((200 << 20) + 1000, dtype=np.uint8)
    copier = _native.Copier([(0, source.ctypes.data, 200 << 20, False)], 0, 200 << 20, 1)
    copier.start(image.ctypes.data)
    with pytest.raises(RuntimeError, match="running"):
        copier.start(image.ctypes.data)
    copier.wait()


@pytest.mark.parametrize("engine", ENGINES, ids=["python", "native"])
def test_words_are_published_and_retracted(engine: PythonEngine) -> None:
    """publish, observe and retract work on any 64-bit value."""
    word = ctypes.c_uint64(7)
    engine.publish(ctypes.addressof(word), (1 << 64) - 1)
    assert engine.observe(ctypes.addressof(word)) == (1 << 64) - 1
    engine.retract(ctypes.addressof(word))
    assert word.value == 0


def test_misaligned_words_are_refused() -> None:
    """A word that is not aligned cannot be stored atomically."""
    for address in (0, 12):
        with pytest.raises(ValueError, match="multiple of 8"):
            _native.publish(address, 1)


def test_the_extension_is_used_where_it_is_built() -> None:
    """`load` prefers it."""
    assert load() is _native


@pytest.mark.parametrize("engine", ENGINES, ids=["python", "native"])
def test_blocks_are_scattered_and_verified(engine: Engine) -> None:
    """Every segment stands at its target, what nobody wants nowhere, and a flipped bit is found in its block: from a
    source, from a file, and where the bytes stand at their targets already."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    image = np.frombuffer(chance.randbytes(2_600_000), dtype=np.uint8).copy()
    sums = [checksum(image[at : at + BLOCK].tobytes()) for at in range(0, len(image), BLOCK)]
    target = np.zeros(len(image) + 64, dtype=np.uint8)
    segments, places, at = [], [], 0
    while at < len(image):
        size = min(len(image) - at, chance.choice([0, 1, 5, 4096, 40_000, 70_000, 1_500_000]))
        wanted = chance.random() < 0.7
        segments.append((target.ctypes.data + at + 7 if wanted else 0, size))
        places.append((at, size, wanted))
        at += size
    assert engine.scatter(image.ctypes.data, segments, sums) == -1
    for at, size, wanted in places:
        there = target[at + 7 : at + 7 + size]
        assert np.array_equal(there, image[at : at + size]) if wanted else not there.any()
    with TemporaryFile() as file:
        file.write(b"before" + image.tobytes())
        file.flush()
        target[:] = 0
        assert engine.scatter_file(file.fileno(), 6, segments, sums) == -1
        for at, size, wanted in places:
            there = target[at + 7 : at + 7 + size]
            assert np.array_equal(there, image[at : at + size]) if wanted else not there.any()
        assert engine.scatter_file(file.fileno(), 5, segments, sums) == 0
        with pytest.raises(EOFError, match=f"byte {len(image) + 6}"):
            engine.scatter_file(file.fileno(), 7, segments, sums)
        with pytest.raises(ValueError, match="do not fill"):
            engine.scatter_file(file.fileno(), 6, segments, sums[:-1])
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        engine.scatter_file(-1, 6, segments, sums)
    assert raised.value.errno == errno.EBADF
    everything = [(image.ctypes.data + at, size) for at, size, _ in places]
    assert engine.scatter(0, everything, sums) == -1
    image[BLOCK + 12_345] ^= 4
    assert engine.scatter(image.ctypes.data, segments, sums) == 1
    assert engine.scatter(0, everything, sums) == 1
    with pytest.raises(ValueError, match="do not fill"):
        engine.scatter(image.ctypes.data, segments, sums[:-1])
    with pytest.raises(ValueError, match="stand nowhere"):
        engine.scatter(0, [(0, len(image))], sums)


def test_zeros_are_appended_by_algebra() -> None:
    """To any register, as many as a block has."""
    zeros = np.zeros(BLOCK, dtype=np.uint8)
    for size in (0, 1, 2, 3, 64, 4095, 4096, 12_345, BLOCK):
        for crc in (0, 1, 0xFFFFFFFF, 0xDEADBEEF):
            assert _native.crc32c_zeros(size, crc) == _native.crc32c_portable(zeros.ctypes.data, size, crc)


def random_rows(chance: random.Random, total: int) -> list[tuple[int, int, int, int]]:
    """Single and repeated, short and long, some of them neighbours, across the borders of blocks; never everything."""
    rows: list[tuple[int, int, int, int]] = []
    at = 0
    while True:
        at += chance.choice([0, 1, 100, 5000, 700_000])
        size = chance.choice([1, 3, 8, 511, 4096, 40_000, 1_500_000])
        stride = size + chance.choice([0, 1, 64, 3000])
        count = chance.choice([1, 1, 2, 50]) if size < 50_000 else 1
        end = at + stride * (count - 1) + size
        if end > total:
            if 0 < sum(size * count for _, size, _, count in rows) < total:
                return rows
            rows, at = [], 0
            continue
        rows.append((at, size, stride, count))
        at = end


@pytest.mark.parametrize("sender", ENGINES, ids=["python", "native"])
@pytest.mark.parametrize("receiver", ENGINES, ids=["python", "native"])
def test_gathered_rows_are_placed_and_their_blocks_verified(sender: Engine, receiver: Engine) -> None:
    """Every row stands at its target and nothing else does; a flipped bit is found in its block, whether it was flipped
    in a row or in a gap, before it was gathered or on the way; rows from another place are no such rows."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    total = 2 * BLOCK + chance.choice([1, 77_777, BLOCK])
    image = np.frombuffer(chance.randbytes(total + 1), dtype=np.uint8).copy()
    sums = [checksum(image[at : min(total, at + BLOCK)].tobytes()) for at in range(0, total, BLOCK)]
    rows = random_rows(chance, total)
    wanted = np.zeros(total, dtype=bool)
    for at, size, stride, count in rows:
        for index in range(count):
            wanted[at + index * stride :][:size] = True
    target = np.zeros(total + 64, dtype=np.uint8)
    places = [(*row, target.ctypes.data + 7 + row[0], row[2]) for row in rows]
    travelled = np.empty(int(wanted.sum()), dtype=np.uint8)

    def gathered(begin: int = 0) -> list[int]:
        return sender.gather_rows(image.ctypes.data + begin, total, rows, travelled.ctypes.data)

    def bad(gaps: list[int]) -> int:
        return receiver.scatter_rows(travelled.ctypes.data, total, places, gaps, sums)

    gaps = gathered()
    assert bad(gaps) == -1
    assert np.array_equal(target[7 : 7 + total], np.where(wanted, image[:total], 0))
    assert not target[:7].any()
    assert not target[7 + total :].any()
    for inside in (True, False):
        (where,) = np.nonzero(wanted == inside)
        at = int(chance.choice(where))
        image[at] ^= 16
        assert bad(gathered()) == at // BLOCK
        image[at] ^= 16
    gaps = gathered()
    travelled[0] ^= 1
    assert bad(gaps) == rows[0][0] // BLOCK
    assert bad(gathered(1)) == 0
    gaps = gathered()
    gaps[1] ^= 1 << 31
    assert bad(gaps) == 1


@pytest.mark.parametrize("engine", ENGINES, ids=["python", "native"])
@pytest.mark.parametrize("way", ["gathered", "in place", "file"])
def test_rows_stand_as_far_apart_as_is_wanted(engine: Engine, way: str, tmp_path: Path) -> None:
    """At their targets they may stand closer or wider than in the image; nothing between them is written."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    total = 2 * BLOCK + chance.choice([1, 77_777, BLOCK])
    image = np.frombuffer(chance.randbytes(total), dtype=np.uint8).copy()
    sums = [checksum(image[at : at + BLOCK].tobytes()) for at in range(0, total, BLOCK)]
    target, expected = np.zeros(4 * total, dtype=np.uint8), np.zeros(4 * total, dtype=np.uint8)
    places, at = [], 1
    for begin, size, stride, count in random_rows(chance, total):
        spread = size + chance.randrange(1 + min(stride, 2 * total // max(1, count * 8)))
        if at + spread * count > len(target):
            break
        places.append((begin, size, stride, count, target.ctypes.data + at, spread))
        for index in range(count):
            expected[at + index * spread :][:size] = image[begin + index * stride :][:size]
        at += spread * count + 3
    assert places

    def bad() -> int:
        if way == "in place":
            return engine.place_rows(image.ctypes.data, total, places, sums)
        if way == "file":
            (tmp_path / "image").write_bytes(b"before" + image.tobytes())
            with open(tmp_path / "image", "rb") as file:
                return engine.place_file_rows(file.fileno(), 6, total, places, sums)
        rows = [place[:4] for place in places]
        travelled = np.empty(sum(row[1] * row[3] for row in rows), dtype=np.uint8)
        gaps = engine.gather_rows(image.ctypes.data, total, rows, travelled.ctypes.data)
        return engine.scatter_rows(travelled.ctypes.data, total, places, gaps, sums)

    assert bad() == -1
    assert np.array_equal(target, expected)
    where = chance.randrange(total)
    image[where] ^= 2
    assert bad() == where // BLOCK
    if way == "file":
        with open(tmp_path / "image", "rb") as file, pytest.raises(EOFError, match=f"byte {total + 6}"):
            engine.place_file_rows(file.fileno(), 7, total, places, sums)


@pytest.mark.parametrize("engine", ENGINES, ids=["python", "native"])
def test_rows_outside_of_their_blocks_are_refused(engine: Engine) -> None:
    """Before anything is read or written."""
    source, target = np.zeros(100, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
    high = (1 << 64) - 1
    for rows in (
        [(0, 0, 1, 1)],
        [(0, 1, 1, 0)],
        [(99, 2, 2, 1)],
        [(101, 1, 1, 1)],
        [(0, 10, 9, 2)],
        [(0, 10, 46, 3)],
        [(50, 10, 10, 1), (40, 10, 10, 1)],
        [(0, 10, 20, 2), (29, 1, 1, 1)],
    ):
        with pytest.raises(ValueError, match="in order within"):
            engine.gather_rows(source.ctypes.data, 100, rows, target.ctypes.data)
        places = [(*row, target.ctypes.data, max(row[1:3])) for row in rows]
        with pytest.raises(ValueError, match="in order within"):
            engine.scatter_rows(source.ctypes.data, 100, places, [0], [0])
        with pytest.raises(ValueError, match="in order within"):
            engine.place_rows(source.ctypes.data, 100, places, [0])
    with pytest.raises(ValueError, match="not those of the blocks"):
        engine.scatter_rows(source.ctypes.data, 100, [], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="not those of the blocks"):
        engine.place_rows(source.ctypes.data, 100, [], [0, 0])
    upon = [(0, 10, 20, 2, target.ctypes.data, 9)]
    with pytest.raises(ValueError, match="on top of each other"):
        engine.place_rows(source.ctypes.data, 100, upon, [0])
    with pytest.raises(ValueError, match="on top of each other"):
        engine.scatter_rows(source.ctypes.data, 100, upon, [0], [0])
    if engine is _native:
        for rows in ([(high, 2, 2, 1)], [(1, high, high, 1)], [(0, 1, high, 2)], [(0, 1, 2, high)], [(1, 1, high, 3)]):
            with pytest.raises(ValueError, match="in order within"):
                engine.gather_rows(source.ctypes.data, 100, rows, target.ctypes.data)


@pytest.mark.parametrize("engine", ENGINES, ids=["python", "native"])
def test_a_lost_buffer_is_the_parity_of_those_that_are_left(engine: Engine) -> None:
    """Any length and alignment; the bytes around the target are untouched."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    for size in (0, 1, 63, 64, 65, 100_000, chance.randrange(100_000)):
        parts = [np.frombuffer(chance.randbytes(size + 16), dtype=np.uint8).copy() for _ in range(4)]
        begins = [chance.randrange(8) for _ in parts]
        parity = np.zeros(size + 16, dtype=np.uint8)
        for part, begin in zip(parts[1:], begins[1:], strict=True):
            engine.xor_into(parity.ctypes.data + 5, part.ctypes.data + begin, size)
        assert not parity[:5].any()
        assert not parity[5 + size :].any()
        expected = np.zeros(size, dtype=np.uint8)
        for part, begin in zip(parts[1:], begins[1:], strict=True):
            expected ^= part[begin : begin + size]
        assert np.array_equal(parity[5 : 5 + size], expected)
