"""Serve boxes of an image: gathered by the sender, so that a strided block travels as one piece."""

from __future__ import annotations

import base64
from contextlib import closing
from typing import Any

import numpy as np

from resilient_train.errors import FormatError
from resilient_train.image.arena import Slot
from resilient_train.spec.layout import Box
from resilient_train.spec.messages import Boxes
from resilient_train.spec.shard import DTYPE_SIZES, Entry, parse_header
from resilient_train.spec.world import Key


def read_boxes(descriptor: int, key: Key, requests: list[list[Any]]) -> Boxes:
    """The bytes of boxes ``[name, offset, shape]`` (global indices) of the image ``key`` in a slot, row-major."""
    if descriptor < 0:
        return Boxes(data=[], error="no such image")
    # Through an open of its own: letting go of this lock must not let go of the one under which it is persisted.
    with closing(Slot(descriptor)) as memory, memory.reading(key) as view:
        if view is None:
            return Boxes(data=[], error=f"the image is not {key} any more")
        try:
            length = 8 + int.from_bytes(view[:8], "little")
            layout, _ = parse_header(view[:length], len(view))
            held = {e.name: (e, start) for e, start in zip(layout.entries, layout.starts, strict=True)}
            data = []
            for name, offset, shape in requests:
                entry, start = held[str(name)]
                data.append(base64.b64encode(_gather(view, entry, start, Box(tuple(offset), tuple(shape)))).decode())
        except (KeyError, TypeError, ValueError, FormatError) as error:
            return Boxes(data=[], error=f"no such box: {error}")
        return Boxes(data=data, error="")


def _gather(view: memoryview, entry: Entry, start: int, box: Box) -> bytes:
    if entry.box.intersect(box) != box:
        raise ValueError(f"{entry.name} is held from {entry.offset}, {entry.shape}")
    width = DTYPE_SIZES[entry.dtype]
    raw = np.frombuffer(view[start : start + entry.nbytes], dtype=np.dtype(f"V{width}")).reshape(entry.shape)
    return raw[box.slices_in(entry.box)].tobytes()
