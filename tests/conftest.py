"""A CUDA driver without CUDA, for the tests of the engine's device half: see `tests/image/fake_cuda.cpp`."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from resilient_train import _native

SOURCE = Path(__file__).parent / "image" / "fake_cuda.cpp"


class FakeCuda:
    """The controls of the fake driver, and computing streams on it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.fake_stream.restype = ctypes.c_void_p
        self._kept: list[np.ndarray] = []
        self._streams: list[int] = []

    def device(self, *, kernels: bool = True) -> _native.Device:
        """A device of this driver; its kernels are the source's, run on the host."""
        return _native.Device(0, self.path, b"fake" if kernels else b"")

    def reset(self, version: int = 13000, *, addresses: bool = True) -> None:
        """Forget everything asked for; ``version`` of CUDA, with or without cuGetProcAddress."""
        self._library.fake_reset(version, int(addresses))

    def fail(self, name: str, nth: int = 1, status: int = 2, times: int = 1) -> None:
        """Have call ``nth`` of ``name`` and the following report ``status`` (2: out of memory)."""
        self._library.fake_fail(name.encode(), nth, status, times)

    def delay(self, seconds: float) -> None:
        """Time that every copy takes."""
        self._library.fake_delay(int(seconds * 1e6))

    def calls(self, name: str) -> int:
        """How often ``name`` was called."""
        return int(self._library.fake_calls(name.encode()))

    def alive(self) -> int:
        """Objects, allocations and registrations that were made and not given back."""
        return int(self._library.fake_alive())

    def registered(self) -> int:
        """Page-locked ranges."""
        return int(self._library.fake_registered())

    def misuse(self) -> str:
        """What real CUDA would not have put up with."""
        text = ctypes.create_string_buffer(200)
        self._library.fake_misuse(text, 200)
        return text.value.decode()

    def memory(self, data: bytes | int) -> np.ndarray:
        """Memory of the device: so many bytes, or these."""
        array = np.zeros(data, dtype=np.uint8) if isinstance(data, int) else np.frombuffer(data, dtype=np.uint8).copy()
        self.claim(array.ctypes.data, len(array))
        self._kept.append(array)
        return array

    def claim(self, address: int, size: int) -> None:
        """Count memory as the device's."""
        self._library.fake_device_memory(ctypes.c_void_p(address), ctypes.c_size_t(size))

    def stream(self) -> int:
        """A stream to compute on."""
        self._streams.append(self._library.fake_stream())
        return self._streams[-1]

    def compute(self, stream: int, target: np.ndarray, byte: int, seconds: float = 0.0) -> None:
        """Have ``stream`` work for a while and then fill ``target``."""
        self._library.fake_compute(
            ctypes.c_void_p(stream),
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_size_t(target.nbytes),
            byte,
            int(seconds * 1e6),
        )

    def finish(self, stream: int) -> None:
        """Wait until the stream has nothing to do."""
        self._library.fake_stream_wait(ctypes.c_void_p(stream))

    def close(self) -> None:
        """Give back what the test made."""
        for stream in self._streams:
            self._library.fake_stream_wait(ctypes.c_void_p(stream))
            self._library.fake_stream_free(ctypes.c_void_p(stream))
        for array in self._kept:
            self.claim(array.ctypes.data, 0)
        self._streams, self._kept = [], []


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fake driver, compiled."""
    path = tmp_path_factory.mktemp("fake") / "libcuda_fake.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path)], check=True)
    return str(path)


@pytest.fixture
def cuda(fake_library: str) -> Iterator[FakeCuda]:
    """The fake driver as new; at the end nothing is left of what the test made, and nothing was misused."""
    fake = FakeCuda(fake_library)
    fake.reset()
    before = fake.alive()
    yield fake
    fake.close()
    assert fake.misuse() == ""
    assert fake.alive() == before, "something was not given back to the driver"
