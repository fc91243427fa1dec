"""The engines: the extension, its table-driven twin and the Python fallback give the same results."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest

from resilient_train import _native
from resilient_train.image.native import PythonEngine, checksum, crc32c_numpy, load

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
def test_copy_copies_and_sums(engine: PythonEngine) -> None:
    """The copy is exact, the bytes around it untouched, the sum that of the source."""
    source = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8)
    target = np.zeros(300_003, dtype=np.uint8)
    crc = engine.copy_crc32c(target.ctypes.data + 1, source.ctypes.data, len(source))
    assert (target[1:-1] == source).all()
    assert target[0] == target[-1] == 0
    assert crc == checksum(source.tobytes())


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
