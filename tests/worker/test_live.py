"""Live state: what is left behind of a boundary without a snapshot is that boundary's state, or nothing."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lazy import Odd, Run, backward, count_up, exchange, flat, net, overwrite, transpose
from torch import nn

from resilient_train import _native
from resilient_train.image import native, snapshot
from resilient_train.image.arena import Slot
from resilient_train.image.native import PythonEngine
from resilient_train.image.reader import memory_reader
from resilient_train.spec.world import Key
from resilient_train.worker import live
from resilient_train.worker.rng import rng_name


class Kept(Run):
    """A training with a snapshot at the first boundaries only, that ends in the middle of a step."""

    def kept(self) -> None:
        """A boundary without a snapshot."""
        self.snapshots.settle()
        self.step += 1
        self.snapshots.keep(Key(1, self.step))
        frame = self.state.capture(0)
        self.expected = {p.entry.name: torch.cat([flat(source) for source in p.sources]) for p in frame.parts}
        self.document = frame.document

    def leave(self) -> bool:
        """End here; whether an image was left behind, which is the last boundary's."""
        self.snapshots.settle()
        # Restoring may not depend on who draws or changes what from now on.
        key = self.snapshots.publish_live(Key(1, self.step - 1), {1: None})
        held = [own for own in self.host.slots.all() if own.key == Key(1, self.step)]
        assert (key == Key(1, self.step)) == (len(held) == 1)
        for own in held:
            with own.memory.reading(Key(1, self.step)) as view:
                assert view is not None
                self.compare(memory_reader("image", view))
        self.snapshots.close()
        return bool(held)


def step_of(model: nn.Module, optim: torch.optim.Optimizer) -> None:
    backward(model)
    optim.step()
    optim.zero_grad()


def odd() -> nn.Module:
    """Everything a model may hold, but for what snapshots have to walk anew each time."""
    model = Odd()
    del model.conjugated
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def started(model: nn.Module | None = None, *, snapshots: int = 2, **things: Any) -> tuple[Any, Any, Kept]:
    """(model, optimizer, a run at a boundary without a snapshot)."""
    model = model or net()
    optim = adamw(model)
    run = Kept(model=model, optim=optim, **things)
    for _ in range(snapshots):
        run.boundary()
        step_of(model, optim)
    for _ in range(2):
        run.kept()
        step_of(model, optim)
    run.kept()
    return model, optim, run


def test_what_stands_at_the_boundary_is_left_behind() -> None:
    """Nothing ran since: the image is the boundary's."""
    _, _, run = started()
    assert run.leave()


def test_also_without_the_native_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback puts aside the same."""
    for module in (snapshot, live):
        monkeypatch.setattr(module, "engine", PythonEngine())
    monkeypatch.setattr(native, "_sum", _native.crc32c)
    _, _, run = started(odd())
    assert run.leave()


def test_forward_and_backward_change_nothing_that_counts() -> None:
    """Gradients, several passes of them, are no part of the state; buffers and generators are put back."""
    model, _, run = started(odd())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _ in range(3):
        backward(model)
    torch.rand(5)
    assert not before["norm.running_mean"].equal(model.norm.running_mean)
    assert not run.expected[rng_name(0, "torch")].equal(torch.get_rng_state())
    assert run.leave()


def test_options_and_documents_are_put_back() -> None:
    """A learning rate that was set for the step, a scheduler and a scaler that counted: as at the boundary."""
    model = net()
    optim = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    run = Kept(model=model, optim=optim, schedule=schedule, scaler=scaler)
    for last in (False, False, True):
        (run.kept if last else run.boundary)()
        scaler.scale(model(torch.randn(8, 40)).square().mean() * (float("inf") if last else 1.0)).backward()
        scaler.step(optim)  # The last one is skipped.
        scaler.update()
        optim.zero_grad()
        if last:
            for group in optim.param_groups:
                group["lr"] = 7.0
        else:
            schedule.step()
    assert run.leave()


def test_a_step_that_the_scaler_skips_is_a_step() -> None:
    """No optimizer stepped, and the boundary after it has a number and a state of its own."""
    model, optim, run = started()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.randn(8, 40)).square().mean() * float("inf")).backward()
    scaler.step(optim)
    run.kept()
    assert run.leave()


def test_nothing_is_left_once_an_optimizer_has_begun() -> None:
    """Even if it fails before it changes anything."""
    model, optim, run = started()
    backward(model)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of the optimizer")

    optim.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        optim.step()
    assert not run.leave()


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_is_left_of_a_finished_optimizer_step(fused: bool) -> None:
    """Before the next boundary nobody knows whether the step was complete; no counter shows fused steps."""
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    run = Kept(model=model, optim=optim)
    run.boundary()
    step_of(model, optim)
    run.kept()
    step_of(model, optim)
    assert not run.leave()


def test_an_optimizer_in_the_backward_pass() -> None:
    """An error after the first parameter's step leaves nothing, one before it everything."""
    model = net()
    optims = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
    fails: set[int] = set()

    def hook(parameter: torch.Tensor) -> None:
        if id(parameter) in fails:
            raise RuntimeError("in the middle of backward")
        optims[parameter].step()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    last = model[0].weight  # The last layer's gradients come first.
    left = []
    for failing in ({id(p) for p in model.parameters()}, {id(last)}):
        run = Kept(model=model, **{f"optim{i}": optim for i, optim in enumerate(optims.values())})
        fails.clear()
        run.boundary()
        backward(model)
        run.kept()
        fails |= failing
        with pytest.raises(RuntimeError, match="in the middle"):
            backward(model)
        left.append(run.leave())
    assert left == [True, False]


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_errors_in_the_middle_of_a_pass(place: str) -> None:
    """Whatever a pass left half done, the boundary's state is whole."""
    model, _, run = started(odd())

    def fail(*_: object) -> None:
        raise RuntimeError("the connection is gone")

    if place == "forward":
        model.back.register_forward_hook(fail)
    else:
        model.head.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="gone"):
        backward(model)
    assert run.leave()


@pytest.mark.parametrize("change", [count_up, exchange])
def test_parameters_that_forward_writes_for_the_first_time(change: Callable[[nn.Module], None]) -> None:
    """Counters and addresses show it: nothing is left."""
    model, _, run = started()
    change(model)
    assert not run.leave()


def test_another_shape_of_the_same_memory() -> None:
    """Strides show it: nothing is left."""
    model = net()
    model.square = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    model.register_buffer("table", torch.randn(8, 8))
    optim = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    run = Kept(model=model, optim=optim)
    run.boundary()
    run.kept()
    transpose(model)
    assert not run.leave()


def test_memory_that_is_exchanged_and_put_back() -> None:
    """Parameters that stand elsewhere at a boundary than at the one before are found there."""
    model, optim, run = started()
    weight, there = model[0].weight.data, torch.randn(60, 40)
    step_of(model, optim)
    model[0].weight.data = there
    run.kept()
    model[0].weight.data = weight
    assert not run.leave()


def test_writers_that_audits_have_found() -> None:
    """What no counter shows, an audit of the first snapshots has: it is put aside, and put back."""
    model = net()
    optim = adamw(model)
    run = Kept(model=model, optim=optim)
    for _ in range(3):
        run.boundary()
        backward(model)
        overwrite(model)
        optim.step()
    assert run.snapshots._eager == {"model/0.weight"}
    run.kept()
    backward(model)
    overwrite(model)
    assert run.leave()


def test_writers_that_no_snapshot_sees() -> None:
    """What changes only in steps that begin without a snapshot is found by the audit of such a step."""
    model = net()
    optim = adamw(model)
    run = Kept(model=model, optim=optim)
    left = []
    for _ in range(3):
        run.boundary()
        step_of(model, optim)
        run.kept()
        backward(model)
        overwrite(model)
        left.append(list(run.snapshots._eager))
        optim.step()
    assert left == [[], ["model/0.weight"], ["model/0.weight"]]
    run.kept()
    overwrite(model)
    assert run.leave()


def test_an_audited_boundary_is_proven() -> None:
    """A write that no counter shows: nothing is left behind of a boundary that was audited."""
    model = net()
    run = Kept(model=model, optim=adamw(model))
    run.boundary()
    run.kept()
    overwrite(model)
    assert not run.leave()


def test_a_snapshot_takes_the_place_of_what_was_kept() -> None:
    """There is one image of a boundary."""
    model, optim, run = started()
    step_of(model, optim)
    run.boundary()
    assert run.snapshots.publish_live(Key(1, run.step - 1), {1: None}) is None
    run.check()
    run.snapshots.close()


def test_eager_snapshots_keep_nothing() -> None:
    """``lazy=False`` says that optimizers step unseen."""
    model = net()
    run = Kept(lazy=False, model=model, optim=adamw(model))
    run.boundary()
    run.kept()
    assert not run.leave()


def test_a_state_that_changes_too_much_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries stay cheap: what would take long to put aside is not."""
    monkeypatch.setattr(live, "MOST_ASIDE", 2000)
    _, _, run = started()
    assert not run.snapshots._keeps
    assert not run.leave()


def test_without_a_free_slot_there_is_one_more() -> None:
    """Slots that storage holds must not cost the state."""
    _, _, run = started()
    slots = run.host.slots.all()
    for own in slots:
        own.held = True
    while list(run.host.slots.writable(slots[0].memory.size, None, {1: None})):
        for own in run.host.slots.all():
            own.held = True
    before = len(run.host.slots.all())
    assert run.leave()
    assert len(run.host.slots.all()) == before + 1


def test_a_slot_that_is_being_read_is_left_alone() -> None:
    """A reader keeps what it reads, and the state goes elsewhere."""
    _, _, run = started()
    first = run.host.slots.all()[-1]
    key = first.key
    assert key is not None
    fd = os.open(f"/proc/self/fd/{first.memory.fd}", os.O_RDWR)  # A reader has an open file of its own.
    reader = Slot(fd)
    os.close(fd)
    with reader.reading(key) as view:
        assert view is not None
        assert run.leave()
        assert memory_reader("image", view).stamp.key == key
    reader.close()


def test_what_a_boundary_costs() -> None:
    """A thousand parameters with AdamW, 3,000 tensors and 1,000 numbers: a few milliseconds of this thread's time."""
    parameters = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(1000)])
    optim = torch.optim.AdamW(parameters, lr=0.01, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    run = Kept(model=parameters, optim=optim)
    run.boundary()
    seconds = []
    for step in range(2, 30):
        optim.step()
        begun = time.thread_time()
        run.snapshots.keep(Key(1, step))
        seconds.append(time.thread_time() - begun)
    print(f"{statistics.median(seconds) * 1e3:.2f} ms")
    assert statistics.median(seconds[2:]) < 0.02
    run.snapshots.close()
