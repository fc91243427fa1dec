"""Rows of blocks out of an image in shared memory, for whoever needs no more of them."""

from __future__ import annotations

import numpy as np

from resilient_train.errors import FormatError
from resilient_train.image.native import engine
from resilient_train.image.scratch import Scratch
from resilient_train.spec.peers import MOST_GATHERED, Declined, Gather, Gathered, rows_within
from resilient_train.storage.wire import Wire

_SCRATCH = Scratch()


def answer_rows(wire: Wire, view: memoryview | None, request: Gather) -> None:
    """Send the rows, and what the bytes between them add to the checksums of their blocks.

    Every byte of the blocks is read, so that the receiver finds it out if any is not what it was.

    Args:
        wire: to whoever asked.
        view: the image; None if it is gone.
        request: what of it.
    """
    if view is None:
        wire.send(Declined(reason="the image is gone"))
        return
    offset, size = request.offset, request.size
    if not (0 <= offset <= offset + size <= len(view) and size <= MOST_GATHERED):
        wire.send(Declined(reason=f"no rows of {size} bytes at {offset} of {len(view)}"))
        return
    try:
        rows = rows_within(request.rows, size)
    except FormatError as error:
        wire.send(Declined(reason=str(error)))
        return
    source = np.frombuffer(view, dtype=np.uint8).ctypes.data
    with _SCRATCH.lend(sum(width * count for _, width, _, count in rows)) as gathered:
        gaps = engine.gather_rows(source + offset, size, rows, gathered.ctypes.data)
        wire.send(Gathered(size=len(gathered), gaps=gaps), [gathered.data])
