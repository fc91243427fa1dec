"""Lazy snapshots of a model on a CUDA device whose host is far ahead: on a fake driver, through all of `Snapshots`.

"The device's tensors" are torch's CPU tensors that the fake driver takes for its own.  The optimizer of these tests
does what a real one does there: it hands work to a stream and returns; the parameters change later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from resilient_train.image import device as devices
from resilient_train.image import snapshot
from resilient_train.image.arena import Board, Slot, create_memory
from resilient_train.image.reader import memory_reader
from resilient_train.spec.world import Key
from resilient_train.worker import live
from resilient_train.worker.slots import Slots
from resilient_train.worker.snapshots import FIRST_AUDITS, Snapshots
from resilient_train.worker.state import State

SLOW = 0.002
"""Seconds that a kernel, and a copy, takes here."""
SLOWLY = 1.0
"""Seconds of a copy that is to be under way still when the host has done a few things more."""


addressable, place = snapshot.addressable, snapshot.place


class Host:
    """What `Snapshots` needs of a host."""

    index = 0

    def __init__(self) -> None:
        self.slots = Slots(self)  # type: ignore[arg-type]
        self.count = 0
        fd = Board.create(1)
        self.board = Board(fd)
        os.close(fd)

    def allocate(self, size: int, ahead: int = 0) -> tuple[int, Slot]:
        fd = create_memory("test", size)
        slot = Slot(fd)
        os.close(fd)
        self.count += 1
        return self.count, slot

    def discard(self, number: int) -> None:
        pass


class Model(nn.Module):
    """Large and small parameters, a buffer that every forward changes, and one tensor that stays on the host."""

    def __init__(self, here: int) -> None:
        super().__init__()
        self.large = nn.ParameterList([nn.Parameter(torch.zeros(400, 300)) for _ in range(5)])
        self.small = nn.ParameterList([nn.Parameter(torch.zeros(1500)) for _ in range(20)])
        self.register_buffer("counts", torch.zeros(100))
        self.here = nn.Parameter(torch.zeros(here))


class Training:
    """A training on the fake device: after step k every byte of every parameter is k, of the buffer 100 + k."""

    def __init__(self, cuda: Any, monkeypatch: pytest.MonkeyPatch, *, kernels: bool = True, here: int = 3000) -> None:
        self.cuda, self.stream = cuda, cuda.stream()
        self.model, self.host = Model(here), Host()
        self.claimed = {
            tensor.data_ptr(): tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if name != "here"
        }
        for address, tensor in self.claimed.items():
            cuda.claim(address, tensor.nbytes)
        monkeypatch.setattr(devices, "_devices", {0: cuda.device(kernels=kernels)})
        for module in (snapshot, devices, live):
            monkeypatch.setattr(module, "device_of", self.device_of)
            monkeypatch.setattr(module, "stream_of", lambda tensor: self.stream)
        for module in (snapshot, live):
            monkeypatch.setattr(module, "addressable", self.addressable)
            monkeypatch.setattr(module, "place", self.place)
        self.optim = Optimizer(self)
        self.snapshots = Snapshots(State(model=self.model), self.host, 0, 1, lazy=True)  # type: ignore[arg-type]
        self.step = 0
        self.published: list[int] = []

    def device_of(self, tensor: torch.Tensor) -> Any:
        return devices._devices[0] if tensor.data_ptr() in self.claimed else None

    def addressable(self, tensor: torch.Tensor, device: Any) -> bool:
        if tensor.data_ptr() in self.claimed:
            return devices._devices[0] is not None
        return addressable(tensor, device)

    def place(self, *parts: Any) -> None:
        """What torch copies from a device it copies behind the device's work."""
        self.cuda.finish(self.stream)
        place(*parts)

    def write(self, tensor: torch.Tensor, byte: int) -> None:
        """Hand a kernel to the device; the version counter counts at once."""
        self.cuda.compute(self.stream, tensor.detach().numpy(), byte, SLOW / 4)

    def boundary(self) -> None:
        """Check the image of the boundary before, and begin that of this one."""
        self.check()
        self.step += 1
        assert self.snapshots.take(Key(1, self.step), Key(1, self.step - 1), {1: None})

    def kept(self) -> None:
        """A boundary without a snapshot."""
        self.check()
        self.step += 1
        self.snapshots.keep(Key(1, self.step))

    def leave(self) -> bool:
        """End here; whether an image was left behind, which is the last boundary's."""
        count = len(self.published)
        key = self.snapshots.publish_live(Key(1, self.step - 1), {1: None})
        self.check()
        assert (key == Key(1, self.step)) == (len(self.published) == count + 1)
        return key is not None

    def forward(self) -> None:
        self.write(self.model.counts, 100 + self.step)

    def check(self) -> None:
        self.snapshots.settle()
        for own in self.host.slots.all():
            if self.step and own.key == Key(1, self.step):
                self.published.append(self.step)
                with own.memory.reading(own.key) as view:
                    assert view is not None
                    reader = memory_reader("image", view)
                    for entry in reader.entries():
                        if entry.name.startswith("model/"):
                            expected = self.step - 1 + (100 if entry.name == "model/counts" and self.step > 1 else 0)
                            held = reader.tensor(entry).reshape(-1).view(torch.uint8)
                            assert held.min() == held.max() == expected, (entry.name, self.step)
                    reader.release()

    def run(self, steps: int, disturb: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            self.boundary()
            self.forward()
            disturb()
            self.optim.step()
        self.check()

    def close(self) -> None:
        self.snapshots.close()
        self.host.slots.close()
        self.cuda.finish(self.stream)
        for address in self.claimed:
            self.cuda.claim(address, 0)
        devices._devices.clear()


class Optimizer(torch.optim.Optimizer):
    """Steps on the device."""

    def __init__(self, training: Training) -> None:
        super().__init__(training.model.parameters(), {})
        self._training = training

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.data_ptr() in self._training.claimed:
                self._training.write(parameter, self._training.step)
            else:
                parameter.detach().view(torch.uint8).fill_(self._training.step)
            torch.autograd.graph.increment_version(parameter)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("refused", [False, True], ids=["locked", "ring"])
def test_every_image_is_that_of_its_boundary(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernels: bool, refused: bool
) -> None:
    """The host never waits for the device's steps, and still no image has a byte of another boundary."""
    training = Training(cuda, monkeypatch, kernels=kernels)
    if refused:
        monkeypatch.setattr("resilient_train.image.arena._refusals_said", set())
        cuda.fail("cuMemHostRegister", status=800, times=100)
    cuda.delay(SLOW)
    training.run(9)
    assert training.published == list(range(1, 10))
    assert not training.snapshots._eager
    assert cuda.registered() == (0 if refused else len(training.host.slots.all()))
    assert caplog.text.count("pinned ring: cuMemHostRegister: CUDA_ERROR_NOT_PERMITTED") == int(refused)
    training.close()
    assert cuda.registered() == 0


def test_the_optimizer_does_not_wait_for_the_copy(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two boundaries the host only hands work over."""
    training = Training(cuda, monkeypatch, here=10)
    training.run(FIRST_AUDITS)
    cuda.delay(0.05)
    training.boundary()
    training.forward()
    training.optim.step()
    running = training.snapshots._running
    assert running is not None
    assert running.writer._copier.running(), "the host has passed the fence before the device has read the parameters"
    training.check()
    assert training.published[-1] == training.step
    training.close()


def test_changes_that_no_counter_shows_are_found_by_audits(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device writes a parameter in the middle of a step: named once, copied at the boundary from then on."""
    training = Training(cuda, monkeypatch)
    first = training.model.large[0]
    training.run(6, lambda: training.write(first, 200))
    assert training.published == list(range(1, 7))
    assert training.snapshots._eager == {"model/large.0"}
    assert caplog.text.count("model/large.0") == 1
    training.close()


def test_changes_that_a_counter_shows_cost_one_image(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the host before the fence, however late the device gets there."""
    training = Training(cuda, monkeypatch)

    def disturb() -> None:
        if training.step > FIRST_AUDITS + 1:
            training.write(training.model.small[3], 200)
            torch.autograd.graph.increment_version(training.model.small[3])

    cuda.delay(SLOW)
    training.run(8, disturb)
    assert training.published == [step for step in range(1, 9) if step != FIRST_AUDITS + 2]
    assert training.snapshots._eager == {"model/small.3"}
    training.close()


@pytest.mark.parametrize("name", ["cuMemcpyBatchAsync", "cuEventSynchronize", "cuStreamWaitEvent", "cuMemAlloc"])
def test_a_device_that_fails_costs_one_image_at_most(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """From then on torch copies, which is said once; no image is wrong."""
    training = Training(cuda, monkeypatch)
    if name == "cuMemAlloc":
        cuda.fail(name)
    for step in range(1, 9):
        if step == 5 and name != "cuMemAlloc":
            training.snapshots.settle()
            cuda.fail(name)
        training.boundary()
        training.forward()
        training.optim.step()
    training.check()
    assert len(training.published) >= 7
    assert training.published[-1] == 8
    assert caplog.text.count(f"from now on: {name}: CUDA_ERROR_OUT_OF_MEMORY") == 1
    training.close()


def test_what_an_abort_has_spoilt_is_not_published(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is behind: whatever it computes after an abort, the image of that boundary is dropped, the one before
    it stays."""
    training = Training(cuda, monkeypatch)
    training.run(FIRST_AUDITS + 1)
    training.write(training.model.large[0], 99)
    cuda.delay(0.05)
    training.boundary()
    training.snapshots.abandon()
    assert training.snapshots.settle() is None
    held = [own.memory.stamp() for own in training.host.slots.all()]
    assert max(stamp.key for stamp in held if stamp is not None) == Key(1, FIRST_AUDITS + 1)
    assert training.host.board.published(0) == Key(1, FIRST_AUDITS + 1)
    cuda.delay(0)
    training.close()


def left(training: Training) -> Training:
    """A training behind its third boundary without a snapshot, before the optimizer steps; the device is behind."""
    training.run(FIRST_AUDITS + 1)
    for _ in range(2):
        training.kept()
        training.forward()
        training.optim.step()
    training.cuda.delay(SLOWLY)
    training.kept()
    training.forward()
    return training


def test_the_state_of_a_boundary_without_a_snapshot_is_left_behind(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the forward pass changed is as it was, although the device got there after the host."""
    training = left(Training(cuda, monkeypatch))
    assert training.leave()
    training.close()


@pytest.mark.parametrize("arrived", [True, False])
def test_only_what_was_computed_before_an_abort_is_left_behind(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    """The device had got to the boundary when the collectives were aborted, or there is nothing."""
    training = left(Training(cuda, monkeypatch))
    if arrived:
        cuda.finish(training.stream)
        assert training.snapshots._live is not None
        training.snapshots._live._copier.wait()
    training.snapshots.abandon()
    cuda.delay(0)
    assert training.leave() == arrived
    training.close()


def test_nothing_that_comes_behind_an_abort_is_left_behind(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reaches one more boundary before it hears."""
    training = left(Training(cuda, monkeypatch))
    training.snapshots.abandon()
    cuda.delay(0)
    training.optim.step()
    training.kept()
    cuda.finish(training.stream)
    assert not training.leave()
    training.close()


def test_nothing_is_left_behind_once_an_optimizer_has_begun(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the device has not begun yet."""
    training = left(Training(cuda, monkeypatch))
    training.optim.step()
    assert not training.leave()
    training.close()


@pytest.mark.parametrize("counted", [True, False])
def test_a_changed_parameter_leaves_nothing_behind(cuda: Any, monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
    """What a version counter shows at any boundary, and what none shows at those that are audited; the latter once."""
    training = Training(cuda, monkeypatch)
    training.run(FIRST_AUDITS + 1)
    training.kept()
    training.forward()
    training.write(training.model.large[2], 200)
    if counted:
        torch.autograd.graph.increment_version(training.model.large[2])
    assert not training.leave()
    training.optim.step()
    if not counted:
        assert training.snapshots._eager == {"model/large.2"}
        training.kept()
        training.write(training.model.large[2], 200)
        assert training.leave()
    training.close()


@pytest.mark.parametrize("name", ["cuMemcpyBatchAsync", "cuMemAlloc", "cuEventSynchronize"])
def test_a_device_that_fails_at_the_end_leaves_it_to_torch(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not enough of its memory is left, or a copy fails."""
    training = left(Training(cuda, monkeypatch))
    cuda.delay(0)
    cuda.finish(training.stream)
    assert training.snapshots._live is not None
    training.snapshots._live._copier.wait()
    cuda.fail(name)
    assert training.leave()
    training.close()


def test_a_device_that_refuses_has_nothing_put_aside(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; the training goes on."""
    training = Training(cuda, monkeypatch)
    training.run(FIRST_AUDITS + 1)
    caplog.set_level("INFO")
    cuda.fail("cuMemAlloc")
    for _ in range(2):
        training.kept()
        training.forward()
        training.optim.step()
    assert caplog.text.count("a loss costs the steps since the last snapshot") == 1
    assert not training.leave()
    training.boundary()
    training.check()
    assert training.published[-1] == training.step
    training.close()


def test_audits_without_room_on_the_device_end_the_keeping_alone(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Snapshots go on as they were, by the device."""
    training = Training(cuda, monkeypatch)
    training.run(FIRST_AUDITS + 1)
    caplog.set_level("INFO")
    training.kept()
    training.forward()
    cuda.fail("cuMemAlloc")
    training.optim.step()
    assert caplog.text.count("a loss costs the steps since the last snapshot") == 1
    assert "wait for torch's copies" not in caplog.text
    training.run(2)
    assert training.published[-1] == training.step
    assert devices._devices[0] is not None
    training.close()


def test_without_kernels_nothing_is_left_behind(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No audit could tell whether it is that boundary's."""
    caplog.set_level("INFO")
    training = left(Training(cuda, monkeypatch, kernels=False))
    assert not training.leave()
    training.close()
    assert caplog.text.count("the engine has no kernels") == 1


def test_uploads_fill_tensors_on_the_device(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through page-locked memory, all at once; whatever cannot go that way is copied by torch."""
    training = Training(cuda, monkeypatch)
    large, small, strided = training.model.large[0].data, training.model.small[0].data, training.model.large[1].data.t()
    for failing in (False, True):
        if failing:
            cuda.fail("cuMemcpyHtoDAsync")
        uploads = devices.Uploads()
        values = [torch.randn(tensor.shape) for tensor in (large, small, strided, training.model.here)]
        targets = (large, small, strided, training.model.here.data)
        for target, value in zip(targets, values, strict=True):
            uploads.copy(target, value)
        uploads.finish()
        for target, value in zip(targets, values, strict=True):
            assert torch.equal(target, value)
    training.close()
