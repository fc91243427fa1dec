"""Bad luck of the rarer kinds: slow disks, keepers that die at the end, evaluations, bugs between snapshots."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from resilient_train.testing.job import Job
from resilient_train.testing.nodes import free_port

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts" / "train.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
pytestmark = pytest.mark.timeout(240)


def slow_disk(seconds: float) -> dict[str, str]:
    return {"PYTHONPATH": str(HERE / "slow_disk"), "SLOW_FSYNC": str(seconds)}


def newest(url: Path) -> int:
    """The newest committed step."""
    return max(int(path.parent.name[5:14]) for path in url.glob("*/manifest.json"))


@pytest.mark.soak
def test_an_evaluation_within_the_step_does_not_disturb_recovery(tmp_path: Path) -> None:
    """A forward without a backward leaves FSDP2's parameters whole; images hold the sharded ones all the same."""
    flags = ["--nproc-per-node=3"]
    with Job(SCRIPT, ["--eval", "--steps", "60"], flags=flags, log_dir=tmp_path) as job:
        job.wait_for_line("step 10 size 3", 90)
        job.kill(1)
        job.wait_for_line("size 2 generation 2", 30)
        assert job.finish(120) == 0, job.output
        assert "resumed step" in job.output


@pytest.mark.soak
def test_a_bug_between_snapshots_ends_the_job(tmp_path: Path) -> None:
    """With a snapshot every 10 steps, a crash at step 15 is met again from step 10 each time: that is no progress."""
    args = ["--abort-at", "15", "--exit-rank", "0", "--snapshot-every", "10"]
    with Job(SCRIPT, args, flags=["--nproc-per-node=2"], log_dir=tmp_path) as job:
        assert job.finish(200) == 66, job.output
        assert "losses in a row set the job back to step 1" in job.output


@pytest.mark.soak
def test_a_slow_disk_does_not_cost_the_last_state(tmp_path: Path) -> None:
    """All slots wait for the disk when the training ends: the last state is saved once one is free."""
    args = ["--url", str(tmp_path / "ckpt"), "--persist-every", "1", "--steps", "25", "--step-time", "0"]
    with Job(SCRIPT, args, flags=["--nproc-per-node=2"], log_dir=tmp_path, env=slow_disk(0.3)) as job:
        assert job.finish(120) == 0, job.output
    assert newest(tmp_path / "ckpt") == 25


@pytest.mark.parametrize("when", [pytest.param("after the training", marks=pytest.mark.soak), "while it flushes"])
def test_a_keeper_killed_at_the_end(tmp_path: Path, when: str) -> None:
    """The next keeper knows where the last state belongs; success means that it is there."""
    args = ["--url", str(tmp_path / "ckpt"), "--steps", "12"]
    flushing = when == "while it flushes"
    args += [] if flushing else ["--linger", "3"]
    env = slow_disk(1.0) if flushing else {}
    with Job(SCRIPT, args, flags=["--nproc-per-node=2"], log_dir=tmp_path, env=env) as job:
        job.wait_for_line("waiting for the last state" if flushing else "result 2", 90)
        (keeper,) = job.keepers()
        os.kill(keeper, signal.SIGKILL)
        assert job.finish(120) == 0, job.output
        assert "another takes over" in job.output
        assert job.leftovers() == []
    assert newest(tmp_path / "ckpt") == 12


@pytest.mark.soak
def test_three_signals_end_a_flush(tmp_path: Path) -> None:
    """Who insists is obeyed, and is told what that costs."""
    args = ["--url", str(tmp_path / "ckpt"), "--steps", "12"]
    with Job(SCRIPT, args, flags=["--nproc-per-node=2"], log_dir=tmp_path, env=slow_disk(60)) as job:
        job.wait_for_line("waiting for the last state", 90)
        for count in (1, 2, 3):
            job.signal(signal.SIGINT)
            job.wait_for_line("got SIGINT", 10, count)
        assert job.finish(20) == 74, job.output
        assert "the last state may not be durable" in job.output
        assert job.leftovers() == []


@pytest.mark.soak
def test_a_group_restart_waits_for_the_old_processes(tmp_path: Path) -> None:
    """torchrun's way: nobody of the next attempt starts while somebody of the last one still runs."""
    script = tmp_path / "stubborn.py"
    script.write_text(
        """
import os, signal, sys, time
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
os.write(1, f"begin {attempt} {rank}\\n".encode())  # At once: the other rank writes there too.
def stop(*_):
    time.sleep(1.5)
    os.write(1, f"end {attempt} {rank}\\n".encode())
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
if attempt == "0":
    time.sleep(1 if rank == "1" else 60)
    sys.exit(3)
"""
    )
    with Job(script, flags=["--nproc-per-node=2", "--max-restarts=1"], log_dir=tmp_path) as job:
        assert job.finish(60) == 0, job.output
        said = [line for _, line in job.lines if line.startswith(("begin", "end"))]
        assert said.index("end 0 0") < min(said.index("begin 1 0"), said.index("begin 1 1"))


def test_who_never_enters_the_elastic_function_is_named(tmp_path: Path) -> None:
    """A rank that ends early is an error with a sentence, not a wait."""
    script = tmp_path / "early.py"
    script.write_text(
        "import os, time, resilient_train as rt\n"
        "if os.environ['RANK'] == '1': raise SystemExit(0)\n"
        "rt.elastic(lambda world: time.sleep(600))()\n"
    )
    with Job(script, flags=["--nproc-per-node=2"], log_dir=tmp_path) as job:
        assert job.finish(60) == 1, job.output
        assert "rank 1 ended without calling the elastic function" in job.output
        assert "Traceback" not in job.output


ALONE = """
import os, signal, sys, torch, resilient_train as rt
model = torch.nn.Linear(6, 6)
ckpt = rt.Checkpointer(rt.State(model=model), sys.argv[1], persist_every=1000)
for step in ckpt.steps(20):
    with torch.no_grad():
        model.weight.fill_(step)
    if step == 8 and "--kill" in sys.argv:
        children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
        os.kill(int(children[0]), signal.SIGKILL)
        os.waitid(os.P_PID, int(children[0]), os.WEXITED | os.WNOWAIT)
ckpt.close()
"""


@pytest.mark.parametrize("kill", [False, True])
def test_without_an_agent_the_last_state_is_durable_when_the_process_ends(tmp_path: Path, kill: bool) -> None:
    """However slow the disk is, and even if the keeper had to be replaced."""
    command = [sys.executable, "-c", ALONE, str(tmp_path / "ckpt"), *(["--kill"] if kill else [])]
    env = {**os.environ, **slow_disk(1.0)}
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert result.returncode == 0, result.stderr
    assert newest(tmp_path / "ckpt") == 20
    assert time.monotonic() - began > 2.0, "the disk was not slow"


RANKS = """
import os, sys, torch, torch.distributed as dist, resilient_train as rt
dist.init_process_group("gloo")
rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
def run(steps):
    torch.manual_seed(0)  # What ranks have in common is equal.
    model = torch.nn.Linear(3, 3)
    ckpt = rt.Checkpointer(rt.State(model=model), sys.argv[1] or None)
    first = None
    for step in ckpt.steps(steps):
        first = step if first is None else first
        dist.barrier()
        with torch.no_grad():
            model.weight.fill_(step)
        if "--die" in sys.argv and attempt == "0" and step == 5 and rank == 1:
            os.abort()
    line = f"rank {rank} attempt {attempt} from {first} weight {model.weight[0, 0].item()}"
    os.write(1, (line + chr(10)).encode())
    return ckpt
run(10).close()
dist.barrier()
if "--twice" in sys.argv:
    run(20).close()
"""


def test_a_second_checkpointer_restores_the_same_on_every_rank(tmp_path: Path) -> None:
    """After close() another one may follow; all ranks resume what the first one left."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    args, flags = [str(tmp_path / "ckpt"), "--twice"], ["--nproc-per-node=2"]
    with Job(script, args, flags=flags, log_dir=tmp_path, launcher=TORCHRUN) as job:
        assert job.finish(90) == 0, job.output
        for rank in (0, 1):
            assert f"rank {rank} attempt 0 from 10 weight 19.0" in job.output


def test_under_torchrun_memory_survives_a_crashed_process(tmp_path: Path) -> None:
    """The keeper outlives the attempt, and the next one resumes from it; nothing was written to disk."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    flags = ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with Job(script, ["", "--die"], flags=flags, log_dir=tmp_path, launcher=TORCHRUN, env=env) as job:
        assert job.finish(150) == 0, job.output
        # Both ranks hold everything, so they go on with the last step that either of them has finished.
        resumed = [re.findall(rf"rank {rank} attempt 1 from ([56]) weight 9.0", job.output) for rank in (0, 1)]
        assert resumed[0] == resumed[1] != [], job.output


def test_several_torchruns_on_one_host_are_one_job(tmp_path: Path) -> None:
    """As where each GPU, or each test node, has a launcher of its own: all ranks find the first one's keeper."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=several"]
    flags = ["--nnodes=2", "--nproc-per-node=1", "--monitor-interval=0.1", *meet]
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(Job(script, [""], flags=flags, log_dir=tmp_path / str(number), launcher=TORCHRUN))
            for number in range(2)
        ]
        assert [job.finish(90) for job in jobs] == [0, 0], [job.output for job in jobs]
        output = "".join(job.output for job in jobs)
    assert all(f"rank {rank} attempt 0 from 0 weight 9.0" in output for rank in (0, 1)), output
