"""The slots that a keeper holds: listed while they are published, safe from writers while they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from resilient_train.errors import MemoryRefused
from resilient_train.image import arena
from resilient_train.image.arena import Slot
from resilient_train.image.publish import publish, sum_blocks
from resilient_train.keeper import shelf as module
from resilient_train.keeper.shelf import Shelf, origin_of, parity_owner, replica_owner, source_of
from resilient_train.spec.parity import NAME, Parity, Part
from resilient_train.spec.shard import Entry, Stamp, plan_image
from resilient_train.spec.world import Key

KEY = Key(2, 9)
DOCUMENT = json.dumps(Parity(pieces={"n1": (Part(rank=1, image=64, begin=0, end=64),)}).to_json()).encode()
LAYOUT = plan_image([Entry(name=NAME, dtype="U8", shape=(64,), global_shape=(64,), offset=(0,))], len(DOCUMENT))


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    held = Shelf()
    yield held
    for number in held.owners():
        held.remove(number)


def filled(shelf: Shelf, owner: str, rank: int = 0, document: bytes = DOCUMENT) -> int:
    """A slot with an image in it; its number."""
    number, slot = shelf.make("test", LAYOUT.total, owner)
    write(slot, rank, document)
    slot.close()
    return number


def write(slot: Slot, rank: int, document: bytes) -> None:
    slot.map[8 : LAYOUT.data_start] = LAYOUT.header[8:]
    slot.map[LAYOUT.json_start : LAYOUT.crc_start] = document.ljust(LAYOUT.json_capacity)
    sum_blocks(slot, LAYOUT)
    publish(slot, LAYOUT, Stamp(key=KEY, rank=rank, world=2, json_length=len(document), crc=0))


def test_images_copies_and_parities_are_told_apart(shelf: Shelf) -> None:
    """By their owners, which name where they came from; what is not published yet is not listed."""
    own = filled(shelf, "n0/0.1")
    copy = filled(shelf, replica_owner("n1/1"), rank=1)
    parity = filled(shelf, parity_owner(["n2", "n1"]))
    number, empty = shelf.make("test", LAYOUT.total, "n0/0.1")
    empty.close()
    assert [(i.slot, i.stamp.rank, i.row()[-1]) for i in shelf.images()] == [(own, 0, 0), (copy, 1, 1)]
    assert [(held.slot, held.key, held.begin) for held in shelf.parities()] == [(parity, KEY, LAYOUT.starts[0])]
    assert shelf.keys() == dict.fromkeys((own, copy, parity), KEY)
    assert shelf.has_parities()
    assert number in shelf
    assert [source_of(owner) for owner in shelf.owners().values()] == ["", "n1/1", "", ""]
    assert [origin_of(shelf.owner(one)) for one in (own, copy)] == ["n0", "n1"]
    assert parity_owner(["n2", "n1"]) == parity_owner(["n1", "n2"])


@pytest.mark.parametrize("document", [b"{}", b"[", b'{"pieces": 3}'])
def test_a_parity_that_says_nonsense_is_not_listed(shelf: Shelf, document: bytes) -> None:
    """Nobody may make an image out of it."""
    filled(shelf, parity_owner(["n1"]), document=document)
    assert shelf.parities() == []


def test_what_is_read_stays_until_it_has_been_read(shelf: Shelf) -> None:
    """No writer comes to it meanwhile; its slot may be let go of, and the reader keeps its memory."""
    number = filled(shelf, "n0/0.1")
    with shelf.reading(number, KEY) as view:
        assert view is not None
        assert shelf.locked(number)
        assert shelf.remove(number)
        assert bytes(view[LAYOUT.json_start :][: len(DOCUMENT)]) == DOCUMENT
    assert not shelf.remove(number)
    with shelf.reading(number, KEY) as view:
        assert view is None
    assert (number in shelf, shelf.owner(number), shelf.open(number), shelf.locked(number)) == (False, "", None, False)


def test_another_state_is_not_read_for_the_one_that_was_asked_for(shelf: Shelf) -> None:
    """A slot is overwritten while somebody thinks of it."""
    number = filled(shelf, "n0/0.1")
    with shelf.reading(number, Key(2, 8)) as view:
        assert view is None


def test_a_number_is_never_given_to_another_slot(shelf: Shelf) -> None:
    """A request that comes late finds nothing, not something else; nor does one for what a dead keeper had."""
    first = filled(shelf, "n0/0.1")
    shelf.remove(first)
    assert filled(shelf, "n0/0.1") > first
    memory = arena.create_memory("test", 4096)
    assert shelf.add(memory, "n0/1.1", number=50) == 50
    os.close(memory)
    assert filled(shelf, "n0/0.1") == 51


def test_memory_that_is_not_to_be_had_leaves_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a slot nor an open file."""

    def refused(descriptor: int) -> None:
        raise MemoryRefused(f"there is no room for {descriptor}")

    monkeypatch.setattr(module, "touch", refused)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MemoryRefused):
        shelf.make("test", 1 << 20, "n0/0.1")
    assert shelf.owners() == {}
    assert len(os.listdir("/proc/self/fd")) == before
