"""Publish an image whose bytes stand in a slot, so that it is complete or not there.  Without torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from resilient_train.image.arena import Slot
from resilient_train.image.native import checksum, engine
from resilient_train.spec.shard import BLOCK, ImageLayout, Stamp


def sum_blocks(slot: Slot, layout: ImageLayout) -> None:
    """Write the checksum of every block into the image's table."""
    view = memoryview(slot.map)
    try:
        starts = range(layout.data_start, layout.crc_start, BLOCK)
        sums = [checksum(view[at : min(at + BLOCK, layout.crc_start)]) for at in starts]
    finally:
        view.release()
    slot.map[layout.crc_start : layout.crc_start + 4 * layout.blocks] = np.array(sums, dtype="<u4").tobytes()


def publish(slot: Slot, layout: ImageLayout, stamp: Stamp) -> None:
    """Write the fields that change from image to image, and publish it; its header and its table stand there.

    Args:
        slot: where the image stands.
        layout: its own.
        stamp: all that changes but the checksum of the table.
    """
    crc = engine.crc32c(slot.address + layout.crc_start, 4 * layout.blocks)
    tail = layout.crc_start + 4 * layout.blocks
    slot.map[tail : layout.total] = bytes(layout.total - tail)
    for at, value in replace(stamp, crc=crc).fields():
        slot.map[at : at + len(value)] = value
    engine.publish(slot.address, layout.data_start - 8)
