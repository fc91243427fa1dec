"""Ranks on one host that nobody launched as a job: what they share, what is their own, and who hears of what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

SCRIPT = """
import os, sys, torch, resilient_train as rt, torch.distributed as dist, torch.multiprocessing as mp
from resilient_train.errors import ResilientError

def say(text):
    os.write(1, (text + chr(10)).encode())

def work(rank, ranks, url, meeting, steps, kind):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    width = 9 if (kind, rank) == ("odd one", 1) else 8
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width))
    torch.manual_seed(rank + 1)
    things = {"model": model}
    if kind == "experts":
        expert = torch.nn.Linear(5, 5)
        things[f"expert{rank}"] = expert
        things[f"optim{rank}"] = optim = torch.optim.AdamW(expert.parameters(), lr=0.1)
    if kind == "same name":
        things["expert"] = torch.nn.Linear(5, 5)
    ckpt = rt.Checkpointer(rt.State(**things), url)
    try:
        for step in ckpt.steps(steps):
            with torch.no_grad():
                model(torch.randn(6, 4))
            if kind == "experts":
                expert(torch.ones(5)).sum().backward()
                optim.step(); optim.zero_grad()
        ckpt.wait()
        ckpt.close()
    except ResilientError as error:
        say(f"{rank} {type(error).__name__}: {error}".replace(chr(10), " "))
        dist.barrier()
        return
    facts = [float(model[0].weight.sum()), float(model[1].running_mean.sum())]
    facts += [float(expert.weight.double().sum())] if kind == "experts" else []
    say(f"{rank} {steps} {facts}")
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    ranks, url, meeting, steps, kind = sys.argv[1:]
    mp.spawn(work, (int(ranks), url, meeting, int(steps), kind), nprocs=int(ranks))
"""


def run(folder: Path, steps: int, kind: str, ranks: int = 2) -> list[str]:
    """What each rank said, in the order of ranks."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    meeting = folder / f"meeting-{len(list(folder.iterdir()))}"
    command = [sys.executable, str(script), str(ranks), str(folder / "run"), str(meeting), str(steps), kind]
    # gloo would ask for the name of this host.
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=env)
    assert result.returncode == 0, result.stderr
    return sorted(result.stdout.splitlines())


def test_spawned_ranks_save_one_state_and_find_what_is_their_own(tmp_path: Path) -> None:
    """Names of its own, and buffers that differ, are each rank's; nothing of a parameter that all have is repeated."""
    first = run(tmp_path, 4, "experts")
    assert len({line.split("[")[1] for line in first}) == 2, "the ranks differ"
    assert [path.parent.name for path in tmp_path.glob("run/*/manifest.json")] == ["step-000000004.g1"]
    again = run(tmp_path, 4, "experts")
    assert again == first
    (alone,) = run(tmp_path, 4, "experts", ranks=1)
    assert "StateMismatch" in alone, "what rank 1 had is not left out in silence"
    assert "expert1" in alone


def test_one_name_for_different_parameters_is_refused(tmp_path: Path) -> None:
    """Only one of them would be saved: nobody is told that the state is durable."""
    said = run(tmp_path, 3, "same name")
    assert ["hold different values of expert/bias" in line or "could not be made durable" in line for line in said] == [
        True,
        True,
    ]
    assert list(tmp_path.glob("run/*/manifest.json")) == []


def test_a_rank_that_cannot_restore_is_heard_of_by_the_others(tmp_path: Path) -> None:
    """Each rank ends with an error, its own or the news of another's; nobody waits."""
    run(tmp_path, 3, "plain")
    first, second = run(tmp_path, 6, "odd one")
    assert "0 PeerFailed: step 3 (lineage 1)" in first
    assert "1 StateMismatch" in second
    assert run(tmp_path, 3, "plain")[0].startswith("0 3 ")
