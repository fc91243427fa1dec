"""Files on this machine's disks, written past the page cache.

A checkpoint's bytes are read by nobody soon.  Written through the page cache they cost a copy and push out what the
training's data loaders need; written directly they cost the processor next to nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import mmap
import os
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from resilient_train.storage.commit import IMAGE_SUFFIX
from resilient_train.storage.tier import Chunk

_ALIGNED = 4096
"""What direct writes must be multiples of: addresses, places and lengths."""
_BOUNCE = 8 << 20
"""Bytes that are gathered before they are written where a chunk's memory is not aligned."""
_AT_ONCE = 4
"""Writes of one file that are on their way at the same time."""


def write_file(target: str, chunks: Iterable[Chunk]) -> int:
    """Write a file that appears whole or not at all and is on the device when this returns; its length.

    Raises:
        OSError: as the system says it; nothing is left of the file.
    """
    folder = os.path.dirname(target)
    make_folder(folder)
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with _DirectFile(temporary) as file:
            for chunk in chunks:
                file.write(memoryview(chunk).cast("B"))
            written = file.finish()
        os.replace(temporary, target)
        if target.endswith(IMAGE_SUFFIX):
            # One keeper alone writes an image; what it had begun before it was killed is of no use.
            for begun in glob.glob(f"{glob.escape(target)}.*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(begun)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
    for directory in (folder, os.path.dirname(folder)):
        _sync(directory)
    return written


def make_folder(folder: str) -> None:
    """Make a folder and those around it that are missing; when this returns they are on the device.

    Raises:
        OSError: as the system says it.
    """
    if not folder or os.path.isdir(folder):
        return
    around = os.path.dirname(folder)
    make_folder(around)
    os.makedirs(folder, exist_ok=True)
    _sync(around)


def _sync(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _DirectFile:
    """A new file, written from front to back by several threads, past the page cache where the file system takes it."""

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._handle = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems have only the page cache; the file may be there already.
            self._handle = os.open(path, flags & ~os.O_EXCL, 0o666)
        self._pool = ThreadPoolExecutor(_AT_ONCE, "write")
        self._running: list[Future[None]] = []
        self._at = 0
        # One more than are on their way, so that the next one is never being written.
        self._bounces = itertools.cycle([memoryview(mmap.mmap(-1, _BOUNCE)) for _ in range(_AT_ONCE + 1)])
        self._bounce = next(self._bounces)
        self._filled = 0

    def __enter__(self) -> _DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        os.close(self._handle)

    def write(self, chunk: memoryview) -> None:
        """Add bytes; they must stay as they are until `finish`."""
        while len(chunk):
            if self._filled == 0 and len(chunk) >= _ALIGNED and _address(chunk) % _ALIGNED == 0:
                size = len(chunk) // _ALIGNED * _ALIGNED
                self._submit(chunk[:size])
            else:
                size = min(len(chunk), _BOUNCE - self._filled)
                self._bounce[self._filled : self._filled + size] = chunk[:size]
                self._filled += size
                if self._filled == _BOUNCE:
                    self._submit(self._bounce)
                    self._bounce = next(self._bounces)
                    self._filled = 0
            chunk = chunk[size:]

    def finish(self) -> int:
        """Wait until everything is on the device; the file's length."""
        length = self._at + self._filled
        if self._filled:
            padded = -(-self._filled // _ALIGNED) * _ALIGNED
            self._submit(self._bounce[:padded])
        self._settle(0)
        os.ftruncate(self._handle, length)
        os.fsync(self._handle)
        return length

    def _submit(self, data: memoryview) -> None:
        self._settle(_AT_ONCE - 1)
        self._running.append(self._pool.submit(self._put, data, self._at))
        self._at += len(data)

    def _settle(self, most: int) -> None:
        while len(self._running) > most:
            self._running.pop(0).result()

    def _put(self, data: memoryview, at: int) -> None:
        while len(data):
            try:
                count = os.pwrite(self._handle, data, at)
            except OSError as error:
                flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise
                # It wants a larger alignment than anybody's.
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                continue
            data, at = data[count:], at + count


def _address(chunk: memoryview) -> int:
    return int(np.frombuffer(chunk, dtype=np.uint8).ctypes.data)
