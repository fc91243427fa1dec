"""Shared memory: image slots and the board, as anonymous files that vanish with the last process that holds them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resilient_train.errors import MemoryRefused
from resilient_train.image.native import CudaError, Device, engine
from resilient_train.spec.shard import PEEK, Stamp, peek
from resilient_train.spec.world import Key

logger = logging.getLogger(__name__)

SLOTS = 3
"""Images of a rank: one being written, one that is complete here, one that is complete on all ranks; one more while one
is persisted, and for each that is being copied, or is copied, to other nodes, as long as there is memory for it.
"""

_MEMORY = "the container's memory limit"


def create_memory(name: str, size: int) -> int:
    """A new anonymous shared file of ``size`` bytes, fully backed; returns its descriptor.

    Backing it now turns a full cgroup into an error here instead of a SIGBUS in the middle of training.

    Raises:
        MemoryRefused: if the memory cannot be had.
    """
    available = _available()
    if size > available:
        # The kernel would go on allocating until it has to kill somebody.
        raise MemoryRefused(_refusal(name, size, f"{available:,} bytes are available"))
    fd = -1
    try:
        fd = os.memfd_create(f"resilient_train:{name}", os.MFD_CLOEXEC)
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        why = errno.errorcode.get(error.errno or 0, "?")
        limit = "the limit on the size of files (ulimit -f)" if error.errno == errno.EFBIG else _MEMORY
        raise MemoryRefused(_refusal(name, size, why, limit)) from error
    return fd


def _refusal(name: str, size: int, why: str, limit: str = _MEMORY) -> str:
    return f"no shared memory for {name}: {size:,} bytes refused ({why}); raise {limit}, or snapshot less state"


def _available() -> int:
    """Bytes that this node, and this container, can still give."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *(left for group in _groups() if (left := _left(group)) is not None)])


def _groups(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[Path, str, str]]:
    """This process's memory cgroup and those around it: (folder, the file of its limit, the file of what it uses)."""
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside of a container its own group may stand at the root, whatever its name is outside.
        for folder in dict.fromkeys((*(top / path.lstrip("/")).parents, top / path.lstrip("/"))):
            if folder == top or top in folder.parents:
                yield folder, *names


def _left(group: tuple[Path, str, str]) -> int | None:
    """Bytes that a cgroup can still give; None if it says nothing, or has no limit."""
    folder, limit, used = group
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = sum(int(stat.get(f"total_{name}", stat[name])) for name in ("inactive_file", "active_file"))
        return int(most) - int((folder / used).read_text()) + cache
    except (OSError, KeyError, ValueError):
        return None


_MADV_POPULATE_WRITE = 23
_system = ctypes.CDLL(None)


def touch(fd: int) -> None:
    """Have the kernel clear all pages of the file behind ``fd`` now, and not in the middle of a step.

    Other threads go on meanwhile.  Kernels before 5.14 cannot do it; there the first copy takes longer.
    """
    memory = Memory(fd)
    memory.populate()
    memory.close()


def reopen(fd: int) -> int:
    """A second, independent open of the file behind ``fd``: file locks belong to opens, not to files."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


class Memory:
    """A shared file mapped into this process, through an open of its own."""

    def __init__(self, fd: int) -> None:
        """Maps the file behind ``fd``, which stays the caller's."""
        self.fd = reopen(fd)
        self.size = os.fstat(self.fd).st_size
        self.map = mmap.mmap(self.fd, self.size)
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._anchor)
        """Address of the first byte; page-aligned."""

    def populate(self) -> None:
        """Enter all pages into this process's page table at once, which is much cheaper than one by one."""
        _system.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size), _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Unlock, unmap and close; the memory itself lives as long as any process holds it."""
        # A mapping that some view still keeps would keep the lock as well.
        self.unlock()
        del self._anchor
        try:
            self.map.close()
        except BufferError:
            # A view of an array is still alive somewhere; the mapping goes with it.
            pass
        os.close(self.fd)

    def try_lock(self, *, exclusive: bool) -> bool:
        """Take the file lock without waiting; False if somebody else's lock forbids it."""
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Let go of the file lock."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)


_refusals_said: set[str] = set()


class Slot(Memory):
    """Room for one shard image."""

    def __init__(self, fd: int) -> None:
        """Maps the file behind ``fd``, which stays the caller's."""
        super().__init__(fd)
        self._locked_for: Device | None = None
        self._refused = False

    def lock_pages(self, device: Device) -> None:
        """Keep the memory where it is, so that ``device`` can write to it by itself; once in the slot's life.

        Where that is refused, copies go through a small ring of memory for which it is not.
        """
        if self._locked_for is not None or self._refused:
            return
        try:
            device.lock(self.address, self.size)
            self._locked_for = device
        except CudaError as error:
            self._refused = True
            why = str(error)
            if why not in _refusals_said:
                _refusals_said.add(why)
                logger.warning("page-locking image memory is refused, so snapshots go through a pinned ring: %s", why)

    def close(self) -> None:
        """Unlock, unmap and close; the memory itself lives as long as any process holds it."""
        if self._locked_for is not None:
            try:
                self._locked_for.unlock(self.address)
            except CudaError as error:
                # A device that is gone holds nothing any more.
                logger.info("image memory could not be unlocked: %s", str(error))
            self._locked_for = None
        super().close()

    def stamp(self) -> Stamp | None:
        """Which image is published here; None while there is none or it is being written."""
        if self.size < PEEK or engine.observe(self.address) == 0:
            return None
        return peek(self.map[:PEEK])

    @contextmanager
    def reading(self, key: Key) -> Iterator[memoryview | None]:
        """The image's bytes under a shared lock, or None if it is not (or no longer) ``key``."""
        if not self.try_lock(exclusive=False):
            yield None
            return
        try:
            stamp = self.stamp()
            yield memoryview(self.map) if stamp is not None and stamp.key == key else None
        finally:
            self.unlock()


LINE = 64
"""Bytes of one worker's line on the board: a cache line, so that workers do not disturb each other."""
_GENERATION, _STEP, _PUBLISHED, _EVERY, _COPIES, _RATE, _GROUP = 0, 8, 16, 24, 32, 40, 48
_PENDING, _KEPT, _VOUCHED = 8, 16, 24


class Board(Memory):
    """How far each worker is, a line each, and when to persist: readable by every process of the node at once."""

    @staticmethod
    def create(lines: int) -> int:
        """A new board's descriptor, with room for workers in slots 0 to ``lines - 1``."""
        return create_memory("board", (lines + 1) * LINE)

    @property
    def lines(self) -> int:
        """Number of workers it has room for."""
        return self.size // LINE - 1

    def _word(self, index: int, offset: int) -> int:
        if not 0 <= index < self.lines:
            raise IndexError(f"the board has {self.lines} lines, not {index + 1}")
        return self.address + (index + 1) * LINE + offset

    def persist_at(self) -> int:
        """The step whose snapshot is to be made durable; 0 for none."""
        return engine.observe(self.address)

    def ask_to_persist(self, step: int) -> None:
        """Name the step whose snapshot every worker is to hand over."""
        engine.publish(self.address, step)

    def protected(self) -> tuple[Key, ...]:
        """States whose images must stay: the one to copy to other nodes next, the one that is copied everywhere."""
        # In this order: whoever sees that another is pending sees also that the one before it is kept.
        words = [engine.observe(self.address + at) for at in (_PENDING, _KEPT)]
        return tuple(Key.unpack(word) for word in words if word)

    def vouched(self) -> float:
        """Until when of the node's monotonic clock, in seconds, the store's word holds that this node's world is the
        current one; infinity where no word is needed."""
        word = engine.observe(self.address + _VOUCHED)
        return word / 1e9 if word else float("inf")

    def vouch(self, until: float) -> None:
        """Say until when the store's word holds; infinity: none is needed."""
        engine.publish(self.address + _VOUCHED, 0 if until == math.inf else max(1, int(until * 1e9)))

    def kept(self) -> Key | None:
        """The newest state that is copied to other nodes everywhere; None if none is."""
        word = engine.observe(self.address + _KEPT)
        return Key.unpack(word) if word else None

    def protect(self, pending: Key | None, kept: Key | None) -> None:
        """Name the states whose images must stay."""
        engine.publish(self.address + _KEPT, kept.pack() if kept else 0)
        engine.publish(self.address + _PENDING, pending.pack() if pending else 0)

    def progress(self, index: int) -> tuple[int, int]:
        """(generation, number of finished steps) of the worker in slot ``index``; (0, 0) before its first boundary."""
        return engine.observe(self._word(index, _GENERATION)), engine.observe(self._word(index, _STEP))

    def report_progress(self, index: int, generation: int, step: int) -> None:
        """Say that ``step`` steps are finished in ``generation``."""
        engine.publish(self._word(index, _STEP), step)
        engine.publish(self._word(index, _GENERATION), generation)

    def published(self, index: int) -> Key | None:
        """The newest image that the worker in slot ``index`` has published; None if none."""
        word = engine.observe(self._word(index, _PUBLISHED))
        return Key.unpack(word) if word else None

    def report_published(self, index: int, key: Key | None) -> None:
        """Say that the image of ``key`` is complete; None: that there is none of this generation yet."""
        engine.publish(self._word(index, _PUBLISHED), key.pack() if key else 0)

    def every(self, index: int) -> int:
        """Steps between two snapshots of the worker in slot ``index``."""
        return max(1, engine.observe(self._word(index, _EVERY)))

    def report_every(self, index: int, steps: int) -> None:
        """Say that every ``steps`` steps there is a snapshot."""
        engine.publish(self._word(index, _EVERY), steps)

    def copies(self, index: int) -> int | None:
        """On how many other nodes the worker in slot ``index`` wants copies of its images; None: it has not said."""
        word = engine.observe(self._word(index, _COPIES))
        return word - 1 if word else None

    def rate(self, index: int) -> int:
        """Bytes per second at which its node may send them; 0: as fast as possible."""
        return engine.observe(self._word(index, _RATE))

    def group(self, index: int) -> int:
        """The most nodes of a parity group that is to take the place of copies; 0: there are to be copies."""
        return engine.observe(self._word(index, _GROUP))

    def report_copies(self, index: int, copies: int, rate: int = 0, group: int = 0) -> None:
        """Say how many copies there are to be, or one parity in groups of so many nodes, and how fast they may be
        sent."""
        engine.publish(self._word(index, _RATE), rate)
        engine.publish(self._word(index, _GROUP), group)
        engine.publish(self._word(index, _COPIES), copies + 1)

    def clear(self, index: int) -> None:
        """A new process in the slot begins with nothing."""
        for offset in (_GENERATION, _STEP, _PUBLISHED, _EVERY, _COPIES, _RATE, _GROUP):
            engine.publish(self._word(index, offset), 0)

    def watermark(self, lineage: int, slots: tuple[int, ...]) -> int:
        """The newest step of ``lineage`` that the workers in all ``slots`` have published; -1 if there is none."""
        keys = [self.published(slot) for slot in slots]
        if not keys or any(key is None or key.lineage != lineage for key in keys):
            return -1
        return min(key.step for key in keys if key is not None)
