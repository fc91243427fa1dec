"""The model of `train.py` under NVIDIA's in-process restart: ``nvrx.py METRICS STEPS default|tuned``.

Wants RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (the store that groups meet in) and NVRX_PORT (the wrapper's own store:
rank 0 hosts both, so they cannot share a port).  Nothing is restored or resharded: the wrapped function starts anew on
the ranks that are left.

No ``from __future__ import annotations`` here: the wrapper finds its parameter by the annotation's value.
"""

import contextlib
import os
import socket
import stat
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from nvidia_resiliency_ext import inprocess
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent))
import train as script

PORTS = {int(os.environ["MASTER_PORT"]), int(os.environ["NVRX_PORT"])}
TUNED = {
    "monitor_thread_interval": timedelta(milliseconds=20),
    "monitor_process_interval": timedelta(milliseconds=20),
    "progress_watchdog_interval": timedelta(milliseconds=20),
    "last_call_wait": timedelta(milliseconds=20),
    "heartbeat_interval": timedelta(milliseconds=100),
    "heartbeat_timeout": timedelta(seconds=2),
    "soft_timeout": timedelta(seconds=10),
    "hard_timeout": timedelta(seconds=20),
    "barrier_timeout": timedelta(seconds=60),
}


class FreeGloo(inprocess.abort.Abort):
    """Shut down this process's TCP connections, the stores' apart.

    The wrapper's own abort knows NCCL only.  With it alone a rank that is no neighbour of the dead one in gloo's ring
    stays blocked in its collective, the others wait for it, and the job does not recover.
    """

    def __call__(self, state: inprocess.FrozenState) -> inprocess.FrozenState:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                    shut_down(int(name))
        return state


def shut_down(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            ends = {connection.getsockname()[1], connection.getpeername()[1]}
            if not ends & PORTS:
                connection.shutdown(socket.SHUT_RDWR)


def train(store: dist.Store, call: inprocess.CallWrapper = None) -> None:  # type: ignore[assignment]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = dist.PrefixStore(str(call.iteration), store)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size)
    model, optim = script.build(init_device_mesh("cpu", (size,)))
    with (script.METRICS / str(os.getpid())).open("a", buffering=1) as file:
        for step in range(script.STEPS):
            script.one_step(model, optim)
            file.write(f"{step} {size} {call.iteration + 1} {os.getpid()} {time.monotonic()}\n")


def main() -> None:
    host, port, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    store = dist.TCPStore(host, port, None, first, timedelta(seconds=60), wait_for_workers=False)
    wrapper = inprocess.Wrapper(
        store_kwargs={"port": int(os.environ["NVRX_PORT"])},
        # Composed as functions are: the last comes first.
        abort=inprocess.Compose(inprocess.abort.AbortTorchDistributed(), FreeGloo()),
        **(TUNED if sys.argv[3] == "tuned" else {}),
    )
    wrapper(train)(store)


if __name__ == "__main__":
    main()
