"""Pieces on a CUDA device, copied by the native engine: on a fake driver with really asynchronous streams."""

from __future__ import annotations

import mmap
import random
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
    """Pieces of all sizes on both sides, lazy or not; at least two that a driver copies in one batch."""
    plan = Plan(cuda)
    data = chance.randbytes(3_000_000)
    for _ in range(2):
        plan.add(data[:70_000])
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


def test_a_driver_that_refuses_batches_copies_one_by_one(cuda: Any, chance: random.Random) -> None:
    """It is asked once."""
    cuda.fail("cuMemcpyBatchAsync", status=801, times=1000)
    device, stream, plan = cuda.device(), cuda.stream(), mixed(cuda, chance, 30_000_000)
    image = Image(plan, device)
    copier = plan.copier(device)
    copier.start(image.address, False, stream)
    copier.wait()
    image.check()
    assert cuda.calls("cuMemcpyBatchAsync") == 1
    image.close()


def lazies(cuda: Any, count: int = 6, size: int = 400_000) -> Plan:
    """Large pieces on the device, of ones."""
    plan = Plan(cuda)
    for _ in range(count):
        plan.add(b"\1" * size)
    return plan


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "ring"])
@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "not fenced"])
def test_a_fence_keeps_the_computation_from_what_is_still_read(cuda: Any, locked: bool, fenced: bool) -> None:
    """Copies are slow, the optimizer's stream is fast: only the fence keeps the old bytes in the image."""
    device, stream = cuda.device(), cuda.stream()
    plan = lazies(cuda)
    image = Image(plan, device if locked else None)
    copier = plan.copier(device)
    cuda.delay(0.01)
    copier.start(image.address, False, stream)
    if fenced:
        copier.fence(stream)
    for source in plan.sources:
        cuda.compute(stream, source, 2)
    copier.wait()
    if fenced:
        image.check()
    else:
        assert image.array[START : plan.end].max() == 2, "without a fence this test would find torn images"
    cuda.finish(stream)
    assert all(source.min() == 2 for source in plan.sources)
    image.close()


def test_the_copy_begins_behind_the_work_that_was_given_before(cuda: Any) -> None:
    """The host is far ahead of the device: the image holds what the device computes before the boundary, no less."""
    device, stream = cuda.device(), cuda.stream()
    plan = lazies(cuda)
    plan.add(b"\1" * 100)
    plan.add(b"\1" * 100, now=True)
    image = Image(plan, device)
    copier = plan.copier(device)
    for source in plan.sources:
        cuda.compute(stream, source, 7, 0.03)
    copier.start(image.address, False, stream)
    copier.fence(stream)
    assert copier.running(), "neither start nor fence has waited for the device"
    for source in plan.sources:
        cuda.compute(stream, source, 9)
    copier.wait()
    image.check(b"\7" * len(plan.expected))
    image.close()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "ring"])
def test_what_is_wanted_as_it_is_may_change_at_once(cuda: Any, kernels: bool, locked: bool) -> None:
    """Small and large, packed or (beyond 64 MiB) not: no fence is needed for pieces marked so."""
    device, stream = cuda.device(kernels=kernels), cuda.stream()
    plan = Plan(cuda)
    small = [plan.add(b"\1" * size, now=True) for size in (4, 5000, 70_000)]
    lazy = plan.add(b"\1" * 300_000)
    large = [plan.add(b"\1" * (40 << 20), now=True) for _ in range(2)]
    image = Image(plan, device if locked else None)
    copier = plan.copier(device)
    cuda.delay(0.005)
    copier.start(image.address, False, stream)
    for source in [*small, *large]:
        cuda.compute(stream, source, 2)
    copier.fence(stream)
    cuda.compute(stream, lazy, 2)
    copier.wait()
    image.check()
    image.close()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
def test_an_audit_finds_what_changed_before_the_fence(cuda: Any, kernels: bool) -> None:
    """By fingerprints, or by copying back; pieces of the host by comparing. Later changes are none of its business."""
    device, stream = cuda.device(kernels=kernels), cuda.stream()
    plan = Plan(cuda)
    same, small = plan.add(b"\1" * 100_001), plan.add(b"\1" * 77)
    here = plan.add(b"\1" * 100_000, remote=False)
    large, now = plan.add(b"\1" * 3_000_001), plan.add(b"\1" * 100, now=True)
    image = Image(plan, device)
    copier = plan.copier(device)
    for touched in ([], [1], [3], [1, 3], [4]):
        copier.start(image.address, True, stream)
        for index in touched:
            source = plan.sources[index]
            cuda.compute(stream, source[-1:], 2, 0.01)
        if touched == [4]:
            copier.wait()
            here[5] = 9
        copier.fence(stream)
        cuda.compute(stream, same, 3)
        copier.wait()
        image.check()
        found = copier.changed()
        assert sorted(found) == ([2] if touched == [4] else touched)
        cuda.finish(stream)
        for source in (same, small, here, large, now):
            source[:] = 1
    copier.start(image.address, False, stream)
    cuda.compute(stream, large, 5)
    copier.fence(stream)
    copier.wait()
    assert copier.changed() == [], "only audits look"
    image.close()


def test_small_pieces_leave_the_device_together(cuda: Any, chance: random.Random) -> None:
    """500 of them: one launch, one copy, a handful of calls from the thread that computes."""
    device, stream = cuda.device(), cuda.stream()
    plan = Plan(cuda)
    for _ in range(500):
        plan.add(chance.randbytes(chance.randrange(1, 9000)), now=chance.random() < 0.5)
    image = Image(plan, device)
    copier = plan.copier(device)
    cuda.reset()
    copier.start(image.address, False, stream)
    copier.fence(stream)
    copier.wait()
    image.check()
    assert cuda.calls("cuLaunchKernel") == 1
    assert cuda.calls("cuMemcpyDtoHAsync") == 1
    assert cuda.calls("cuMemcpyBatchAsync") == 0
    assert cuda.calls("cuEventRecord") < 10
    image.close()


def mix(x: int) -> int:
    for _ in range(2):
        x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 % (1 << 64)
    return x ^ x >> 32


def fingerprint(data: bytes) -> int:
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum(mix(word ^ (i + 1) * 0x9E3779B97F4A7C15 % (1 << 64)) for i, word in enumerate(words)) % (1 << 64)


def test_fingerprints_are_those_of_the_definition(cuda: Any, chance: random.Random) -> None:
    """For any length and alignment, over several tiles, many tensors in one launch; order and every bit matter."""
    device, stream = cuda.device(), cuda.stream()
    data = chance.randbytes(2_200_000)
    memory = cuda.memory(b"-" * 16 + data + b"-" * 16)
    base = memory.ctypes.data
    sizes = [0, 1, 7, 8, 9, 4096, 2047 * 8 + 3, 1_048_575, 2_100_001]
    ranges = [(begin, size) for size in sizes for begin in (0, 1, 4, 8)][:-3]
    taken = device.fingerprints([(base + 16 + begin, size) for begin, size in ranges], stream)
    assert taken == [fingerprint(data[begin : begin + size]) for begin, size in ranges]
    (before,) = device.fingerprints([(base, memory.nbytes)], stream)
    for _ in range(5):
        at, bit = chance.randrange(memory.nbytes), 1 << chance.randrange(8)
        memory[at] ^= bit
        assert device.fingerprints([(base, memory.nbytes)], stream) != [before]
        memory[at] ^= bit
    memory[16:24], memory[24:32] = memory[24:32].copy(), memory[16:24].copy()
    assert device.fingerprints([(base, memory.nbytes)], stream) != [before]


def test_uploads_wait_for_the_targets_and_arrive(cuda: Any, chance: random.Random) -> None:
    """From any memory, page-locked or not; a kernel that still writes the target cannot undo it."""
    device, stream = cuda.device(), cuda.stream()
    locked = Image(Plan(cuda, expected=bytes(3_000_000)), device)
    locked.array[:] = np.frombuffer(chance.randbytes(locked.size), dtype=np.uint8)
    sources = [np.frombuffer(chance.randbytes(size), dtype=np.uint8) for size in (1, 100, 9_000_000, 4 << 20, 12_345)]
    sources.append(locked.array[5:2_000_000])
    targets = [cuda.memory(source.nbytes) for source in sources]
    for target in targets:
        cuda.compute(stream, target, 3, 0.02)
    copies = [(t.ctypes.data, s.ctypes.data, s.nbytes) for s, t in zip(sources, targets, strict=True)]
    upload = device.upload(copies, stream, 3)
    upload.wait()
    for source, target in zip(sources, targets, strict=True):
        assert np.array_equal(source, target)
    device.upload([], stream).wait()
    locked.close()


def scenario(cuda: Any, *, locked: bool, kernels: bool, upto: Any = None) -> bool:
    """Everything that the engine does with a device, once; whether it had kernels."""
    device, stream = cuda.device(kernels=kernels), cuda.stream()
    plan = Plan(cuda)
    for size in (100, 3_000_000, 70_000, 9_000_000):
        plan.add(b"\1" * size)
        plan.add(b"\1" * 1000, now=True)
    image = Image(plan, device if locked else None)
    try:
        copier = plan.copier(device)
        for all_now in (True, False):
            copier.start(image.address, all_now, stream)
            try:
                copier.fence(stream)
            finally:
                copier.wait()
            copier.changed()
            image.check()
        device.upload([(plan.sources[2].ctypes.data, plan.sources[6].ctypes.data, 3_000_000)], stream).wait()
    finally:
        image.close()
    if upto is not None:
        upto()
    return bool(device.has_kernels)


CALLS = [
    "cuInit",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuMemHostRegister",
    "cuMemHostAlloc",
    "cuMemAlloc",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuMemcpyDtoDAsync",
    "cuMemsetD8Async",
    "cuMemcpyBatchAsync",
    "cuModuleGetFunction",
    "cuLaunchKernel",
]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "ring"])
def test_every_failure_names_the_call_and_leaves_nothing_behind(cuda: Any, locked: bool, kernels: bool) -> None:
    """Whichever call fails, at its first, a middle or its last time: an error, and nothing leaked, locked or hung."""
    counts: dict[str, int] = {}
    scenario(cuda, locked=locked, kernels=kernels, upto=lambda: counts.update({n: cuda.calls(n) for n in CALLS}))
    alive = cuda.alive()
    failed = 0
    for name in CALLS:
        for nth in sorted({1, counts[name] // 2, counts[name]} - {0}) if counts[name] else []:
            cuda.reset()
            cuda.fail(name, nth)
            try:
                went_without = scenario(cuda, locked=locked, kernels=kernels) != kernels
            except _native.CudaError as error:
                said = str(error)
                failed += 1
            else:
                # Destructors wait too, and have nobody to tell; threads may ask for an event once less than before.
                silent = name in ("cuStreamSynchronize", "cuEventSynchronize") or cuda.calls(name) < nth
                assert went_without or silent, f"call {nth} of {name} failed, and nobody said so"
                said = f"{name}: CUDA_ERROR_OUT_OF_MEMORY ("
            assert said.startswith(f"{name}: CUDA_ERROR_OUT_OF_MEMORY (")
            assert cuda.alive() == alive, f"call {nth} of {name}"
            assert cuda.registered() == 0
    assert failed > 30


def test_without_usable_kernels_the_engine_says_why(cuda: Any) -> None:
    """A device for which nothing was compiled, or a driver that is too old."""
    assert cuda.device().has_kernels
    cuda.fail("cuModuleLoadData", 1, 209)
    device = cuda.device()
    assert not device.has_kernels
    assert "cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU" in device.why_no_kernels
    with pytest.raises(_native.CudaError, match="NO_BINARY"):
        device.fingerprints([], 0)


def test_no_driver_and_no_device_are_errors(cuda: Any, tmp_path: Any) -> None:
    """They name what is missing."""
    with pytest.raises(_native.CudaError, match=r"no CUDA driver: .*nothing\.so"):
        _native.Device(0, str(tmp_path / "nothing.so"))
    with pytest.raises(_native.CudaError, match="cuDeviceGet: CUDA_ERROR_NO_DEVICE"):
        _native.Device(1, cuda.path)
    with pytest.raises(_native.CudaError, match="has no cuGetErrorName"):
        _native.Device(0, "libm.so.6")
    with pytest.raises(ValueError, match="remote"):
        _native.Copier([(0, 8, 5, True)], 0, 5, 1, None, [0])


def test_page_locks_belong_to_the_device(cuda: Any) -> None:
    """Locked once, found again inside, unlocked once; what is left is unlocked with the device."""
    device = cuda.device()
    first, second = Image(Plan(cuda, expected=bytes(10_000)), device), Image(Plan(cuda, expected=bytes(10_000)), device)
    device.lock(first.address, first.size)
    assert cuda.calls("cuMemHostRegister") == 2
    assert device.locked(first.address + 100, first.size - 100)
    assert not device.locked(first.address + 100, first.size)
    first.close()
    first.close()
    assert not device.locked(first.address, 1)
    assert cuda.registered() == 1
    del first._device, second._device, device
    assert cuda.registered() == 0
