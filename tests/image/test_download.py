"""Pieces on a CUDA device, copied by the native engine: on a fake driver, whose streams are as asynchronous as real ones."""

from __future__ import annotations

import gc
import mmap
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from resilient_train import _native
from resilient_train.image.native import checksum
from resilient_train.spec.shard import BLOCK

START = 4096 + 24


@dataclass
class Plan:
    """An image's pieces on host and device, and what the image must hold."""

    cuda: Any
    pieces: list[tuple[int, int, int, bool]] = field(default_factory=list)
    remote: list[int] = field(default_factory=list)
    sources: list[np.ndarray] = field(default_factory=list)
    expected: bytes = b""

    def add(self, data: bytes, *, remote: bool = True, now: bool = False) -> np.ndarray:
        source = self.cuda.memory(data) if remote else np.frombuffer(data, dtype=np.uint8).copy()
        if remote:
            self.remote.append(len(self.pieces))
        self.pieces.append((START + len(self.expected), source.ctypes.data, len(data), now))
        self.sources.append(source)
        self.expected += data
        return source

    @property
    def end(self) -> int:
        return START + len(self.expected)

    @property
    def blocks(self) -> int:
        return -(-len(self.expected) // BLOCK)

    def copier(self, device: _native.Device, threads: int = 2) -> _native.Copier:
        return _native.Copier(self.pieces, START, self.end, threads, device, self.remote)


class Image:
    """Mapped memory for an image, page-locked if it is asked for."""

    def __init__(self, plan: Plan, device: _native.Device | None = None) -> None:
        self._plan = plan
        self.size = -(-(plan.end + 4 * plan.blocks) // 4096) * 4096
        self.map = mmap.mmap(-1, self.size)
        self.array = np.frombuffer(self.map, dtype=np.uint8)
        self.address = self.array.ctypes.data
        self._device = device
        if device is not None:
            device.lock(self.address, self.size)

    def check(self, expected: bytes | None = None) -> None:
        """The bytes, and the checksum of every block, are those of the sources."""
        expected = self._plan.expected if expected is None else expected
        assert self.array[START : self._plan.end].tobytes() == expected
        sums = [checksum(expected[i : i + BLOCK]) for i in range(0, len(expected), BLOCK)]
        table = self.array[self._plan.end : self._plan.end + 4 * len(sums)].tobytes()
        assert table == b"".join(value.to_bytes(4, "little") for value in sums)
        assert not self.array[:START].any()

    def close(self) -> None:
        if self._device is not None:
            self._device.unlock(self.address)


@pytest.fixture
def chance() -> random.Random:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


def mixed(cuda: Any, chance: random.Random, size: int = 24_000_000) -> Plan:
    """Pieces of all sizes on both sides, lazy or not."""
    plan = Plan(cuda)
    data = chance.randbytes(3_000_000)
    while len(plan.expected) < size:
        length = chance.choice([0, 1, 5, 16, 4096, 40_000, 65_536, 70_000, 1_500_000, 2_900_000])
        begin = chance.randrange(len(data) - length)
        plan.add(data[begin : begin + length], remote=chance.random() < 0.7, now=chance.random() < 0.3)
    return plan


@pytest.mark.parametrize("version", [12000, 12080, 13000], ids=["one by one", "batch of 12.8", "batch of 13.0"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "ring"])
def test_images_are_the_same_as_copied_by_the_host(
    cuda: Any, chance: random.Random, version: int, kernels: bool, locked: bool
) -> None:
    """Whatever the driver can do: host and device pieces of any size, and the checksum of every block."""
    cuda.reset(version, addresses=version != 12080)
    device = cuda.device(kernels=kernels)
    plan = mixed(cuda, chance)
    image = Image(plan, device if locked else None)
    stream = cuda.stream()
    copier = plan.copier(device, threads=chance.choice([1, 3]))
    for all_now in (False, True, False):
        image.array[:] = 0
        copier.start(image.address, all_now, stream)
        copier.fence(stream)
        copier.wait()
        image.check()
        assert copier.changed() == []
    assert (cuda.calls("cuMemcpyBatchAsync") > 0) == (version > 12000)
    assert (cuda.calls("cuLaunchKernel") > 0) == kernels
    image.close()
    del copier
