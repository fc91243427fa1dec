"""State: what is captured comes back exactly, into fresh objects, without stepping anything."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from resilient_train.errors import StateMismatch, UnsupportedState
from resilient_train.image.arena import Slot, create_memory
from resilient_train.image.reader import ImageReader
from resilient_train.image.snapshot import ImageWriter
from resilient_train.plan.recovery import Holders
from resilient_train.spec.shard import Entry, plan_image
from resilient_train.spec.sharding import Cut
from resilient_train.spec.world import Key
from resilient_train.worker.fill import fill
from resilient_train.worker.sources import Images
from resilient_train.worker.state import State

KEY = Key(1, 1)


def saved(
    state: State,
    rank: int = 0,
    world: int = 1,
    placed: Callable[[Entry], Entry] = lambda entry: entry,
    *,
    alike: bool = False,
) -> ImageReader:
    """An image of the state, as bytes in memory; ``placed`` says which part of the whole an entry is."""
    slot = written(state, rank, world, placed, alike=alike)
    data = bytes(slot.map)
    slot.close()
    return ImageReader("image", len(data), lambda at, n: data[at : at + n])


def images_of(readers: Sequence[ImageReader]) -> Images:
    """The images of all ranks."""
    by_rank = {reader.stamp.rank: reader for reader in readers}
    return Images(Holders(world=readers[0].stamp.world, ranks=by_rank.keys()), by_rank.__getitem__)


def written(
    state: State,
    rank: int = 0,
    world: int = 1,
    placed: Callable[[Entry], Entry] = lambda entry: entry,
    *,
    alike: bool = False,
    key: Key = KEY,
) -> Slot:
    """The same in shared memory, for the caller to close."""
    frame = state.capture(rank)
    frame_parts = [dataclasses.replace(part, entry=placed(part.entry)) for part in frame.parts]
    layout = plan_image([part.entry for part in frame_parts], len(frame.document) + 10, alike=alike)
    fd = create_memory("test", layout.total)
    slot = Slot(fd)
    os.close(fd)
    by_name = {part.entry.name: part for part in frame_parts}
    parts = [by_name[entry.name] for entry in layout.entries]
    writer = ImageWriter(layout, parts, rank, world)
    assert writer.begin(slot, key, parts, frame.document)
    assert writer.conclude() == []
    return slot


def model(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5, bias=False))
    return net.to(dtype)


def train(net: nn.Module, optim: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(8, 5, dtype=next(net.parameters()).dtype)
        (net(x) - x).square().mean().backward()
        optim.step()
        optim.zero_grad()


OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "weight_decay": 0.0}]),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_exactly_as_if_nothing_had_happened(kind: str, dtype: torch.dtype) -> None:
    """Restored into fresh objects, three further steps give the same bits."""
    one = model(0, dtype)
    optim = OPTIMIZERS[kind](list(one.parameters()))
    train(one, optim)
    image = saved(State(model=one, optim=optim))
    two = model(1, dtype)
    fresh = OPTIMIZERS[kind](list(two.parameters()))
    fill(State(model=two, optim=fresh), images_of([image]), 0, 1)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert optim.state[p].keys() == fresh.state[q].keys()
        for key, value in optim.state[p].items():
            assert torch.equal(value, fresh.state[q][key]) if isinstance(value, torch.Tensor) else True
            if isinstance(value, torch.Tensor):
                assert value.dtype == fresh.state[q][key].dtype
    train(one, optim)
    train(two, fresh)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(4, 100), (100, 4), (3, 1, 50)])
def test_an_expanded_buffer_is_restored_to_the_memory_that_it_has(shape: tuple[int, ...]) -> None:
    """Nothing behind it is written; what no expanded tensor can hold is refused."""

    def net(values: torch.Tensor) -> nn.Module:
        made = nn.Module()
        made.register_buffer("table", values)
        return made

    row = torch.arange(float(shape[-1]))
    image = saved(State(model=net(row.expand(shape).contiguous())))
    memory = torch.full((10 * shape[-1],), -1.0)
    two = net(memory[: shape[-1]].expand(shape))
    fill(State(model=two), images_of([image]), 0, 1)
    assert torch.equal(memory[: shape[-1]], row)
    assert (memory[shape[-1] :] == -1).all()
    assert torch.equal(saved(State(model=two)).tensor(image.entries()[0]), row.expand(shape))
    differing = saved(State(model=net(torch.arange(float(math.prod(shape))).view(shape))))
    with pytest.raises(StateMismatch, match=r"table is expanded along dimension 0"):
        fill(State(model=two), images_of([differing]), 0, 1)
    column = torch.arange(float(shape[0])).view(-1, *[1] * (len(shape) - 1))
    memory = torch.full((10 * shape[0],), -1.0)
    upright = net(memory[: shape[0]].view_as(column).expand(shape))
    fill(State(model=upright), images_of([saved(State(model=net(column.expand(shape))))]), 0, 1)
    assert torch.equal(memory[: shape[0]], column.view(-1))
    assert (memory[shape[0] :] == -1).all()


def test_restoring_never_aliases_the_image() -> None:
    """Training on does not change what was saved."""
    net = model(0)
    optim = torch.optim.AdamW(net.parameters())
    train(net, optim)
    image = saved(State(model=net, optim=optim))
    before = net[0].weight.detach().clone()
    fill(State(model=net, optim=optim), images_of([image]), 0, 1)
    train(net, optim)
    assert not torch.equal(before, net[0].weight)
    fill(State(model=net, optim=optim), images_of([image]), 0, 1)
    assert torch.equal(before, net[0].weight)


def test_float32_state_of_bfloat16_parameters_keeps_its_dtype() -> None:
    """torch's own load_state_dict would cast it."""
    net = model(0, torch.bfloat16)
    optim = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        optim.state[parameter]["momentum_buffer"] = torch.rand(parameter.shape, dtype=torch.float32)
    image = saved(State(model=net, optim=optim))
    fresh_net = model(1, torch.bfloat16)
    fresh = torch.optim.SGD(fresh_net.parameters(), lr=0.1, momentum=0.9)
    fill(State(model=fresh_net, optim=fresh), images_of([image]), 0, 1)
    for p, q in zip(net.parameters(), fresh_net.parameters(), strict=True):
        restored = fresh.state[q]["momentum_buffer"]
        assert restored.dtype == torch.float32
        assert torch.equal(restored, optim.state[p]["momentum_buffer"])


@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_of_any_dtype_and_order_is_filled_from_several_images(turned: bool) -> None:
    """What each image holds of it is put beside what the others hold."""

    def net(value: torch.Tensor) -> nn.Module:
        held = nn.Module()
        held.w = nn.Parameter(value)
        return held

    def half(rank: int) -> Callable[[Entry], Entry]:
        def moved(entry: Entry) -> Entry:
            if entry.name != "net/w":
                return entry
            return dataclasses.replace(entry, global_shape=(48, 6, 8), offset=(24 * rank, 0, 0), cuts=(Cut(0, 2, 1),))

        return moved

    value = torch.randn(48, 6, dtype=torch.complex64)
    halves = [value[:24].t().contiguous().t(), value[24:].clone()]
    images = [saved(State(net=net(part)), rank, 2, half(rank)) for rank, part in enumerate(halves)]
    target = net(torch.zeros(6, 48, dtype=value.dtype).t() if turned else torch.zeros(48, 6, dtype=value.dtype))
    fill(State(net=target), images_of(images), 0, 1)
    assert torch.equal(target.w, value)


def test_schedulers_and_things_of_ones_own() -> None:
    """Anything with a state_dict of tensors and JSON values."""

    class Counter:
        def __init__(self) -> None:
            self.state = {"n": 0, "ema": torch.zeros(3, dtype=torch.complex128), "pair": (1, 2), 5: [None, "x"]}
            self.state |= {"own": {"$tensor": "mine"}, "$tensor": {"$tuple": 1}, "count": collections.Counter("aab")}
            self.state["order"] = collections.OrderedDict(b=torch.ones(2), a=1)

        def state_dict(self) -> dict:
            return self.state

        def load_state_dict(self, state: dict) -> None:
            self.state = state

    net = model(0)
    optim = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 0.3, total_steps=50)
    for _ in range(7):
        optim.step()
        schedule.step()
    counter = Counter()
    counter.state["n"] = 7
    counter.state["ema"] += 2 + 1j
    image = saved(State(model=net, optim=optim, schedule=schedule, counter=counter))
    net2 = model(0)
    optim2 = torch.optim.SGD(net2.parameters(), lr=0.1)
    schedule2 = torch.optim.lr_scheduler.OneCycleLR(optim2, 0.3, total_steps=50)
    counter2 = Counter()
    fill(State(model=net2, optim=optim2, schedule=schedule2, counter=counter2), images_of([image]), 0, 1)
    assert schedule2.state_dict() == schedule.state_dict()
    assert optim2.param_groups[0]["lr"] == optim.param_groups[0]["lr"]
    assert torch.equal(counter2.state.pop("ema"), counter.state.pop("ema"))
    orders = counter2.state.pop("order"), counter.state.pop("order")
    assert torch.equal(orders[0].pop("b"), orders[1].pop("b"))
    assert orders[0] == orders[1]
    assert isinstance(orders[0], collections.OrderedDict)
    assert isinstance(counter2.state["count"], collections.Counter)
    assert counter2.state == counter.state


def test_a_scheduler_goes_on_with_what_it_counts() -> None:
    """MultiStepLR asks its milestones for what only a Counter answers."""
    optims = [torch.optim.SGD(model(0).parameters(), lr=0.1) for _ in range(2)]
    one, two = (torch.optim.lr_scheduler.MultiStepLR(optim, [2, 4]) for optim in optims)
    fill(State(schedule=two), images_of([saved(State(schedule=one))]), 0, 1)
    optims[1].step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        two.step(5)


def test_names_do_not_depend_on_wrappers() -> None:
    """A compiled or checkpoint-wrapped module has the names of the module inside."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = model(0)
    names = [part.entry.name for part in State(model=plain).capture(0).parts]
    wrapped = model(0)
    wrapped[2] = checkpoint_wrapper(wrapped[2])
    assert [part.entry.name for part in State(model=torch.compile(wrapped)).capture(0).parts] == names
    assert "model/0.weight" in names


def test_tied_parameters_are_stored_once() -> None:
    """Both names show the restored values."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    one, two = Tied(), Tied()
    frame = State(model=one).capture(0)
    assert sum(part.entry.name.startswith("model/") for part in frame.parts) == 1
    assert json.loads(frame.document)["model"]["aliases"] == {"head.weight": "embed.weight"}
    fill(State(model=two), images_of([saved(State(model=one))]), 0, 1)
    assert torch.equal(two.head.weight, one.embed.weight)
    assert two.head.weight is two.embed.weight


def test_random_generators_come_along() -> None:
    """torch, numpy and random continue where they were, on the same rank of the same layout only."""
    net = model(0)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    image = saved(State(model=net))
    expected = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())
    torch.manual_seed(6), np.random.seed(6), random.seed(6)
    fill(State(model=net), images_of([image]), 0, 1)
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == expected
    torch.manual_seed(6)
    other = torch.rand(2).tolist()
    torch.manual_seed(6)
    fill(State(model=net), images_of([image]), 0, 2)
    assert torch.rand(2).tolist() == other


def test_another_models_checkpoint_names_the_tensors() -> None:
    """A StateMismatch says which tensors differ and how, and leaves the model alone."""
    image = saved(State(model=model(0)))
    other = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Linear(9, 5))
    before = other[0].weight.detach().clone()
    with pytest.raises(StateMismatch) as caught:
        fill(State(model=other), images_of([image]), 0, 1)
    assert "model/0.weight: shape [9, 5] here, [7, 5] there" in str(caught.value)
    assert "model/2.bias [5]: not in the checkpoint" in str(caught.value)
    assert torch.equal(before, other[0].weight)
    net = model(0)
    state = State(model=net, optim=torch.optim.SGD(net.parameters(), lr=1))
    with pytest.raises(StateMismatch, match="holds model; this state has model, optim"):
        fill(state, images_of([image]), 0, 1)


def test_what_cannot_be_saved_is_named() -> None:
    """Opaque values and sparse tensors are refused by name, when they are saved."""

    class Opaque:
        def state_dict(self) -> dict:
            return {"ok": 1, "bad": object()}

        def load_state_dict(self, state: dict) -> None: ...

    with pytest.raises(UnsupportedState, match=r"thing\.bad"):
        State(thing=Opaque()).capture(0)
    net = nn.Module()
    net.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(UnsupportedState, match="model/table"):
        State(model=net).capture(0)
    held = nn.Module()
    with pytest.warns(UserWarning, match="deprecated"):
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for odd in (torch.empty(2, device="meta"), quantized):
        held.register_buffer("odd", odd)
        with pytest.raises(UnsupportedState, match="held/odd"):
            State(held=held).capture(0)
    with pytest.raises(UnsupportedState, match="x is a int"):
        State(x=3)


def test_extra_state_of_modules() -> None:
    """get_extra_state and set_extra_state take part, if they are JSON."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def get_extra_state(self) -> dict:
            return {"seen": self.seen}

        def set_extra_state(self, state: dict) -> None:
            self.seen = state["seen"]

    one, two = nn.Sequential(Counting()), nn.Sequential(Counting())
    one[0].seen = 11
    fill(State(model=two), images_of([saved(State(model=one))]), 0, 1)
    assert two[0].seen == 11


def test_one_optimizer_over_two_modules() -> None:
    """Parameters of the same path in different parts of the state are told apart."""
    one, two = (model(0), model(1)), (model(2), model(3))
    optims = [torch.optim.AdamW([p for net in nets for p in net.parameters()], lr=0.01) for nets in (one, two)]
    for net in one:
        train(net, optims[0])
    fill(
        State(a=two[0], b=two[1], optim=optims[1]), images_of([saved(State(a=one[0], b=one[1], optim=optims[0]))]), 0, 1
    )
    for mine, theirs in zip(optims[0].param_groups[0]["params"], optims[1].param_groups[0]["params"], strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(optims[0].state[mine]["exp_avg"], optims[1].state[theirs]["exp_avg"])


def test_another_optimizer_is_refused_by_name() -> None:
    """Its options and state mean something else."""
    net = model(0)
    image = saved(State(model=net, optim=torch.optim.AdamW(net.parameters())))
    with pytest.raises(StateMismatch, match="optim is an optimizer SGD here, AdamW in the checkpoint"):
        fill(State(model=net, optim=torch.optim.SGD(net.parameters())), images_of([image]), 0, 1)


def test_what_a_state_needs_is_said() -> None:
    """Nothing, nameless things and the same thing twice are refused."""
    net = model(0)
    for things in ({}, {"": net}, {"a": net, "b": net}):
        with pytest.raises(UnsupportedState):
            State(**things)
