"""Lazy snapshots: whatever a training does between boundaries, an image is the state of one boundary or there is none.

The copier of these tests copies at the last moment it is allowed to, when it is waited for, and the thread that
publishes early is left out: whatever changes before a fence is caught in the image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from resilient_train import _native
from resilient_train.errors import UnsupportedState
from resilient_train.image import native, snapshot
from resilient_train.image.arena import Board, Slot, create_memory
from resilient_train.image.native import Piece, PythonCopier, PythonEngine
from resilient_train.image.reader import ImageReader, memory_reader
from resilient_train.spec.world import Key
from resilient_train.worker import snapshots
from resilient_train.worker.slots import Slots
from resilient_train.worker.snapshots import FIRST_AUDITS, Snapshots
from resilient_train.worker.state import State


class LatestCopier(PythonCopier):
    """Copies lazy pieces only when it is waited for."""

    def __init__(self, pieces: list[Piece], data_start: int, table_start: int) -> None:
        super().__init__(pieces, data_start, table_start)
        now = [piece if piece[3] else (piece[0], 0, piece[2], True) for piece in pieces]
        late = [piece if not piece[3] else (piece[0], 0, piece[2], True) for piece in pieces]
        self._now = PythonCopier(now, data_start, table_start)
        self._late = PythonCopier(late, data_start, table_start)
        self._due = False

    def start(self, image: int, all_now: bool = False) -> None:
        self._image = image
        if all_now:
            super().start(image)
        else:
            self._now.start(image)
            self._due = True

    def wait(self) -> None:
        if self._due:
            self._due = False
            self._late.start(self._image)


class LatestEngine(PythonEngine):
    def Copier(self, pieces: Any, data_start: int, table_start: int, threads: int = 1) -> LatestCopier:  # noqa: N802
        return LatestCopier(pieces, data_start, table_start)


class Keeper:
    """Memory without a keeper process."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.board: Board | None = None

    def allocate(self, size: int, ahead: int = 0) -> tuple[int, Slot]:
        fd = create_memory("test", size)
        self.slots.append(Slot(fd))
        os.close(fd)
        return len(self.slots), self.slots[-1]

    def discard(self, number: int) -> None:
        pass


class Host:
    """What `Snapshots` needs of a host."""

    index = 0

    def __init__(self) -> None:
        self.keeper = Keeper()
        self.slots = Slots(self.keeper)  # type: ignore[arg-type]
        fd = Board.create(1)
        self.board = self.keeper.board = Board(fd)
        os.close(fd)


@pytest.fixture
def latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "engine", LatestEngine())
    monkeypatch.setattr(native, "_sum", _native.crc32c)
    monkeypatch.setattr(Snapshots, "_publish", lambda self: None)
    monkeypatch.setattr(snapshots, "AT_ONCE", 0)


class Run:
    """A training whose state is snapshotted at every boundary and compared with copies made there."""

    def __init__(self, *, lazy: bool = True, **things: Any) -> None:
        self.host = Host()
        self.state = State(**things)
        self.snapshots = Snapshots(self.state, self.host, 0, 1, lazy=lazy)  # type: ignore[arg-type]
        self.step = 0
        self.expected: dict[str, torch.Tensor] = {}
        self.published = 0

    def boundary(self, **kind: bool) -> None:
        """Check the image of the boundary before, and begin that of this one."""
        self.check()
        self.step += 1
        frame = self.state.capture(0)
        self.expected = {p.entry.name: torch.cat([flat(source) for source in p.sources]) for p in frame.parts}
        self.document = frame.document
        assert self.snapshots.take(Key(1, self.step), Key(1, self.step - 1), {1: None}, **kind)

    def check(self) -> None:
        """The image of the last boundary is that boundary's state, or there is none."""
        self.snapshots.settle()
        for own in self.host.slots.all():
            if own.key == Key(1, self.step) and self.step:
                self.published += 1
                with own.memory.reading(own.key) as view:
                    assert view is not None
                    self.compare(memory_reader("image", view))

    def compare(self, reader: ImageReader) -> None:
        held = {entry.name: reader.tensor(entry) for entry in reader.entries()}
        assert held.keys() == self.expected.keys()
        for name, value in held.items():
            assert flat(value).equal(self.expected[name]), (name, self.step)
        assert reader.json() == json.loads(self.document)
        reader.release()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).clone()


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40)).to(dtype)


def backward(model: nn.Module) -> None:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.randn(8, 40, dtype=parameter.dtype)
    (model(x) - x).square().mean().backward()


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("latest")
def test_optimizers_wait_for_the_copy(kind: str, dtype: torch.dtype) -> None:
    """Every image is whole, and after the first steps nothing has to be copied at the boundary."""
    model = net(dtype)
    optim = OPTIMIZERS[kind](list(model.parameters()))
    run = Run(model=model, optim=optim)
    for _ in range(8):
        run.boundary()
        backward(model)
        optim.step()
        optim.zero_grad()
    run.check()
    assert run.published == 8
    assert not run.snapshots._eager


@pytest.mark.usefixtures("latest")
def test_several_optimizers_accumulation_and_a_skipped_step() -> None:
    """The first optimizer to step fences; a step that never comes is fenced by the next boundary."""
    model = net()
    first, second = OPTIMIZERS["adamw"](list(model[0].parameters())), OPTIMIZERS["sgd"](list(model[2].parameters()))
    run = Run(model=model, first=first, second=second)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(8):
        run.boundary()
        for _ in range(3):
            loss = (model(torch.randn(8, 40))).square().mean()
            scaler.scale(loss * (float("inf") if step == 5 else 1.0)).backward()
        for optim in (first, second):
            scaler.step(optim)
        scaler.update()
        first.zero_grad(), second.zero_grad()
    run.check()
    assert run.published == 8
    assert not run.snapshots._eager


@pytest.mark.usefixtures("latest")
def test_lbfgs() -> None:
    """Its state holds lists and numbers, and its step runs the model several times."""
    model = net()
    optim = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=3)
    run = Run(model=model, optim=optim)
    x = torch.randn(8, 40)

    def closure() -> torch.Tensor:
        optim.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        return loss

    for _ in range(6):
        run.boundary()
        optim.step(closure)
    run.check()
    assert run.published == 6


@pytest.mark.usefixtures("latest")
def test_an_optimizer_in_the_backward_pass() -> None:
    """The first parameter's step, in the middle of backward, fences all."""
    model = net()
    optims = {p: torch.optim.AdamW([p], lr=0.01) for p in model.parameters()}

    def hook(parameter: torch.Tensor) -> None:
        optims[parameter].step()
        optims[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    run = Run(model=model, **{f"optim{i}": optim for i, optim in enumerate(optims.values())})
    for _ in range(6):
        run.boundary()
        backward(model)
    run.check()
    assert run.published == 6
    assert not run.snapshots._eager


@pytest.mark.usefixtures("latest")
def test_a_compiled_step() -> None:
    """Compiled or not, no image mixes two steps."""
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    compiled = torch.compile(lambda: optim.step(), backend="eager")
    run = Run(model=model, optim=optim)
    for _ in range(6):
        run.boundary()
        backward(model)
        compiled()
        optim.zero_grad()
    run.check()
    assert run.published == 6


def overwrite(model: nn.Module) -> None:
    """What no version counter shows."""
    model[0].weight.data.copy_(torch.randn(60, 40))


def count_up(model: nn.Module) -> None:
    """What a version counter shows."""
    with torch.no_grad():
        model[0].weight.add_(1.0)


def exchange(model: nn.Module) -> None:
    """Other memory behind the same parameter."""
    model[0].weight.data = torch.randn(60, 40)


@pytest.mark.parametrize("change", [overwrite, count_up])
@pytest.mark.usefixtures("latest")
def test_writers_that_keep_to_no_rule_are_found_out(
    change: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A parameter that is written during forward is named once and copied at the boundary from then on."""
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = Run(model=model, optim=optim)
    for _ in range(8):
        run.boundary()
        backward(model)
        change(model)
        optim.step()
        optim.zero_grad()
    run.check()
    assert run.published == 8, "audited images are copied at once and need not be dropped"
    assert run.snapshots._eager == {"model/0.weight"}
    assert caplog.text.count("model/0.weight") == 1


@pytest.mark.usefixtures("latest")
def test_a_writer_that_begins_late_costs_one_image() -> None:
    """After the first audits a version counter still shows it: the torn image is dropped, the next ones are whole."""
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = Run(model=model, optim=optim)
    for step in range(9):
        run.boundary()
        backward(model)
        if step > FIRST_AUDITS:
            count_up(model)
        optim.step()
        optim.zero_grad()
    run.check()
    assert run.published == 8
    assert run.snapshots._eager == {"model/0.weight"}


@pytest.mark.usefixtures("latest")
def test_what_is_made_durable_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that begins late and that no counter shows: the state that is saved next is whole, and finds it out."""
    monkeypatch.setattr(snapshots, "AUDIT_AFTER", 0.0)
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = Run(model=model, optim=optim)
    for step in range(6):
        run.boundary(durable=step == 5)
        backward(model)
        if step == 5:
            overwrite(model)
        optim.step()
        optim.zero_grad()
    run.check()
    assert run.published == 6
    assert run.snapshots._eager == {"model/0.weight"}


@pytest.mark.usefixtures("latest")
def test_exchanged_memory_is_followed() -> None:
    """``p.data = other`` before a boundary: the image is of the new memory."""
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = Run(model=model, optim=optim)
    for step in range(8):
        run.boundary()
        backward(model)
        optim.step()
        optim.zero_grad()
        if step % 2:
            exchange(model)
    run.check()
    assert run.published == 8


def transpose(model: nn.Module) -> None:
    """The same memory in another order."""
    model.square.data = model.square.data.t()
    model.table.t_()


def reinterpret(model: nn.Module) -> None:
    """The same memory as other numbers."""
    model.square.data = model.square.data.view(torch.int32).view(torch.float32)
    other = torch.int32 if model.table.dtype == torch.float32 else torch.float32
    model.table.data = model.table.data.view(other)


@pytest.mark.parametrize("change", [transpose, reinterpret])
@pytest.mark.usefixtures("latest")
def test_another_shape_of_the_same_memory_is_followed(change: Callable[[nn.Module], None]) -> None:
    """Strides and dtypes are a part of what was walked."""
    model = net()
    model.square = nn.Parameter(torch.randn(64, 64))
    model.register_buffer("table", torch.randn(8, 8))
    optim = torch.optim.SGD(model[0].parameters(), lr=0.01)
    run = Run(model=model, optim=optim)
    for step in range(8):
        run.boundary()
        (model[0](torch.randn(8, 40))).square().mean().backward()
        optim.step()
        optim.zero_grad()
        if step % 3 == 1:
            change(model)
    run.check()
    assert run.published == 8


class Twice:
    """An object that gives two tensors one name for a while."""

    def __init__(self) -> None:
        self.clashing = False

    def state_dict(self) -> dict[str, Any]:
        return {"a": {"b": torch.zeros(4)}, "a/b": torch.ones(4)} if self.clashing else {"z": torch.arange(4.0)}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.usefixtures("latest")
def test_a_state_that_is_refused_is_refused_again() -> None:
    """The plan of the state before it is no plan for it; once it can be saved, it is."""
    thing = Twice()
    run = Run(model=net(), thing=thing)
    run.boundary()
    thing.clashing = True
    for step in (2, 3):
        with pytest.raises(UnsupportedState, match="same name: thing/a/b"):
            run.snapshots.take(Key(1, step), Key(1, step - 1), {1: None})
    thing.clashing = False
    run.boundary()
    run.check()
    assert run.published == 2


class Odd(nn.Module):
    """Everything a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 40), nn.Linear(40, 40, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(40)
        self.wide = nn.utils.parametrizations.weight_norm(nn.Linear(40, 60))
        self.back = nn.utils.parametrizations.spectral_norm(nn.Linear(60, 40))
        self.frozen = nn.Linear(40, 40).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(2000))
        self.empty, self.scalar = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(1.0))
        self.sixteen = nn.Parameter(torch.randn(50, 50).to(torch.bfloat16))
        self.register_buffer("eight", torch.randn(80, 80).to(torch.float8_e4m3fn))
        self.strided = nn.Parameter(torch.randn(60, 50).t())
        self.turned = nn.Parameter(torch.randn(60, 50, dtype=torch.complex64).t())
        self.register_buffer("conjugated", torch.randn(50, dtype=torch.complex64).conj())
        self.register_buffer("counts", torch.zeros(3000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts += 1
        y = self.back(self.wide(self.norm(self.head(x)))) * self.scalar + self.frozen(x)
        return y + self.sixteen.float().mean() + self.strided.mean() + self.turned.abs().mean()


@pytest.mark.usefixtures("latest")
def test_everything_a_model_may_hold() -> None:
    """Tied, frozen, unused, parametrized, empty, scalar, strided, conjugated, of many dtypes; buffers; averages."""
    model = Odd()
    optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 10)
    run = Run(model=model, optim=optim, average=average, schedule=schedule)
    for _ in range(8):
        run.boundary()
        backward(model)
        optim.step()
        optim.zero_grad()
        schedule.step()
        average.update_parameters(model)
    run.check()
    assert run.published == 8
    assert not run.snapshots._eager


@pytest.mark.usefixtures("latest")
def test_parameters_that_come_and_go() -> None:
    """A layer that is exchanged, and state that appears with the first step, are in the next image."""
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = Run(model=model, optim=optim)
    for step in range(8):
        run.boundary()
        backward(model)
        optim.step()
        optim.zero_grad()
        if step == 4:
            model[2] = nn.Linear(60, 40)
            optim.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
    run.check()
    assert run.published == 8


@pytest.fixture
def big_run() -> Iterator[tuple[nn.Module, torch.optim.Optimizer, Run]]:
    model = nn.Sequential(*(nn.Linear(700, 700) for _ in range(4)))
    optim = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    run = Run(model=model, optim=optim)
    yield model, optim, run
    run.snapshots.close()


def test_native_copies_in_the_background_are_whole(big_run: tuple[nn.Module, torch.optim.Optimizer, Run]) -> None:
    """With the native engine and its own threads, 25 MB of state, steps as short as they can be."""
    model, optim, run = big_run
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(15):
        run.boundary()
        optim.step()
    run.check()
    assert run.published == 15


def test_an_image_is_published_without_waiting_for_a_boundary(
    big_run: tuple[nn.Module, torch.optim.Optimizer, Run],
) -> None:
    """A loss in the middle of a step finds the image of its beginning."""
    _, _, run = big_run
    for _ in range(FIRST_AUDITS + 2):
        run.boundary()
        running = run.snapshots._running
        assert running is not None
        while running.slot.memory.stamp() is None:
            os.sched_yield()


def test_eager_snapshots_are_complete_at_once() -> None:
    """``lazy=False``: nothing of a later change can be in the image, hooks or no hooks."""
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = Run(model=model, optim=optim, lazy=False)
    for _ in range(4):
        run.boundary()
        overwrite(model)
        backward(model)
        optim.step()
    run.check()
    assert run.published == 4
