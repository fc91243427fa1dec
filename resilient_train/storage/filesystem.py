"""A durable tier at any fsspec URL.

On local disks a file is written beside its place, flushed to the device and renamed, and the folder is flushed too.
Object stores show an object only when its upload is complete, which is the same promise.
"""

from __future__ import annotations

import contextlib
import glob
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from resilient_train.errors import CheckpointDamaged, StorageError
from resilient_train.storage import s3
from resilient_train.storage.commit import MANIFEST
from resilient_train.storage.retrying import RetryingTier
from resilient_train.storage.tier import Chunk, Tier

_PART = 16 << 20
"""Bytes held back for one part of a multipart upload."""


class FilesystemTier:
    """A `Tier` over fsspec."""

    def __init__(self, url: str) -> None:
        """Args:
            url: ``file:///data/run-1``, a plain path, ``s3://bucket/run-1``, whatever fsspec has a backend for.

        Raises:
            StorageError: if the URL's backend is unknown or not installed.
        """
        self.name = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **s3.options(fsspec.utils.get_protocol(url)))
        except ImportError as error:
            extra = " (pip install 'resilient-train[s3]')" if url.startswith("s3") else ""
            raise StorageError(f"{url}: {error}{extra}") from error
        except (ValueError, OSError) as error:
            raise StorageError(f"{url}: {error}") from error
        self._root = self._root.rstrip("/") or "/"
        self.local = isinstance(self._fs, LocalFileSystem)
        """Whether the place is on a disk of this machine."""
        if not self.local:
            # Listings must show what other processes just wrote.
            self._fs.use_listings_cache = False

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{self.name}: {what}: the file is missing") from error
        except Exception as error:  # Every backend raises its own errors; this is the edge where they become ours.
            raise StorageError(f"{self.name}: {what}: {type(error).__name__}: {error}") from error

    def folders(self) -> dict[str, set[str]]:
        with self._mapped("cannot list"):
            self._fs.invalidate_cache(self._root)
            if not self._fs.exists(self._root):
                return {}
            found: dict[str, set[str]] = {}
            for entry in self._fs.ls(self._root, detail=True):
                if entry["type"] == "directory":
                    name = _last(entry["name"])
                    self._fs.invalidate_cache(entry["name"])
                    try:
                        found[name] = {_last(file) for file in self._fs.ls(entry["name"], detail=False)}
                    except FileNotFoundError:
                        continue  # Another process's retention was faster.
            return found

    def size(self, path: str) -> int:
        with self._mapped(path):
            return int(self._fs.size(self._path(path)))

    def read(self, path: str, offset: int, length: int) -> bytes:
        with self._mapped(path):
            data: Any = self._fs.cat_file(self._path(path), start=offset, end=offset + length) if length else b""
        if len(data) != length:
            raise CheckpointDamaged(
                f"{self.name}: {path}: truncated, {length} bytes asked for at byte {offset}, {len(data)} are there"
            )
        return bytes(data)

    def put(self, path: str, chunks: Iterable[Chunk]) -> int:
        target = self._path(path)
        with self._mapped(path):
            if self.local:
                return _put_local(target, chunks)
            return self._put_object(target, chunks)

    def _put_object(self, target: str, chunks: Iterable[Chunk]) -> int:
        # What fsspec's transactions do, file by file: a transaction belongs to all threads that share a file system.
        # Without it, closing a file after an error would publish what was written of it.
        file: Any = self._fs._open(target, mode="wb", block_size=_PART, autocommit=False)
        written, complete = 0, False
        try:
            with file:
                for chunk in chunks:
                    file.write(chunk)
                    written += len(chunk)
            complete = True
        finally:
            if complete:
                file.commit()
            else:
                file.discard()
                # Some backends (memory://) show a file from its first byte on.
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(target)
        return written

    def delete(self, folder: str) -> None:
        with self._mapped(folder):
            try:
                # The manifest first: a half-deleted checkpoint must not look like one.
                self._fs.rm_file(self._path(f"{folder}/{MANIFEST}"))
            except FileNotFoundError:
                pass
            try:
                self._fs.rm(self._path(folder), recursive=True)
            except FileNotFoundError:
                pass

    def check_writable(self) -> None:
        probe = f".probe-{uuid.uuid4().hex}"
        with self._mapped("cannot be written"):
            if self.local:
                # Object stores have no folders; s3fs would make a bucket that nobody asked for.
                self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(self._path(probe), b"resilient_train")
            self._fs.rm_file(self._path(probe))


def open_tier(url: str) -> Tier:
    """The tier at a URL; one behind a network tries again what is refused.

    Raises:
        StorageError: if the URL's backend is unknown or not installed.
    """
    tier = FilesystemTier(url)
    return tier if tier.local else RetryingTier(tier)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _put_local(target: str, chunks: Iterable[Chunk]) -> int:
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    written = 0
    try:
        with open(temporary, "wb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk)
                while len(view):
                    done = file.write(view)
                    view = view[done:]
                    written += done
            os.fsync(file.fileno())
        os.replace(temporary, target)
        for begun in glob.glob(f"{glob.escape(target)}.*.tmp"):
            # By a keeper that was killed.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(begun)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
    for directory in (folder, os.path.dirname(folder)):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return written
