"""What the ranks of a job say and send to each other while they restore together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from resilient_train.errors import CheckpointDamaged, PeerFailed, ResilientError

_WELL, _DAMAGED, _FAILED = b"w", b"d", b"f"
_FAILURE = 1 << 62
"""Says that a rank could not give a number."""
MOST_TEXT = 1000
"""Bytes of an error's text that others are told."""


class Exchange:
    """Collectives on bytes over the job's process group.

    An error of one rank reaches all in the call that it would have taken part in: nobody is left waiting for it.
    """

    def __init__(self, rank: int, size: int) -> None:
        """Args:
        rank: this rank.
        size: number of ranks.
        """
        self.rank = rank
        self.size = size
        # Bytes come from, and are checked by, the host: a backend for its memory, if there is one, saves two copies.
        backends = dict(pair.split(":", 1) for pair in dist.get_backend_config().split(","))
        # Of a build for GPUs there is an accelerator even where there is none.
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._device = torch.device("cpu" if "cpu" in backends or accelerator is None else accelerator)
        # gloo says that it takes tensors of GPUs, and sends none of them.
        apart = accelerator is not None and backends.get(accelerator.type, "gloo") != "gloo"
        self.fast = accelerator if apart and accelerator is not None else self._device
        """What large messages go by: the backend of the GPUs, where they have one of their own."""
        self.staged = self.fast.type != "cpu"
        """Whether they are copied to and from there."""

    def from_first(self, attempt: Callable[[], bytes]) -> bytes:
        """What ``attempt`` gives on rank 0, which alone makes it.

        Raises:
            CheckpointDamaged, PeerFailed: on the others, if it raises.
            Exception: what it raises on rank 0.
        """
        said, error = _said(attempt) if self.rank == 0 else (b"", None)
        length = torch.tensor([len(said)], device=self._device)
        dist.broadcast(length, 0)
        data = _tensor(said, int(length)).to(self._device)
        dist.broadcast(data, 0)
        if error is not None:
            raise error
        return _heard(0, _bytes(data))

    def greatest(self, attempt: Callable[[], int]) -> int:
        """The greatest of what ``attempt`` gives on the ranks, at least 0: cheaper than `from_all`.

        Raises:
            CheckpointDamaged, PeerFailed: if it raises on another rank.
            Exception: what it raises here.
        """
        failure: Exception | None = None
        try:
            value = attempt()
        except Exception as error:
            value, failure = _FAILURE, error
        greatest = torch.tensor([value], device=self._device)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        if int(greatest) == _FAILURE:
            self.from_all(lambda: _raised(failure))
        return int(greatest)

    def from_all(self, attempt: Callable[[], bytes]) -> list[bytes]:
        """What ``attempt`` gives on each rank, by rank.

        Raises:
            CheckpointDamaged, PeerFailed: if it raises on another rank.
            Exception: what it raises here.
        """
        said, error = _said(attempt)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(said)], device=self._device))
        most = max(int(length) for length in lengths)
        pages = [torch.empty(most, dtype=torch.uint8, device=self._device) for _ in range(self.size)]
        dist.all_gather(pages, _tensor(said, most).to(self._device))
        if error is not None:
            raise error
        return [_heard(rank, _bytes(page[: int(n)])) for rank, (page, n) in enumerate(zip(pages, lengths, strict=True))]

    def connect(self) -> None:
        """Have the backend of large messages begin, which takes all ranks.

        Raises:
            RuntimeError: if it does not.
        """
        if self.fast != self._device:
            dist.all_reduce(torch.zeros(1, device=self.fast))

    def reserve(self, size: int) -> None:
        """Have room for so many bytes on their way where there is none of the host's own, or fail now.

        Raises:
            RuntimeError: if there is none.
        """
        if self.staged:
            torch.empty(size, dtype=torch.uint8, device=self.fast)  # torch keeps it for the next that asks.

    def swap(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]
    ) -> Callable[[], None]:
        """Begin to send bytes to ranks and to receive as many as they send; what waits until all is there.

        Whatever one rank sends in its n-th call to another that one receives in its n-th with this rank: NCCL takes a
        call's messages together.

        Args:
            sends: (bytes, to whom), which stay as they are until it is done.
            receives: (where to, from whom).
        """
        going = [(data.to(self.fast, copy=self.staged), to) for data, to in sends]
        coming = [
            (torch.empty_like(place, device=self.fast) if self.staged else place, place, of) for place, of in receives
        ]
        messages = [dist.P2POp(dist.isend, data, to) for data, to in going]
        messages += [dist.P2POp(dist.irecv, data, of) for data, _, of in coming]
        works = dist.batch_isend_irecv(messages) if messages else []

        def finish() -> None:
            for work in works:
                work.wait()
            going.clear()  # Held until here: the backend may read it.
            for data, place, _ in coming:
                if data is not place:
                    place.copy_(data)

        return finish

    def send(self, buffer: torch.Tensor, to: int) -> Callable[[], object]:
        """Begin to send bytes to a rank, which receives as many; what waits until they are on their way.

        Nothing may be written to the buffer before that.
        """
        data = buffer.to(self._device)
        work = dist.isend(data, to)
        assert work is not None
        return partial(_finish, work, data)

    def receive(self, buffer: torch.Tensor, sender: int) -> None:
        """Fill the buffer with what a rank sends."""
        data = torch.empty_like(buffer, device=self._device)
        dist.recv(data, sender)
        buffer.copy_(data)


def _finish(work: dist.Work, data: torch.Tensor) -> None:
    work.wait()
    del data  # Held until here: the backend may read it.


def _raised(error: Exception | None) -> bytes:
    if error is not None:
        raise error
    return b""


def _said(attempt: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
    try:
        return _WELL + attempt(), None
    except Exception as error:
        # Whatever it is, memory that is not to be had for instance: the others wait to hear how it went.
        return told(error), error


def told(error: Exception) -> bytes:
    """An error as others are told of it."""
    kind = _DAMAGED if isinstance(error, CheckpointDamaged) else _FAILED
    text = str(error) if isinstance(error, ResilientError) else f"{type(error).__name__}: {error}"
    return kind + text.encode()[:MOST_TEXT]


def retold(rank: int, data: bytes) -> ResilientError:
    """The error that is raised where another rank has told of its own."""
    text = data[1:].decode(errors="ignore")
    if data[:1] == _DAMAGED:
        return CheckpointDamaged(text)
    return PeerFailed(f"rank {rank} could not restore its part: {text}")


def _heard(rank: int, data: bytes) -> bytes:
    if data[:1] != _WELL:
        raise retold(rank, data)
    return data[1:]


def _tensor(data: bytes, length: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
