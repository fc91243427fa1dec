"""Keys, ancestry, and the record's JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient_train.errors import FormatError, UnsupportedState
from resilient_train.spec import jsontree
from resilient_train.spec.messages import Hello, Published, decode, encode
from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.world import (
    Key,
    Planned,
    Restore,
    WorldRecord,
    ancestry,
    in_ancestry,
    incarnation_of,
    member_id,
    node_of,
    slot_of,
)


@given(st.integers(1, (1 << 24) - 1), st.integers(0, (1 << 40) - 1))
def test_keys_pack_into_ordered_words(lineage: int, step: int) -> None:
    """A packed key is never 0 and unpacks to itself."""
    key = Key(lineage, step)
    assert key.pack() > 0
    assert Key.unpack(key.pack()) == key


def test_abandoned_futures_are_not_ancestors() -> None:
    """After resuming (1, 10), steps of lineage 1 beyond 10 were computed by a world that is gone."""
    log = [
        Restore(generation=1, lineage=1, source=None),
        Restore(generation=2, lineage=2, source=Key(1, 10)),
        Restore(generation=4, lineage=4, source=Key(1, 8)),
        Restore(generation=5, lineage=5, source=Key(4, 12)),
    ]
    past = ancestry(log)
    assert past == {5: None, 4: 12, 1: 8}
    assert in_ancestry(Key(5, 99), past)
    assert in_ancestry(Key(1, 8), past)
    assert not in_ancestry(Key(1, 9), past)
    assert not in_ancestry(Key(2, 5), past)
    assert in_ancestry(Key(7, 7), {}), "a new job may resume anything"


def test_the_record_survives_json() -> None:
    """to_json and from_json are inverse, restores and plans included."""
    record = WorldRecord(
        revision=4,
        generation=2,
        members=("a/0.0", "a/1.0"),
        bootstrap="h:1",
        reason="r",
        planned=Planned(number=4, boundary=9, members=("a/0.0",), reason="x"),
        restores=(Restore(generation=2, lineage=2, source=Key(1, 3)),),
    )
    assert WorldRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(FormatError):
        WorldRecord.from_json({"revision": 1})


def test_fields_of_a_later_version_are_left_out() -> None:
    """At every level: one agent of a newer image must not deafen the others."""
    planned = Planned(number=4, boundary=9, members=("a/0.0",), reason="x")
    record = WorldRecord(revision=4, generation=2, members=(), bootstrap="", reason="", planned=planned)
    data = record.to_json()
    assert WorldRecord.from_json({**data, "new": 1, "planned": {**data["planned"], "new": 2}}) == record
    info = NodeInfo(node="a", order=0, endpoint="h:1", slots=2, workers=(WorkerInfo(member="a/0.0"),))
    told = info.to_json()
    assert NodeInfo.from_json({**told, "new": 1, "workers": [{**told["workers"][0], "new": 2}]}) == info


def test_member_ids_take_apart() -> None:
    """node, slot and incarnation come back, whatever the node is called."""
    member = member_id("rack/7.node", 12, 3)
    assert (node_of(member), slot_of(member), incarnation_of(member)) == ("rack/7.node", 12, 3)


def test_announcements_survive_json() -> None:
    """to_json and from_json are inverse."""
    info = NodeInfo(node="a", order=0, endpoint="h:1", slots=2, workers=(WorkerInfo(member="a/0.0"),))
    assert NodeInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


def test_messages_survive_encoding_and_nonsense_is_refused() -> None:
    """Every message type is known by name; anything else is a FormatError."""
    message = Published(slot=1, lineage=2, step=3, rank=0, world=1, local=1, past=[[2, None]])
    assert decode(encode(message)) == message
    for bad in (b"{}", b"[]", b'{"type": "Hello"}', b'{"type": "eval"}', b"\xff", b"[" * 100_000):
        with pytest.raises(FormatError):
            decode(bad)
    assert decode(encode(Hello(member="a/0.0"))) == Hello(member="a/0.0")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(VALUES)
def test_values_survive_json(value: object) -> None:
    """Tuples, integer keys, bytes and infinities included."""
    assert jsontree.decode(json.loads(json.dumps(jsontree.encode(value)))) == value


def test_nan_survives_and_objects_are_refused_by_path() -> None:
    """Nothing is pickled: what JSON cannot say is an error that names where it stands."""
    assert math.isnan(jsontree.decode(jsontree.encode(math.nan)))
    with pytest.raises(UnsupportedState, match=r"opt\.a\[1\]"):
        jsontree.encode({"a": [1, object()]}, "opt")
