"""The same model under NVIDIA's in-process wrapper, for `bench_recovery.py`; it restores and reshards nothing.

python nvrx.py METRICS default|tuned      (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
"""

import datetime
import os
import sys
import time
from pathlib import Path

import nvidia_resiliency_ext.inprocess as inprocess
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

METRICS, MODE = Path(sys.argv[1]), sys.argv[2]
sys.argv = [sys.argv[0], str(METRICS), "0"]
sys.path.insert(0, str(Path(__file__).parent))
import train as script  # noqa: E402

TUNED = dict.fromkeys(
    ("monitor_thread_interval", "monitor_process_interval", "progress_watchdog_interval", "last_call_wait"),
    datetime.timedelta(milliseconds=50),
)


@inprocess.Wrapper(**(TUNED if MODE == "tuned" else {}))
def train(call: inprocess.CallWrapper = None) -> None:
    state = call.frozen_state
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["STORE_PORT"]),
        None,
        False,
        datetime.timedelta(seconds=60),
        wait_for_workers=False,
    )
    store = dist.PrefixStore(str(state.iteration), store)
    dist.init_process_group("gloo", store=store, rank=state.active_rank, world_size=state.active_world_size)
    model, optim = script.build(init_device_mesh("cpu", (state.active_world_size,)))
    with (METRICS / str(os.getpid())).open("a", buffering=1) as file:
        for step in range(1_000_000):
            script.one_step(model, optim)
            file.write(f"{step} {state.active_world_size} {state.iteration} {os.getpid()} {time.monotonic()}\n")


if __name__ == "__main__":
    train()
