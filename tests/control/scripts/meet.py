"""A training that goes on until a file appears: ``meet.py FILE``; says how many ranks it has."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
print("formed", dist.get_world_size(), "rank", dist.get_rank(), flush=True)
end = torch.zeros(1)
while not end.item():
    end = torch.ones(1) if dist.get_rank() == 0 and Path(sys.argv[1]).exists() else torch.zeros(1)
    dist.all_reduce(end)
    time.sleep(0.02)
print("finished", dist.get_world_size(), "restarts", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
dist.destroy_process_group()
