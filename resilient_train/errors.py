"""Every error this package raises, in one family, grouped by who must act.

``UserError``: the script or the command line is wrong.  ``PeerError``: another member of the job failed and the job
itself decides what happens.  ``OutsideError``: the world outside (storage, store, memory) refused.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How an agent or a worker ends; ``requeue`` says whether starting the same job again can help."""

    SUCCESS = 0
    USER_ERROR = 1
    USAGE = 2
    NO_PROGRESS = 66
    STORE_LOST = 67
    PARKED = 68
    NOT_DURABLE = 74
    INTERRUPTED = 130

    @property
    def requeue(self) -> bool:
        """Whether a scheduler that starts the same job again can expect another outcome."""
        return self in (ExitCode.STORE_LOST, ExitCode.PARKED, ExitCode.INTERRUPTED)


class ResilientError(Exception):
    """Base of all errors of resilient_train."""


class UserError(ResilientError):
    """The script or its configuration must change."""


class ConfigError(UserError):
    """A setting is missing, malformed or contradicts another."""


class UnsupportedState(UserError):
    """Something in the training state cannot be saved; the message names it."""


class ReplicasDiffer(UnsupportedState):
    """Ranks on different nodes that should hold the same do not."""


class StateMismatch(UserError):
    """A checkpoint does not fit the model that asks for it; the message names the tensors that differ."""


class PeerError(ResilientError):
    """Another member of the job failed."""


class PeerFailed(PeerError):
    """Another rank raised an error of its own, which ended the job."""


class OutsideError(ResilientError):
    """Storage, memory or the store refused; the message says what to do."""


class MemoryRefused(OutsideError):
    """Shared memory for an image could not be had."""


class StorageError(OutsideError):
    """A checkpoint location could not be read or written."""


class StorageUnusable(StorageError):
    """Storage that is not set up for what is asked of it; to ask again does not help."""


class CheckpointDamaged(StorageError):
    """A file of a checkpoint is missing, truncated or fails its checksum; the message names the file."""


class StoreLost(OutsideError):
    """The control store does not answer any more."""


class StoreGone(StoreLost):
    """The control store has ended, and with it the record, which it held in memory only: nobody can change it again."""


class JobReplaced(StoreLost):
    """Another job has begun under this one's id, whose record is lost."""


class LinkLost(OutsideError):
    """The agent or the keeper on this node is gone."""


class FormatError(ResilientError):
    """Bytes from disk or from a peer are not what the format says; raised before anything is used."""
