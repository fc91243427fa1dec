"""The contract of a durable tier; `resilient_train.testing.tier` holds the suite that every implementation passes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

Chunk = bytes | memoryview


class Tier(Protocol):
    """A place with folders of immutable files.

    Names are relative: ``step-000000041.g3/manifest.json``.  All methods raise
    `resilient_train.errors.StorageError` naming the place and the file.
    """

    name: str
    """The place, for people."""
    local: bool
    """Whether it is on a disk of this machine, and not behind a network."""

    def folders(self) -> dict[str, set[str]]:
        """The names of all folders, with the names of the files in each."""
        ...

    def begun(self) -> set[str]:
        """The names of folders of which something is being uploaded, or was when its writer died.

        As far as storage tells; what `folders` tells of need not be among them.
        """
        ...

    def size(self, path: str) -> int:
        """Length of a file in bytes."""
        ...

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Exactly these bytes of a file; fewer is an error."""
        ...

    def handle(self, path: str) -> AbstractContextManager[int | None]:
        """A handle for reading a file that is on a disk of this machine, closed at the end; None of any other file.

        Errors of the system from reading it, and ``EOFError``, become the tier's own.
        """
        ...

    def put(self, path: str, chunks: Iterable[Chunk], size: int = 0) -> int:
        """Write a file that becomes visible whole or not at all, durable when this returns; its length.

        What is in the chunks must not change until then.  Several threads may ask for them, in turns.

        Args:
            path: where.
            chunks: its bytes.
            size: how many they are, if that is known; some storage takes no very long files otherwise.
        """
        ...

    def delete(self, folder: str) -> None:
        """Remove a folder, its manifest first; one that is not there is no error."""
        ...

    def check_writable(self) -> None:
        """Raise `StorageError` now if nothing can be written here."""
        ...
