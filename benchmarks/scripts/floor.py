"""What recovery costs in torch calls alone: the floor that `bench_recovery.py` compares with.

Four processes train the same FSDP2 model.  One is killed, and the others are told so at once: nothing has to be
detected or agreed.  They free themselves, meet in a new group, rebuild the model and do one step.  No state is restored
or resharded.  Prints ``seen formed stepped`` in seconds after the kill, each the last survivor's.
"""

import gc
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from resilient_train import config
from resilient_train.worker.process_group import ProcessGroups

sys.argv = [sys.argv[0], "/tmp", "0"]
sys.path.insert(0, str(Path(__file__).parent))
import train as script  # noqa: E402


def worker(rank: int, port: int, queue, barrier, killed) -> None:
    groups = ProcessGroups(60.0)
    groups.form(generation=1, rank=rank, size=4, host="127.0.0.1", port=port, backend=None)
    model, optim = script.build(init_device_mesh("cpu", (4,)))
    for _ in range(3):
        script.one_step(model, optim)

    def free() -> None:
        killed.wait()
        groups.abort()

    threading.Thread(target=free, daemon=True).start()
    gc.collect()
    gc.freeze()
    barrier.wait()
    try:
        while True:
            script.one_step(model, optim)
    except RuntimeError:
        seen = time.monotonic()
    del model, optim
    groups.dissolve()
    gc.collect()
    mine = rank if rank < 2 else rank - 1
    groups.form(generation=2, rank=mine, size=3, host="127.0.0.1", port=port, backend=None)
    formed = time.monotonic()
    model, optim = script.build(init_device_mesh("cpu", (3,)))
    script.one_step(model, optim)
    queue.put((seen, formed, time.monotonic()))


def main() -> None:
    config.prepare_launcher()  # As rtrun does: it is about recovery, not about name servers.
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    context = mp.get_context("spawn")
    # One event each: a shared one would wait for the dead process to hear it.
    killing = [context.Event() for _ in range(4)]
    queue, barrier = context.SimpleQueue(), context.Barrier(5)
    processes = [
        context.Process(target=worker, args=(rank, store.port, queue, barrier, killing[rank])) for rank in range(4)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    time.sleep(0.3)
    killed = time.monotonic()
    processes[2].kill()
    for rank in (0, 1, 3):
        killing[rank].set()
    results = [queue.get() for _ in range(3)]
    print(*(f"{max(column) - killed:.4f}" for column in zip(*results, strict=True)))
    for process in processes:
        process.kill()
        process.join()


if __name__ == "__main__":
    main()
