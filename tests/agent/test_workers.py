"""Worker processes: torchrun's environment, a folder of logs each, and nothing that outlives them."""

from __future__ import annotations

import json
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs

from resilient_train import config
from resilient_train.agent.workers import Workers, WorkerSpec
from resilient_train.errors import OutsideError
from resilient_train.spec.world import WorldRecord

MEMBERS = ("a/0.0", "a/1.0", "b/0.0", "b/1.0")
RECORD = WorldRecord(revision=1, generation=1, members=MEMBERS, bootstrap="[::1]:29500", reason="start")
WRITE = "import json, os, sys; json.dump(dict(os.environ) | {'argv': sys.argv[1:]}, open(sys.argv[1], 'w'))"
pytestmark = pytest.mark.timeout(60)


def workers(tmp_path: Path, code: str, *args: str, entrypoint: str = "", **changes: Any) -> Workers:
    spec = WorkerSpec(
        **{
            "entrypoint": entrypoint or sys.executable,
            "args": ("-I", "-S", "-c", code, *args),
            "slots": 2,
            "run_id": "run",
            "role": "default",
            "max_restarts": 3,
            "logs": DefaultLogsSpecs(log_dir=str(tmp_path / "logs")),
        }
        | changes
    )
    return Workers(spec, "agent's address")


def run(group: Workers, member: str, record: WorldRecord = RECORD) -> int:
    """Spawn a member, wait for its end; its exit code."""
    worker = group.spawn(member, record)
    poll = select.poll()
    poll.register(worker.pidfd, select.POLLIN)
    assert poll.poll(30_000)
    return group.reap(member)


def environment(tmp_path: Path, member: str, record: WorldRecord = RECORD, **changes: Any) -> dict[str, Any]:
    said = tmp_path / "said"
    assert run(workers(tmp_path, WRITE, str(said), "${local_rank}", **changes), member, record) == 0
    return dict(json.loads(said.read_text()))


def test_a_worker_finds_what_torchrun_would_have_told_it(tmp_path: Path) -> None:
    """Rank, place on its node, sizes, the first rank's store; torchrun's macro in its arguments is its local rank."""
    env = environment(tmp_path, "b/1.0")
    ranks = {name: env[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK")}
    assert ranks == {"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "ROLE_RANK": "3"}
    sizes = [env[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE")]
    assert sizes == ["4", "2", "2", "4"]
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("[::1]", "29500")
    assert (env["TORCHELASTIC_RUN_ID"], env["TORCHELASTIC_MAX_RESTARTS"]) == ("run", "3")
    assert (env[config.AGENT], env[config.MEMBER]) == ("agent's address", "b/1.0")
    assert env["argv"][1] == "1"


def test_a_replacement_has_a_number_that_its_script_can_use(tmp_path: Path) -> None:
    """It is not in the record yet: a rank within the world's size, and a folder of logs of its own."""
    env = environment(tmp_path, "c/1.2", RECORD)
    assert env["RANK"] == "1"
    assert env["GROUP_RANK"] == "0"
    smaller = RECORD.successor(members=("a/0.0",))
    assert environment(tmp_path, "c/1.3", smaller)["RANK"] == "0"
    folders = sorted(path.name for path in (tmp_path / "logs").glob("*/attempt_0/*"))
    assert {"1.2", "1.3"} <= set(folders)


def test_each_worker_can_be_shown_its_own_device_as_number_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's --virtual-local-rank, with and without a choice of devices."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    env = environment(tmp_path, "a/1.0", virtual_local_rank=True)
    assert (env["LOCAL_RANK"], env["CUDA_VISIBLE_DEVICES"]) == ("0", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    env = environment(tmp_path, "a/1.0", virtual_local_rank=True)
    assert env["CUDA_VISIBLE_DEVICES"] == "1"


def test_what_a_worker_started_ends_with_it(tmp_path: Path) -> None:
    """Data loaders of a killed worker would keep devices and memory."""
    file = tmp_path / "child"
    code = (
        "import os, subprocess, sys; c = subprocess.Popen(['sleep', '600']); "
        f"open({str(file)!r}, 'w').write(str(c.pid)); os.kill(os.getpid(), 9)"
    )
    group = workers(tmp_path, code)
    assert run(group, "a/0.0") == -signal.SIGKILL
    child = int(file.read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the worker's child lives on"
        time.sleep(0.01)
    failure = group.failure("a/0.0")
    assert failure is not None
    assert failure.exitcode == -signal.SIGKILL
    assert group.running() == []


def test_a_signal_to_who_has_ended_hits_nobody(tmp_path: Path) -> None:
    """Its process id may be another's by now."""
    group = workers(tmp_path, "")
    assert run(group, "a/0.0") == 0
    assert group.failure("a/0.0") is None
    group.signal("a/0.0", signal.SIGKILL)


def test_what_cannot_be_started_is_an_error_of_the_world_outside(tmp_path: Path) -> None:
    """There is no place for its logs: the agent hears one kind of error, whatever the system said."""
    group = workers(tmp_path, "")
    shutil.rmtree(tmp_path / "logs", ignore_errors=True)
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OutsideError, match="cannot start"):
        group.spawn("a/0.0", RECORD)
