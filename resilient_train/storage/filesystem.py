"""A durable tier at any fsspec URL.

On local disks (`resilient_train.storage.local`) a file is written beside its place, flushed to the device and renamed.
Object stores show an object only when its upload is complete, which is the same promise.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from resilient_train.errors import CheckpointDamaged, StorageError, StorageUnusable
from resilient_train.storage import multipart, s3
from resilient_train.storage.commit import MANIFEST
from resilient_train.storage.local import make_folder, write_file
from resilient_train.storage.retrying import RetryingTier
from resilient_train.storage.tier import Chunk, Tier

_SETTINGS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
"""Errors of backends that do not go away by themselves."""
_PART = 16 << 20
"""Bytes held back for one part of a multipart upload, where this is left to fsspec."""


class FilesystemTier:
    """A `Tier` over fsspec."""

    def __init__(self, url: str) -> None:
        """Args:
            url: ``file:///data/run-1``, a plain path, ``s3://bucket/run-1``, whatever fsspec has a backend for.

        Raises:
            StorageError: if the URL's backend is unknown or not installed.
        """
        self.name = url
        if re.match(r"(file|local)://[^/.~]", url):
            # fsspec would take it for a path that begins in the current folder.
            raise StorageError(f"{url} names a host; a place on this machine is file:///{url.partition('://')[2]}")
        try:
            protocol = fsspec.utils.get_protocol(url)
            self._fs, self._root = fsspec.core.url_to_fs(url, **s3.options(protocol))
        except ImportError as error:
            extra = " (pip install 'resilient-train[s3]')" if url.startswith("s3") else ""
            raise StorageError(f"{url}: {error}{extra}") from error
        except (ValueError, OSError) as error:
            raise StorageError(f"{url}: {error}") from error
        self._root = self._root.rstrip("/") or "/"
        self.local = isinstance(self._fs, LocalFileSystem)
        self._in_parts = protocol in s3.PROTOCOLS
        if not self.local:
            # Listings must show what other processes just wrote.
            self._fs.dircache.use_listings_cache = False
            self._fs.dircache.clear()

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _file(self, path: str) -> str:
        """The same of what is about to be read: on a disk no folder, and no pipe that would never end.

        Raises:
            CheckpointDamaged: if it is one.
        """
        place = self._path(path)
        if self.local and os.path.exists(place) and not os.path.isfile(place):
            raise CheckpointDamaged(f"{self.name}: {path}: is no file, but a folder, a pipe or a device")
        return place

    @contextmanager
    def _mapped(self, what: str, *, reading: bool = False) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            if reading:
                raise CheckpointDamaged(f"{self.name}: {what}: the file is missing") from error
            raise StorageError(f"{self.name}: {what}: there is no such place: {error}") from error
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(f"{self.name}: {what}: {error.filename} is not a folder") from error
        except Exception as error:  # Every backend raises its own errors; this is the edge where they become ours.
            name = type(error).__name__
            kind = StorageUnusable if name in _SETTINGS else StorageError
            raise kind(f"{self.name}: {what}: {name}: {error}") from error

    def folders(self) -> dict[str, set[str]]:
        with self._mapped("cannot list"):
            self._fs.invalidate_cache(self._root)
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}  # Nothing was put yet.  fsspec's `exists` would take any error for this answer.
            found: dict[str, set[str]] = {}
            for entry in entries:
                if entry["type"] == "directory":
                    name = _last(entry["name"])
                    self._fs.invalidate_cache(entry["name"])
                    try:
                        found[name] = {_last(file) for file in self._fs.ls(entry["name"], detail=False)}
                    except FileNotFoundError:
                        continue  # Another process's retention was faster.
            return found

    def begun(self) -> set[str]:
        if not self._in_parts:
            return set()
        with self._mapped("cannot list uploads"):
            _, key, _ = self._fs.split_path(self._root)
            paths = [upload.key[len(key) :].strip("/") for upload in multipart.unfinished(self._fs, self._root)]
            return {path.partition("/")[0] for path in paths if "/" in path}

    def size(self, path: str) -> int:
        place = self._file(path)
        with self._mapped(path, reading=True):
            return int(self._fs.size(place))

    def read(self, path: str, offset: int, length: int) -> bytes:
        place = self._file(path)
        with self._mapped(path, reading=True):
            data: Any = self._fs.cat_file(place, start=offset, end=offset + length) if length else b""
        if len(data) > length:
            raise StorageUnusable(
                f"{self.name}: {path}: {length} bytes asked for, {len(data)} came: the server gives no parts of files"
            )
        if len(data) < length:
            raise CheckpointDamaged(
                f"{self.name}: {path}: truncated, {length} bytes asked for at byte {offset}, {len(data)} are there"
            )
        return bytes(data)

    @contextmanager
    def handle(self, path: str) -> Iterator[int | None]:
        if not self.local:
            yield None
            return
        place = self._file(path)
        try:
            handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield handle
            finally:
                os.close(handle)
        except EOFError as error:
            raise CheckpointDamaged(f"{self.name}: {path}: truncated, {error}") from error
        except OSError:
            with self._mapped(path, reading=True):
                raise

    def put(self, path: str, chunks: Iterable[Chunk], size: int = 0) -> int:
        target = self._path(path)
        with self._mapped(path):
            if self.local:
                return write_file(target, chunks)
            if self._in_parts:
                return multipart.put(self._fs, target, chunks, size)
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
            if self._in_parts:
                multipart.abort(self._fs, self._path(folder))

    def check_writable(self) -> None:
        probe = f".probe-{uuid.uuid4().hex}"
        with self._mapped("cannot be written"):
            if self.local:
                # Object stores have no folders; s3fs would make a bucket that nobody asked for.
                make_folder(self._root)
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
