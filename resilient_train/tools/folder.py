"""A local folder that gets all of some files or none."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from resilient_train.errors import ConfigError, StorageError


@contextmanager
def filling(folder: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder within ``folder``; whoever leaves it by an error leaves nothing.

    Args:
        folder: made if it is not there.
        force: whether it may hold something already.

    Raises:
        ConfigError: if it holds something and ``force`` was not said, or is no folder.
        StorageError: if anything could not be written.
    """
    check(folder, force=force)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = folder / f".rtctl-{uuid.uuid4().hex}"
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rmdir()
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            _remove_empty(made)
            raise
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error


def check(folder: Path, *, force: bool) -> None:
    """Raises:
    ConfigError: if ``folder`` holds something and ``force`` was not said, or is no folder.
    """
    try:
        holds = folder.exists() and next(folder.iterdir(), None) is not None
    except NotADirectoryError:
        raise ConfigError(f"{folder} is a file: --to needs a folder") from None
    except OSError as error:
        raise StorageError(f"{folder}: {error}") from error
    if holds and not force:
        raise ConfigError(f"{folder} is not empty: choose another folder, or replace the model in it with --force")


def settle(temporary: Path, names: Sequence[str], stale: Sequence[str]) -> None:
    """Move finished files from ``temporary`` to the folder it stands in.

    Args:
        temporary: as `filling` gave it.
        names: the files, in the order in which they are to appear.
        stale: names or patterns of files that must not stand beside them.
    """
    folder = temporary.parent
    for pattern in stale:
        for path in folder.glob(pattern):
            path.unlink()
    moved: list[Path] = []
    try:
        for name in names:
            moved.append(folder / name)
            os.replace(temporary / name, folder / name)
        flush(folder)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            # Was never made, or somebody else has put something there.
            continue
