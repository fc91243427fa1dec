"""Snapshots of CUDA models on a real device: the promises that `tests/image` and `tests/worker` hold on a fake driver.

Needs one CUDA device and about 3 GB of its memory.  The host's share of the work is the same as on the fake driver;
seen here is that the device keeps to the order that the engine asks for, and that the kernels are compiled rightly.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resilient_train import _native
from resilient_train.image import device as devices
from resilient_train.image.arena import Board, Slot, create_memory
from resilient_train.image.native import checksum
from resilient_train.image.reader import memory_reader
from resilient_train.spec.shard import BLOCK
from resilient_train.spec.world import Key
from resilient_train.worker.slots import Slots
from resilient_train.worker.snapshots import FIRST_AUDITS, Snapshots
from resilient_train.worker.state import State

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
    pytest.mark.timeout(300),
]

CUDA = torch.device("cuda", 0)
START = 4096
A_WHILE = 200_000_000
"""Clock cycles of `torch.cuda._sleep`: about a tenth of a second."""


@pytest.fixture(scope="module")
def device() -> _native.Device:
    torch.zeros(1, device=CUDA)
    return _native.Device(0)


class Image:
    """Tensors one after the other as an image, with its copier and memory."""

    def __init__(
        self,
        device: _native.Device,
        tensors: list[torch.Tensor],
        *,
        now: tuple[int, ...] = (),
        locked: bool = True,
        threads: int = 2,
    ) -> None:
        self.tensors, self._device, self._locked = tensors, device, locked
        pieces, at = [], START
        for index, tensor in enumerate(tensors):
            pieces.append((at, tensor.data_ptr(), tensor.nbytes, index in now))
            at += tensor.nbytes
        self.end = at
        size = at + 4 * -(-(at - START) // BLOCK)
        fd = create_memory("test", -(-size // 4096) * 4096)
        self.memory = Slot(fd)
        os.close(fd)
        self.array = np.frombuffer(self.memory.map, dtype=np.uint8)
        if locked:
            device.lock(self.memory.address, self.memory.size)
        remote = [index for index, tensor in enumerate(tensors) if tensor.is_cuda]
        self.copier = _native.Copier(pieces, START, at, threads, device, remote)

    def start(self, all_now: bool = False) -> None:
        self.copier.start(self.memory.address, all_now, torch.cuda.current_stream().cuda_stream)

    def fence(self) -> None:
        self.copier.fence(torch.cuda.current_stream().cuda_stream)

    def check(self, expected: list[torch.Tensor]) -> None:
        """The image holds these tensors, and the checksum of every block is right."""
        data = b"".join(flat(tensor).numpy().tobytes() for tensor in expected)
        assert self.array[START : self.end].tobytes() == data
        sums = [checksum(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
        table = self.array[self.end : self.end + 4 * len(sums)].tobytes()
        assert table == b"".join(value.to_bytes(4, "little") for value in sums)

    def close(self) -> None:
        del self.copier
        if self._locked:
            self._device.unlock(self.memory.address)
        del self.array
        self.memory.close()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()


def assorted() -> list[torch.Tensor]:
    """Sizes from nothing to hundreds of MB, at many alignments, on both sides."""
    generator = torch.Generator(CUDA).manual_seed(0)
    base = torch.randn(40_000_000, device=CUDA, generator=generator)
    halves = base[:1_000_000].to(torch.bfloat16)
    found = [base, halves[1:70_001], halves[3:5], base[5:5], base[1:1_000_002], torch.randn(500_000), torch.randn(7)]
    found += [base[i * 1000 : i * 1000 + 1 + i * 37] for i in range(300)]
    found += [(base[:10_000_019] > 0)[1:], base[:3].to(torch.float64), base[: 20 << 20]]
    return found


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "ring"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
def test_images_are_the_same_as_torch_copies(locked: bool, kernels: bool) -> None:
    """Every byte and every checksum, three times over; some pieces are wanted at once."""
    device = _native.Device(0) if kernels else _native.Device(0, kernels=b"")
    if kernels and not device.has_kernels:
        pytest.skip(f"no kernels here: {device.why_no_kernels}")
    tensors = assorted()
    image = Image(device, tensors, now=tuple(range(0, 400, 3)), locked=locked, threads=3)
    expected = [tensor.clone() for tensor in tensors]
    for all_now in (False, True, False):
        image.array[START:] = 0
        image.start(all_now)
        image.fence()
        image.copier.wait()
        image.check(expected)
        assert image.copier.changed() == []
    image.close()


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "ring"])
@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "not fenced"])
@pytest.mark.parametrize("own_stream", [True, False], ids=["own stream", "default stream"])
def test_a_fence_keeps_the_computation_from_what_is_still_read(
    device: _native.Device, locked: bool, fenced: bool, own_stream: bool
) -> None:
    """1 GB takes some 20 ms to copy and 1 ms to overwrite: only the fence keeps the old bytes in the image."""
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.default_stream()):
        tensors = [torch.full((64 << 20,), 1, dtype=torch.int32, device=CUDA) for _ in range(4)]
        image = Image(device, tensors, locked=locked, threads=4)
        image.array[:] = 0
        torch.cuda.synchronize()
        image.start()
        if fenced:
            image.fence()
        for tensor in reversed(tensors):
            tensor.fill_(2)
        image.copier.wait()
        held = image.array[START : image.end].view(np.int32)
        if fenced:
            assert (held == 1).all()
        else:
            assert (held == 2).any(), "without a fence this test would find torn images"
        torch.cuda.synchronize()
        assert all(bool((tensor == 2).all()) for tensor in tensors)
        image.close()


def test_the_host_is_ahead_of_the_device(device: _native.Device) -> None:
    """Neither start nor fence waits; the image holds what the device computes before the boundary, and no more."""
    tensors = [torch.zeros(10_000_000, device=CUDA), torch.zeros(100, device=CUDA), torch.zeros(100, device=CUDA)]
    image = Image(device, tensors, now=(2,))
    # Kernels are loaded when they are first used, and for that the host may have to wait for the device.
    for tensor in tensors:
        tensor.fill_(1)
    torch.cuda._sleep(1)
    image.start()
    image.fence()
    image.copier.wait()
    torch.cuda.synchronize()
    torch.cuda._sleep(A_WHILE)
    for tensor in tensors:
        tensor.fill_(7)
    image.start()
    tensors[2].fill_(9)
    image.fence()
    for tensor in tensors:
        tensor.fill_(9)
    assert not torch.cuda.current_stream().query(), "this machine computes too fast for this test"
    assert image.copier.running(), "the host has waited for the device"
    image.copier.wait()
    image.check([torch.full_like(tensor, 7) for tensor in tensors])
    image.close()


def test_what_is_wanted_as_it_is_may_change_at_once(device: _native.Device) -> None:
    """Packed, and beyond 64 MiB not packed: no fence is needed for pieces marked so."""
    tensors = [torch.ones(n, device=CUDA) for n in (1, 5000, 2_000_000, 15_000_000, 15_000_000, 3_000_000)]
    for locked in (True, False):
        image = Image(device, tensors, now=(0, 1, 2, 3, 4), locked=locked)
        image.start()
        for tensor in tensors[:5]:
            tensor.fill_(2)
        image.fence()
        tensors[5].fill_(2)
        image.copier.wait()
        image.check([torch.ones_like(tensor) for tensor in tensors])
        for tensor in tensors:
            tensor.fill_(1)
        image.close()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
def test_an_audit_finds_what_changed_before_the_fence(kernels: bool) -> None:
    """Down to one bit of one element; what changes behind the fence is none of its business."""
    device = _native.Device(0) if kernels else _native.Device(0, kernels=b"")
    tensors = [torch.zeros(n, dtype=torch.int32, device=CUDA) for n in (10, 20_000, 30_000_000, 1_000_001)]
    image = Image(device, tensors, now=(0,))
    for touched in ([], [2], [1, 3], [0]):
        image.start(True)
        for index in touched:
            tensors[index][-1] ^= 1 << 30
        image.fence()
        tensors[1].fill_(3)
        image.copier.wait()
        assert image.copier.changed() == [index for index in touched if index != 0]
        image.check([torch.zeros_like(tensor) for tensor in tensors])
        for tensor in tensors:
            tensor.zero_()
    image.close()


def test_fingerprints_are_those_of_the_definition(device: _native.Device) -> None:
    """The compiled kernel agrees with numpy, for any alignment, length and order."""
    if not device.has_kernels:
        pytest.skip(f"no kernels here: {device.why_no_kernels}")
    data = torch.randint(0, 256, (9_000_000,), dtype=torch.uint8, device=CUDA)
    host = data.cpu().numpy()
    ranges = [(begin, size) for begin in (0, 1, 2, 4, 8, 13) for size in (0, 1, 8, 4095, 1 << 20, 8_900_003)]
    base, stream = data.data_ptr(), torch.cuda.current_stream().cuda_stream
    taken = device.fingerprints([(base + begin, size) for begin, size in ranges], stream)
    assert taken == [fingerprint(host[begin : begin + size]) for begin, size in ranges]
    data[:8], data[8:16] = data[8:16].clone(), data[:8].clone()
    assert device.fingerprints([(base, 9_000_000)], stream) != [fingerprint(host)]


def fingerprint(data: np.ndarray) -> int:
    words = np.frombuffer(data.tobytes() + bytes(-len(data) % 8), dtype="<u8")
    factor = np.uint64(0xD6E8FEB86659FD93)
    with np.errstate(over="ignore"):
        x = words ^ (np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        for _ in range(2):
            x = (x ^ (x >> np.uint64(32))) * factor
        return int((x ^ (x >> np.uint64(32))).sum(dtype=np.uint64))


def test_memory_that_is_freed_meanwhile_is_not_given_to_others() -> None:
    """``p.data = other`` behind the boundary, and torch's allocator is asked for as much again at once."""
    training = Training(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    training.run(FIRST_AUDITS + 1)
    training.boundary()
    for parameter in training.model.parameters():
        parameter.data = torch.empty_like(parameter)
        parameter.data.fill_(float("nan"))
    others = [torch.full((1 << 20,), float("nan"), device=CUDA) for _ in range(100)]
    training.check()
    assert training.published == FIRST_AUDITS + 2
    del others
    training.close()


def test_uploads_arrive_behind_what_still_writes_the_targets(device: _native.Device) -> None:
    """From pageable and page-locked memory."""
    sources = [torch.randn(n) for n in (1, 1000, 5_000_000, 33_000_000)]
    mapped = mmap.mmap(-1, 8 << 20)
    array = np.frombuffer(mapped, dtype=np.float32)
    array[:] = np.arange(len(array))
    device.lock(array.ctypes.data, array.nbytes)
    sources.append(torch.from_numpy(array)[3:2_000_000])
    targets = [torch.zeros(source.shape, device=CUDA).fill_(1) for source in sources]
    torch.cuda._sleep(A_WHILE)
    for target in targets:
        target.fill_(3)
    copies = [(t.data_ptr(), s.data_ptr(), s.nbytes) for s, t in zip(sources, targets, strict=True)]
    device.upload(copies, torch.cuda.current_stream().cuda_stream, 4).wait()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target.cpu())
    device.unlock(array.ctypes.data)


def test_no_call_leaves_a_context_behind(device: _native.Device) -> None:
    """torch's current device is what it was, in this thread and in new ones."""
    before = torch.cuda.current_device()
    device.fingerprints([], 0) if device.has_kernels else None
    assert torch.cuda.current_device() == before
    assert torch.ones(3, device=CUDA).sum().item() == 3


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


class Net(nn.Module):
    """Layers of all sizes, statistics that change in the forward pass, tied and frozen parameters, bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 512)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(6)
        )
        self.norm = nn.BatchNorm1d(512)
        self.head = nn.Linear(512, 2000, bias=False)
        self.head.weight = self.embed.weight
        self.sixteen = nn.Parameter(torch.randn(700, 300).to(torch.bfloat16))
        self.strided = nn.Parameter(torch.randn(300, 400).t())
        self.frozen = nn.Linear(512, 512).requires_grad_(False)
        self.register_buffer("large", torch.zeros(3_000_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.large += 1
        y = self.embed(x)
        for block in self.blocks:
            y = y + block(y)
        y = self.norm(self.frozen(y)) + self.sixteen.float().mean() + self.strided.mean()
        return nn.functional.cross_entropy(self.head(y), x)


class Training:
    """A training whose state is snapshotted at every boundary and compared with clones made there by the device."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer], *, lazy: bool = True) -> None:
        torch.manual_seed(0)
        self.model = Net().to(CUDA)
        self.optim = optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.state, self.host = State(model=self.model, optim=self.optim), Host()
        self.snapshots = Snapshots(self.state, self.host, 0, 1, lazy=lazy)  # type: ignore[arg-type]
        self.step = self.published = 0
        self.expected: dict[str, list[torch.Tensor]] = {}

    def reach(self) -> None:
        """The next boundary."""
        self.check()
        self.step += 1
        frame = self.state.capture(0)
        self.expected = {part.entry.name: [source.detach().clone() for source in part.sources] for part in frame.parts}
        self.document = frame.document

    def boundary(self) -> None:
        self.reach()
        assert self.snapshots.take(Key(1, self.step), Key(1, self.step - 1), {1: None})

    def kept(self) -> None:
        """A boundary without a snapshot."""
        self.reach()
        self.snapshots.keep(Key(1, self.step))

    def train(self) -> None:
        self.backward()
        self.optim.step()
        self.optim.zero_grad()

    def backward(self) -> None:
        self.model(torch.randint(2000, (64,), device=CUDA)).backward()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.boundary()
            self.train()

    def check(self) -> None:
        """The image of the last boundary is that boundary's state, or there is none."""
        self.snapshots.settle()
        for own in self.host.slots.all():
            if self.step and own.key == Key(1, self.step):
                self.published += 1
                with own.memory.reading(own.key) as view:
                    assert view is not None
                    reader = memory_reader("image", view)
                    held = {entry.name: reader.tensor(entry) for entry in reader.entries()}
                    assert held.keys() == self.expected.keys()
                    for name, value in held.items():
                        assert flat(value).equal(torch.cat([flat(t) for t in self.expected[name]])), (name, self.step)
                    assert reader.json() == json.loads(self.document)
                    del held
                    reader.release()

    def close(self) -> None:
        self.snapshots.close()
        self.host.slots.close()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.001),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.001, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.001, foreach=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.001, device=CUDA), capturable=True),
    "one by one": lambda p: torch.optim.AdamW(p, lr=0.001, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.fixture
def engine() -> Iterator[None]:
    """The engine's own way with the device is in use, before and after the test."""
    torch.zeros(1, device=CUDA)
    assert devices.device_of(torch.zeros(1, device=CUDA)) is not None
    yield
    assert devices.device_of(torch.zeros(1, device=CUDA)) is not None, "the engine has given the device up"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_image_is_that_of_its_boundary(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the optimizers people use: every image is whole, and no parameter has to be copied at the boundary."""
    training = Training(OPTIMIZERS[kind])
    with caplog.at_level(logging.WARNING):
        training.run(12)
        training.check()
    assert training.published == 12
    assert not training.snapshots._eager
    assert training.snapshots._writer is not None
    assert training.snapshots._writer.on_device
    assert "given up" not in caplog.text
    training.close()


@pytest.mark.usefixtures("engine")
def test_every_image_is_that_of_its_boundary_on_another_stream_and_without_waiting() -> None:
    """The training runs on a stream of its own; ``lazy=False`` waits at the boundary instead."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for lazy in (True, False):
            training = Training(OPTIMIZERS["fused"], lazy=lazy)
            training.run(6)
            training.check()
            assert training.published == 6
            training.close()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["fused", "capturable"])
def test_a_boundary_without_a_snapshot_is_left_behind(kind: str, late: bool) -> None:
    """It is that boundary's state, unless an abort came before the device got there: then there is none."""
    training = Training(OPTIMIZERS[kind])
    training.run(FIRST_AUDITS + 1)
    for _ in range(2):  # Both are audited, for which the host waits.
        training.kept()
        training.train()
    before = training.published
    if late:
        torch.cuda._sleep(A_WHILE)
    training.kept()
    training.backward()
    live = training.snapshots._live
    assert live is not None
    if not late:
        live._copier.wait()
    training.snapshots.abandon()
    left = training.snapshots.publish_live(Key(1, training.step - 1), {1: None})
    assert left == (None if late else Key(1, training.step))
    training.check()
    assert training.published == before + (not late)
    training.close()


@pytest.mark.usefixtures("engine")
def test_writers_that_keep_to_no_rule_are_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """A parameter that a kernel changes during forward, with no counter to show it, is named once."""
    training = Training(OPTIMIZERS["fused"])
    weight = training.model.blocks[0][1].weight
    for _ in range(8):
        training.run(1)
        # Behind the optimizer's fence this is legal, so begin the next boundary first.
        training.boundary()
        weight.data.mul_(1.5)
        training.optim.step()
    training.check()
    assert training.published == 16
    assert training.snapshots._eager == {"model/blocks.0.1.weight"}
    assert caplog.text.count("model/blocks.0.1.weight") == 1
    training.close()


SCRIPT = """
import sys, torch, resilient_train as rt
url, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.LayerNorm(4096) for _ in range(200))).cuda()
model.register_parameter("big", torch.nn.Parameter(torch.randn(2_000_000, device="cuda")))
optim = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), url, persist_every=4)
for step in ckpt.steps(steps):
    # Element by element, so that two runs agree to the last bit.
    sum((p * torch.randn_like(p)).sum() for p in model.parameters()).backward()
    optim.step(); optim.zero_grad()
    if step % 4 == 3: ckpt.wait()
import resilient_train.image.device as d
print("engine", d._devices[0] is not None)
print("sum", repr(float(sum(p.double().sum() for p in model.parameters()))))
"""


def test_a_script_goes_on_where_it_ended(tmp_path: Path) -> None:
    """The whole way: device, shared memory, keeper, disk, and back through page-locked memory, generators included."""

    def run(name: str, steps: int) -> list[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), str(steps)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert result.returncode == 0, result.stderr
        assert "wait for torch's copies" not in result.stderr
        return result.stdout.splitlines()

    assert run("run", 7)[0] == "engine True"
    again, whole = run("run", 13), run("whole", 13)
    assert again[-1] == whole[-1]
