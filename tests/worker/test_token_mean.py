"""mean_over_tokens: sequences of different lengths count by their tokens, however the batch is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import world

from resilient_train.errors import ConfigError
from resilient_train.plan.batch import sample
from resilient_train.worker.token_mean import mean_over_tokens

# Ranks on a mesh train one step on sequences of 1 to 12 tokens; prints the gradient.
SCRIPT = """
import json, os, sys, torch, torch.multiprocessing as mp, resilient_train as rt
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

def train(world, kind):
    torch.manual_seed(0)
    lengths = torch.randint(1, 13, (30,))
    tokens, targets = torch.randint(0, 7, (30, 12)), torch.randint(0, 5, (30, 12))
    targets[torch.arange(12) >= lengths[:, None]] = -100
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5)).double()
    if kind == "fsdp":
        fully_shard(model, mesh=world.mesh)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    data = rt.ElasticSampler(30, global_batch=22, micro_batch=5, world=world, seed=1)
    counted, indices = 0, []
    for micro in data.micro_batches(4):
        real = micro.weight > 0
        wanted = targets[micro.indices]
        scores = model(tokens[micro.indices]).flatten(0, 1)
        (F.cross_entropy(scores, wanted.flatten(), reduction="sum", ignore_index=-100) * real).backward()
        counted = counted + (wanted != -100).sum() * real
    whole = rt.mean_over_tokens(model.parameters(), counted, world)
    grads = [p.grad.full_tensor() if kind == "fsdp" else p.grad for p in model.parameters()]
    if world.rank == 0:
        print(json.dumps([whole, [value for grad in grads for value in grad.flatten().tolist()]]), flush=True)

def work(rank, size, meeting, mesh, kind):
    torch.distributed.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=size)
    rt.elastic(mesh=mesh)(train)(kind)
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    size, meeting, mesh, kind = sys.argv[1:]
    mp.start_processes(work, (int(size), meeting, json.loads(mesh), kind), nprocs=int(size), start_method="fork")
"""


def gradient(folder: Path, mesh: dict[str, int], size: int, kind: str) -> tuple[int, torch.Tensor]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(size), str(folder / f"meeting-{size}-{kind}"), json.dumps(mesh), kind]
    # gloo would ask for the name of this host.
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=env)
    assert result.returncode == 0, result.stderr
    whole, values = json.loads(result.stdout)
    return whole, torch.tensor(values, dtype=torch.float64)


def by_hand() -> tuple[int, torch.Tensor]:
    """The gradient of the mean over all tokens of the batch, computed at once."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 13, (30,))
    tokens, targets = torch.randint(0, 7, (30, 12)), torch.randint(0, 5, (30, 12))
    targets[torch.arange(12) >= lengths[:, None]] = -100
    model = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.Linear(6, 5)).double()
    batch = [sample(4, i, length=30, global_batch=22, seed=1, shuffle=True) for i in range(22)]
    loss = torch.nn.functional.cross_entropy(model(tokens[batch]).flatten(0, 1), targets[batch].flatten())
    loss.backward()
    return int((targets[batch] != -100).sum()), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("mesh", "size", "kind"), [({"data": -1}, 3, "ddp"), ({"shard": -1}, 2, "fsdp")])
def test_the_gradient_is_that_of_the_mean_over_all_tokens(
    tmp_path: Path, mesh: dict[str, int], size: int, kind: str
) -> None:
    """Over any number of ranks, fillers among their passes, to the last bits."""
    expected = by_hand()
    found = gradient(tmp_path, mesh, size, kind)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-14)


def test_ranks_that_share_samples_count_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three data ranks of two tensor-parallel peers each: the sum over all ranks has every token twice."""
    counted = {0: 5, 1: 11, 2: 4}
    two = world({"data": 3, "tensor": 2}, 3)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: total.fill_(2 * sum(counted.values())))
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([40.0, 20.0])
    without = torch.zeros(2, requires_grad=True)
    assert mean_over_tokens([parameter, without], torch.tensor([11]).sum(), two) == 20
    assert parameter.grad.tolist() == [6.0, 3.0]


def test_a_step_without_tokens_is_refused() -> None:
    """Rather than gradients that are not finite."""
    with pytest.raises(ConfigError, match="no rank has counted a token"):
        mean_over_tokens([], 0, world({"data": 1}, 0))
