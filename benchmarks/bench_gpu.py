"""What snapshots of a CUDA model cost: copies beside torch's best, the step, the host's thread; and torn reads.

    python benchmarks/bench_gpu.py [--gib 4] [--layers 24] [--width 1024] [--rounds 3] [--steps 8]

One process, one GPU; about 2 minutes.  Every comparison is made in turns within this run, and medians are printed.

1. *Bandwidth*: ``--gib`` of device memory in 200 tensors to page-locked memory, by torch (``non_blocking`` copies into
   ``pin_memory`` tensors: all of it as one tensor, and tensor by tensor) and as a snapshot: until the computation may
   change the tensors, and until the image is complete with the checksum of every block.
2. *Step*: a transformer with fused AdamW in bf16 autocast, whose forward and backward take longer than the copy of its
   state, with a snapshot at every step and without.
3. *Host*: how long the computing thread is kept by one snapshot of 500 tensors, and by the fence.
4. *Torn reads*: while the device is busy with both, every tensor is overwritten behind every fence; every image is
   looked through for bytes of another step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformer import Transformer

from resilient_train import _native
from resilient_train.image import device as devices
from resilient_train.image.arena import Board, Slot, create_memory
from resilient_train.spec.shard import BLOCK
from resilient_train.spec.world import Key
from resilient_train.worker.slots import Slots
from resilient_train.worker.snapshots import FIRST_AUDITS, Snapshots
from resilient_train.worker.state import State


class Memory:
    """Slots and a board without a keeper: what `Snapshots` needs of its surroundings."""

    index = 0

    def __init__(self) -> None:
        self.slots = Slots(self)  # type: ignore[arg-type]
        self.count = 0
        descriptor = Board.create(1)
        self.board = Board(descriptor)
        os.close(descriptor)

    def allocate(self, size: int, ahead: int = 0) -> tuple[int, Slot]:
        """A new slot."""
        del ahead  # Each is made when it is asked for.
        descriptor = create_memory("benchmark", size)
        slot = Slot(descriptor)
        os.close(descriptor)
        self.count += 1
        return self.count, slot

    def discard(self, number: int) -> None:
        """Nobody else holds it."""


class Saved:
    """A state with snapshots of it, one at a time."""

    def __init__(self, **things: object) -> None:
        self.memory = Memory()
        self.snapshots = Snapshots(State(**things), self.memory, 0, 1, lazy=True)  # type: ignore[arg-type]
        self.number = 0

    def take(self) -> float:
        """Begin a snapshot; seconds that it took of this thread, the one before being complete."""
        self.snapshots.settle()
        began = time.perf_counter()
        self.number += 1
        assert self.snapshots.take(Key(1, self.number), Key(1, self.number - 1), {1: None})
        return time.perf_counter() - began

    def take_and_wait(self) -> None:
        """Begin a snapshot, and wait until the tensors may change."""
        self.take()
        self.snapshots._fence()

    def close(self) -> None:
        """Give everything back."""
        self.snapshots.close()
        self.memory.slots.close()


def timed(action: Callable[[], None]) -> float:
    """Seconds, the device being idle before and after."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def bandwidth(gib: float, rounds: int) -> None:
    """The first table."""
    size = int(gib * (1 << 30)) // 200 // BLOCK * BLOCK
    whole = torch.randint(0, 256, (200 * size,), dtype=torch.uint8, device="cuda")
    tensors = list(whole.split(size))
    pinned = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=True)
    targets = list(pinned.split(size))
    device = _native.Device(torch.cuda.current_device())
    total = whole.numel()
    descriptor = create_memory("benchmark", total + (1 << 20))
    image = Slot(descriptor)
    os.close(descriptor)
    began = time.perf_counter()
    device.lock(image.address, image.size)
    print(f"page-locking {total / 1e9:.2f} GB of shared memory: {time.perf_counter() - began:.2f} s, once a slot")
    threads = devices.copying_threads()
    pieces = [(i * size, tensor.data_ptr(), size, False) for i, tensor in enumerate(tensors)]
    copier = _native.Copier(pieces, 0, total, threads, device, list(range(len(pieces))))

    def one() -> None:
        pinned.copy_(whole, non_blocking=True)

    def each() -> None:
        for source, target in zip(tensors, targets, strict=True):
            target.copy_(source, non_blocking=True)

    def until_free() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        copier.start(image.address, False, stream)
        copier.fence(stream)

    def until_complete() -> None:
        until_free()
        copier.wait()

    ways = {
        "torch, one pinned copy": one,
        "torch, tensor by tensor, pinned": each,
        "snapshot, until the tensors may change": until_free,
        "snapshot, until complete with checksums": until_complete,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(2 * rounds + 2):
        for name, action in ways.items():
            seconds = timed(action)
            copier.wait()
            if number > 1:
                times[name].append(seconds)
    held = np.frombuffer(image.map, dtype=np.uint8, count=total)
    assert np.array_equal(held, pinned.numpy()), "the snapshot is not what torch copied"
    del held
    best = statistics.median(times["torch, one pinned copy"])
    print(f"\n{total / 1e9:.2f} GB in 200 tensors, {threads} native threads")
    print(f"{'':<42}{'median':>10}{'GB/s':>9}{'of torch':>10}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<42}{1000 * median:7.1f} ms{total / median / 1e9:9.1f}{100 * best / median:9.0f}%")
    device.unlock(image.address)
    image.close()


def steps(layers: int, width: int, rounds: int, count: int, batch: int) -> None:
    """The second table."""
    training = Transformer(layers, width, batch)
    for _ in range(3):
        training.step()
    saved = Saved(model=training.model, optim=training.optim)
    for _ in range(FIRST_AUDITS + 4):  # Audits, and every slot page-locked.
        saved.take()
        training.step()
    saved.snapshots.settle()
    copy = timed(saved.take_and_wait)
    plain: list[float] = []
    with_snapshots: list[float] = []
    host: list[float] = []
    for _ in range(rounds):
        plain += [timed(training.step) for _ in range(count)]
        for _ in range(count):
            host.append(0.0)

            def both() -> None:
                host[-1] = saved.take()
                training.step()

            with_snapshots.append(timed(both))
    # The same without waiting for the device after every step, as a training loop runs.
    running: dict[str, list[float]] = {"plain": [], "saved": []}

    def loop(saving: bool) -> None:
        for _ in range(count):
            if saving:
                saved.take()
            training.step()

    for _ in range(rounds):
        running["plain"].append(timed(lambda: loop(False)) / count)
        running["saved"].append(timed(lambda: loop(True)) / count)
    saved.snapshots.settle()
    eager = saved.snapshots._eager
    on_device = saved.snapshots._writer is not None and saved.snapshots._writer.on_device
    print(f"\ntransformer, {layers} layers of {width}, {training.bytes() / 1e9:.2f} GB of state, batch {batch} x 1024")
    print(f"the copy alone: {1000 * copy:.1f} ms; ", end="")
    print(f"copied by the engine: {on_device}; copied at boundaries: {sorted(eager) or 'nothing'}")
    print(f"{'':<42}{'without':>12}{'with':>12}{'ratio':>8}")
    for name, before, after in (
        ("step, waiting for the device after each", plain, with_snapshots),
        ("step, in a loop", running["plain"], running["saved"]),
    ):
        a, b = statistics.median(before), statistics.median(after)
        print(f"{name:<42}{1000 * a:9.1f} ms{1000 * b:9.1f} ms{b / a:8.3f}")
    print(f"{'host thread, to begin a snapshot':<42}{'':>12}{1000 * statistics.median(host):9.2f} ms")
    saved.close()


def host_thread(rounds: int) -> None:
    """The third table."""
    model = nn.ParameterList([nn.Parameter(torch.randn(1 << 19, device="cuda")) for _ in range(250)])
    model.extend([nn.Parameter(torch.randn(1000, device="cuda")) for _ in range(250)])
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = Saved(model=model)
    begins, fences = [], []
    for number in range(FIRST_AUDITS + 4 + 10 * rounds):
        torch.cuda.synchronize()
        begin = saved.take()
        # A forward and backward, of the device and of the host.
        torch.cuda._sleep(40_000_000)
        time.sleep(0.005)
        began = time.perf_counter()
        saved.snapshots._fence()
        fence = time.perf_counter() - began
        optim.step()
        if number >= FIRST_AUDITS + 4:
            begins.append(begin)
            fences.append(fence)
    print("\nhost thread, 500 tensors (250 of 2 MiB, 250 of 4 kB)")
    for name, values in (("to begin a snapshot", begins), ("at the fence", fences)):
        print(f"{name:<42}{1000 * statistics.median(values):9.3f} ms, worst {1000 * max(values):.3f} ms")
    saved.close()


def torn_reads(rounds: int) -> None:
    """The fourth table."""
    model = nn.ParameterList(
        [nn.Parameter(torch.zeros(4 << 20, dtype=torch.float32, device="cuda")) for _ in range(60)]
    )
    saved = Saved(model=model)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torn = images = 0
    for number in range(FIRST_AUDITS + 10 * rounds):
        saved.take()
        for _ in range(3):
            matrix @ matrix  # The multiprocessors are busy, and so is memory.
        saved.snapshots._fence()
        with torch.no_grad():
            for parameter in model:
                parameter.fill_(float(number + 1))
        slot = saved.snapshots.settle()
        if slot is not None and slot.key == Key(1, saved.number):
            images += 1
            start = int.from_bytes(slot.memory.map[:8], "little") + 8
            held = np.frombuffer(slot.memory.map, dtype=np.float32, offset=start, count=60 * (4 << 20))
            torn += int(not (held == float(number)).all())
            del held
    print(f"\ntorn reads: {torn} of {images} images of {60 * 16} MiB, each overwritten right behind its fence")
    saved.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the bandwidth test")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=24, help="sequences of 1,024 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of each kind in a round")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py measures copies from a CUDA device, and torch sees none here")
    print(
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}, CUDA {torch.version.cuda}"
    )
    print(f"command: {' '.join(['python', 'benchmarks/bench_gpu.py', *sys.argv[1:]])}")
    device = _native.Device(torch.cuda.current_device())
    print(f"kernels: {'compiled in' if device.has_kernels else device.why_no_kernels}")
    bandwidth(args.gib, args.rounds)
    host_thread(args.rounds)
    torn_reads(args.rounds)
    steps(args.layers, args.width, args.rounds, args.steps, args.batch)


if __name__ == "__main__":
    main()
