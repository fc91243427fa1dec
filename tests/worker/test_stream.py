"""ElasticStream: each shard's batches one after the other, once, whatever the world does; and its state."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_state import images_of, saved
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from worlds import world, worlds

from resilient_train.errors import ConfigError, StateMismatch, UnsupportedState
from resilient_train.image.reader import ImageReader
from resilient_train.worker.fill import fill
from resilient_train.worker.shard_reader import Place, decode_place, encode_place
from resilient_train.worker.state import State
from resilient_train.worker.stream import ElasticStream, StreamBatch
from resilient_train.worker.world import World

# torchdata 0.11 calls what torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


class Counting:
    """A loader with a state: batches (shard, epoch, number), of which a shard has ``3 + shard % 3`` in an epoch."""

    def __init__(self, shard: int, epoch: int) -> None:
        self.shard, self.epoch, self.at = shard, epoch, 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        while self.at < 3 + self.shard % 3:
            self.at += 1
            yield self.shard, self.epoch, self.at - 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def counting_without_state(shard: int, epoch: int) -> list[tuple[int, int, int]]:
    return list(Counting(shard, epoch))


def expected(shard: int, batches: int) -> list[tuple[int, int, int]]:
    """The first batches that a shard gives, over its epochs."""
    whole = 3 + shard % 3
    return [(shard, at // whole, at % whole) for at in range(batches)]


def images(streams: list[ElasticStream]) -> list[ImageReader]:
    """The images of all ranks' states."""
    return [saved(State(stream=stream), rank, len(streams)) for rank, stream in enumerate(streams)]


def restored(streams: list[ElasticStream], readers: list[ImageReader]) -> None:
    for rank, stream in enumerate(streams):
        fill(State(stream=stream), images_of(readers), rank, len(streams))


def step_of(streams: list[ElasticStream], ranks: list[World], step: int) -> list[StreamBatch]:
    """The batches that are used in one step, after all ranks have agreed on how many turns they take."""
    shares = [list(stream.micro_batches(step)) for stream in streams]
    assert len({len(share) for share in shares}) == 1
    for rank, share in zip(ranks, shares, strict=True):
        first = next(i for i, other in enumerate(ranks) if other.data_rank == rank.data_rank)
        assert [str(each.batch) for each in share] == [str(each.batch) for each in shares[first]], "peers share batches"
    first_of = {rank.data_rank: share for rank, share in reversed(list(zip(ranks, shares, strict=True)))}
    used = [each for share in first_of.values() for each in share if each.weight]
    assert sum(each.weight for each in used) / len(first_of) == pytest.approx(1)
    return used


MESHES = [
    {"data": 1},
    {"data": 2},
    {"data": 3},
    {"data": 5},
    {"data": 2, "tensor": 2},
    {"tp": 2, "replicate": 2, "shard": 2},
    {"replicate": 3, "shard": 2},
]
SCHEDULES = st.lists(st.tuples(st.sampled_from(MESHES), st.integers(0, 4), st.integers(-1, 2)), min_size=1, max_size=4)


@pytest.mark.parametrize("open_shard", [Counting, counting_without_state])
@given(SCHEDULES, st.sampled_from([(6, 6), (6, 3), (12, 4), (2, 6), (1, 4), (4, 1)]))
@settings(deadline=None, max_examples=12)
def test_any_sequence_of_worlds_reads_every_batch_of_every_shard_once(
    open_shard: Any, schedule: list[tuple[dict[str, int], int, int]], numbers: tuple[int, int]
) -> None:
    """Through images of the state, on any meshes, after losses that take finished steps back: each shard gives its
    batches in order, epoch after epoch, none lost and none twice; shards keep pace with each other."""
    shards, units = numbers
    history: list[list[StreamBatch]] = []
    states: list[list[ImageReader] | None] = [None]
    for mesh, steps, cost in schedule:
        ranks = worlds(mesh)
        settings_ = {"shards": shards, "micro_batches": units, "seed": 0, "state_bytes": 128}
        streams = [ElasticStream(open_shard, world=rank, **settings_) for rank in ranks]
        if states[-1] is not None:
            restored(streams, states[-1])
        for _ in range(steps + (cost >= 0)):
            history.append(step_of(streams, ranks, len(history)))
            states.append(images(streams))
        if cost >= 0:
            keep = max(0, len(history) - 1 - cost)
            del history[keep:], states[keep + 1 :]
    for shard in range(shards):
        given_out = [each.batch for used in history for each in used if each.shard == shard]
        assert given_out == expected(shard, len(given_out))
    counts = Counter(each.shard for used in history for each in used)
    assert all(len(used) == units for used in history)
    assert max(counts[shard] for shard in range(shards)) - min(counts[shard] for shard in range(shards)) <= 1


class Lines(IterableDataset):
    """A stream with its own state: samples ``1000 * shard + number``."""

    def __init__(self, shard: int, length: int) -> None:
        self.shard, self.length, self.at = shard, length, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.length:
            self.at += 1
            yield 1000 * self.shard + self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_stateful_data_loader_with_worker_processes() -> None:
    """torchdata's loader loads ahead in its own processes; what it had ahead is neither lost nor seen twice."""

    def open_shard(shard: int, epoch: int) -> StatefulDataLoader:
        return StatefulDataLoader(Lines(shard, 12), batch_size=2, num_workers=1, prefetch_factor=3)

    used: dict[int, list[int]] = {}
    state: list[ImageReader] | None = None
    for mesh, steps in (({"data": 1}, range(3)), ({"data": 2}, range(3, 5)), ({"data": 1}, range(5, 9))):
        ranks = worlds(mesh)
        streams = [ElasticStream(open_shard, shards=2, micro_batches=2, world=r, seed=0) for r in ranks]
        if state is not None:
            restored(streams, state)
        for step in steps:
            for each in step_of(streams, ranks, step):
                used.setdefault(each.shard, []).extend(each.batch.tolist())
        state = images(streams)
    once = list(range(12))
    assert used == {0: [*once, *once[:6]], 1: [1000 + i for i in (*once, *once[:6])]}


@pytest.mark.parametrize("kind", ["stateful", "plain"])
def test_loaders_that_shuffle_go_on_in_the_same_order(kind: str) -> None:
    """A loader that draws its order from torch's generator draws the same one wherever the shard is opened again."""
    loader: Any = StatefulDataLoader if kind == "stateful" else DataLoader

    def open_shard(shard: int, epoch: int) -> Any:
        return loader(TensorDataset(torch.arange(20) + 100 * shard), batch_size=2, shuffle=True)

    def read(cuts: list[range]) -> list[list[int]]:
        found, state = [], None
        for steps in cuts:
            torch.manual_seed(len(found))
            stream = ElasticStream(open_shard, shards=2, micro_batches=1, world=world({"data": 1}, 0), seed=5)
            if state is not None:
                restored([stream], state)
            for step in steps:
                found += [each.batch[0].tolist() for each in stream.micro_batches(step)]
            state = images([stream])
        return found

    whole = read([range(25)])
    assert read([range(7), range(7, 8), range(8, 25)]) == whole
    first = [number for batch in whole[0:20:2] for number in batch]
    assert sorted(first) == list(range(20))
    assert first != sorted(first)


def test_a_rank_without_shards_goes_along() -> None:
    """It makes as many passes as the others, with weight 0, and nobody misses what it read."""
    ranks = worlds({"data": 3})
    streams = [ElasticStream(Counting, shards=2, micro_batches=2, world=r, seed=0) for r in ranks]
    for step in range(2):
        shares = [list(stream.micro_batches(step)) for stream in streams]
        assert [each.weight for share in shares for each in share] == [1.5, 1.5, 0.0]
        assert [each.batch for share in shares for each in share] == [(0, 0, step), (1, 0, step), (0, 0, 0)]


def test_the_same_checkpoint_with_another_number_of_micro_batches() -> None:
    """Shards go on where they stood though they are cut into other lanes."""
    ranks = worlds({"data": 2})
    streams = [ElasticStream(Counting, shards=4, micro_batches=2, world=r, seed=0) for r in ranks]
    used = [each.batch for step in range(3) for each in step_of(streams, ranks, step)]
    others = [ElasticStream(Counting, shards=4, micro_batches=8, world=r, seed=0) for r in ranks]
    restored(others, images(streams))
    used += [each.batch for each in step_of(others, ranks, 3)]
    for shard in range(4):
        mine = [batch for batch in used if batch[0] == shard]
        assert mine == expected(shard, len(mine))


def test_what_a_stream_does_not_take() -> None:
    """Numbers that do not divide; a checkpoint of other shards; empty shards; shards that have shrunk."""
    one = world({"data": 1}, 0)

    def stream(open_shard: Any = Counting, shards: int = 4, units: int = 2) -> ElasticStream:
        return ElasticStream(open_shard, shards=shards, micro_batches=units, world=one, seed=0)

    with pytest.raises(ConfigError, match="one number must divide the other"):
        stream(shards=4, units=3)
    with pytest.raises(ConfigError, match="shards must be a whole number"):
        stream(shards=0)
    with pytest.raises(ConfigError, match="open_shard must be a function"):
        stream([])
    with pytest.raises(StateMismatch, match="has 4 shards, this one has 8"):
        restored([stream(shards=8)], images([stream()]))
    with pytest.raises(ConfigError, match="shard 1 has no batches in epoch 0"):
        list(stream(lambda shard, epoch: [[1], []][shard], shards=2).micro_batches(0))
    read = stream(lambda shard, epoch: [1, 2, 3], shards=1, units=1)
    for step in range(2):
        list(read.micro_batches(step))
    shorter = stream(lambda shard, epoch: [1], shards=1, units=1)
    restored([shorter], images([read]))
    with pytest.raises(StateMismatch, match="shard 0 ends after 1 batches, 2 were read"):
        list(shorter.micro_batches(2))
    stateful = stream(shards=1, units=1)
    list(stateful.micro_batches(0))
    other = stream(counting_without_state, shards=1, units=1)
    restored([other], images([stateful]))
    with pytest.raises(StateMismatch, match="shard 0 has a saved state, which a list does not take back"):
        list(other.micro_batches(1))


STATES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(STATES, st.integers(0, 1 << 40), st.integers(0, 1 << 40))
@settings(deadline=None, max_examples=50)
def test_places_come_back_as_they_were(state: Any, epoch: int, batches: int) -> None:
    """Whatever JSON values the loader's state is made of."""
    row = torch.empty(1 << 14, dtype=torch.uint8)
    place = Place(epoch=epoch, batches=batches, state=state)
    encode_place(7, place, row)
    assert decode_place(row) == place


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.bool])
def test_tensors_in_a_loaders_state(dtype: torch.dtype) -> None:
    """Of any shape, empty ones and scalars too; strided ones by their elements."""
    tensors = [torch.zeros(0, 2), torch.tensor(1), torch.arange(12).view(3, 4).t()]
    state = {"generator": torch.Generator().get_state(), "some": tuple(t.to(dtype) for t in tensors)}
    row = torch.empty(1 << 16, dtype=torch.uint8)
    encode_place(0, Place(state=state), row)
    found = decode_place(row).state
    torch.testing.assert_close(found, state, rtol=0, atol=0)
    assert isinstance(found["some"], tuple)


def test_states_that_cannot_be_saved_are_refused_by_name() -> None:
    """With the shard, and the place in its loader's state; and what is too long, with the bytes it needs."""
    row = torch.empty(100, dtype=torch.uint8)
    with pytest.raises(UnsupportedState, match=r"the state of shard 3\.a\[1\] is a builtins\.complex"):
        encode_place(3, Place(state={"a": [1, 2j]}), row)
    with pytest.raises(UnsupportedState, match="the state of shard 3 takes 2016 bytes"):
        encode_place(3, Place(state="x" * 2000), row)


def test_only_shards_that_were_read_are_asked_for_their_state() -> None:
    """What a snapshot costs does not grow with the number of shards; and a DTensor says whose rows these are."""
    asked = Counter[int]()

    class Asked(Counting):
        def state_dict(self) -> dict[str, Any]:
            asked[self.shard] += 1
            return super().state_dict()

    stream = ElasticStream(Asked, shards=8, micro_batches=2, world=world({"data": 1, "tp": 2}, 1), seed=0)
    stream.state_dict()
    for step in range(3):
        list(stream.micro_batches(step))
        places = stream.state_dict()["places"]
    assert dict(asked) == dict.fromkeys(range(6), 1)
    assert isinstance(places, DTensor)
    assert tuple(places.shape) == (2, 4, 16384)
    before = places.to_local().clone()
    list(stream.micro_batches(3))
    stream.state_dict()
    assert torch.equal(places.to_local(), before), "a state that was given out stays as it was"


def test_random_numbers_of_a_unit_do_not_depend_on_the_world() -> None:
    """What dropout draws is the unit's, on any rank; and the loader's own draws are the shard's."""

    def open_shard(shard: int, epoch: int) -> Iterator[float]:
        return (torch.rand(()).item() for _ in itertools.repeat(None))

    def draws(ranks: int) -> set[tuple[int, float, float]]:
        streams = [
            ElasticStream(open_shard, shards=4, micro_batches=4, world=r, seed=1) for r in worlds({"data": ranks})
        ]
        return {
            (each.shard, each.batch, torch.rand(()).item())
            for stream in streams
            for each in stream.micro_batches(3)
            if each.weight
        }

    assert draws(1) == draws(2) == draws(3)
    assert len({number for _, *both in draws(1) for number in both}) == 8
