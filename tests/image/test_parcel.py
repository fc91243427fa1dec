"""Runs of images between ranks: what is asked for is what arrives, and nothing else is given or believed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from resilient_train.errors import CheckpointDamaged, FormatError
from resilient_train.image.fetch import plan_runs
from resilient_train.image.parcel import MOST, Order, decode_orders, encode_orders, length, order, pack, unpack
from resilient_train.image.reader import memory_reader
from resilient_train.image.verified import VerifiedImage
from resilient_train.spec.shard import BLOCK

from .test_fetch import Memory, random_ranges


@pytest.fixture
def chance() -> random.Random:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


def test_any_runs_arrive_and_what_was_changed_is_found(chance: random.Random) -> None:
    """As whole blocks and as rows: the same bytes in the same places as without; one bit more or less is found out."""
    memory = Memory(20_000_000 + chance.randrange(100_000), chance)
    image = memory_reader("here", memory.data.data)
    there = VerifiedImage("there", len(memory.data), memory.read)
    for _ in range(6):
        target = np.zeros(len(memory.data), dtype=np.uint8)
        ranges = random_ranges(chance, memory.layout, target.ctypes.data)
        runs = [run for run in plan_runs(ranges, memory.layout) if run.rows]
        orders = decode_orders(encode_orders(order(3, run) for run in runs))
        assert orders == [order(3, run) for run in runs]
        for run, wanted in zip(runs, orders, strict=True):
            parcel = pack(image, wanted).copy()
            assert len(parcel) == length(run) == wanted.size <= MOST
            assert unpack(there, run, parcel)
            parcel[chance.randrange(len(parcel))] ^= 1 << chance.randrange(8)
            assert not unpack(there, run, parcel)
            assert unpack(there, run, pack(image, wanted))
        for wanted in ranges:
            for at in range(wanted.at, wanted.at + wanted.size, wanted.stride or wanted.size):
                end = min(at + (wanted.row or wanted.size), wanted.at + wanted.size)
                assert np.array_equal(target[at:end], memory.data[at:end])


def test_what_an_image_does_not_have_is_not_given(chance: random.Random) -> None:
    """Blocks and rows outside of it, too many of them, a parcel of another length, an image that is not here."""
    memory = Memory(10 * BLOCK, chance)
    image = memory_reader("here", memory.data.data)
    last = memory.layout.blocks - 1
    whole = Order(0, 0, 7, 8 * BLOCK, ())
    assert len(pack(image, whole)) == 8 * BLOCK
    for wrong in (
        whole._replace(first=-1),
        whole._replace(last=8),
        whole._replace(first=5, last=4),
        Order(0, last + 1, last + 1, BLOCK, ()),
        whole._replace(size=8 * BLOCK - 1),
        whole._replace(rows=((0, 10, 20, 1 << 40),)),
        whole._replace(rows=((8 * BLOCK, 1, 1, 1),), size=33),
        whole._replace(rows=((-1, 1, 1, 1),), size=33),
        whole._replace(rows=((5, 1, 1, 1), (5, 1, 1, 1)), size=34),
    ):
        with pytest.raises(FormatError):
            pack(image, wrong)
    with pytest.raises(CheckpointDamaged, match="there is not in this node's memory any more"):
        pack(VerifiedImage("there", len(memory.data), memory.read), whole)
    image.release()
    with pytest.raises(CheckpointDamaged):
        pack(image, whole)


def test_orders_that_nobody_gave_are_refused(chance: random.Random) -> None:
    """Cut short, or of numbers at random: an error, or orders that `pack` looks at; no more memory than the bytes."""
    good = encode_orders([Order(1, 2, 3, 40, ((0, 10, 20, 4),)), Order(1, 5, 6, 2 * BLOCK, ())])
    for end in range(1, len(good)):
        if end != 8 * 9:
            with pytest.raises(FormatError):
                decode_orders(good[:end])
    for _ in range(2000):
        numbers = np.frombuffer(good, dtype="<i8").copy()
        numbers[chance.randrange(len(numbers))] = chance.choice([-1, 0, 3, 1 << 40, -(1 << 62)])
        try:
            for one in decode_orders(numbers.tobytes()):
                assert 0 < one.size <= MOST
        except FormatError:
            pass
