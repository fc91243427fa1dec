"""rtrun as a drop-in for torchrun, and what it says to nonsense."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from resilient_train.errors import ExitCode
from resilient_train.launch import rtrun
from resilient_train.launch.rtrun import main
from resilient_train.launch.waiting import Interrupted
from resilient_train.testing.job import Job
from resilient_train.testing.nodes import free_port

RTRUN = [sys.executable, "-m", "resilient_train.launch.rtrun"]
pytestmark = pytest.mark.timeout(180)

STOCK = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
total = torch.ones(1)
dist.all_reduce(total)
names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_MAX_RESTARTS")
line = f"rank {rank} sum {int(total)} attempt {attempt} {[os.environ[name] for name in names]}"
os.write(1, (line + chr(10)).encode())  # in one piece, because both ranks write to the same pipe
if "--fail" in sys.argv and rank == 1 and attempt in sys.argv:
    raise ValueError("boom")
if "--hang" in sys.argv:
    time.sleep(600)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    path = tmp_path / "stock.py"
    path.write_text(STOCK)
    return path


def test_an_untouched_script_runs_with_torchruns_environment(stock: Path, tmp_path: Path) -> None:
    """Ranks, sizes and the store are torchrun's."""
    with Job(stock, flags=["--nproc-per-node=2", "--max-restarts=3"], log_dir=tmp_path / "logs") as job:
        assert job.finish(60) == 0, job.output
        assert "rank 0 sum 2 attempt 0 ['0', '2', '0', '0', '3']" in job.output
        assert "rank 1 sum 2 attempt 0 ['1', '2', '0', '1', '3']" in job.output
        assert job.leftovers() == []


def test_the_group_restarts_until_max_restarts(stock: Path, tmp_path: Path) -> None:
    """Two failures, two restarts: the third attempt succeeds, in stores nobody has written to."""
    flags = ["--nproc-per-node=2", "--max-restarts=2"]
    with Job(stock, ["--fail", "0", "1"], flags=flags, log_dir=tmp_path / "logs") as job:
        assert job.finish(100) == 0, job.output
        assert "rank 1 sum 2 attempt 2" in job.output


@pytest.mark.parametrize(
    "flag", [pytest.param("--master-port={}", marks=pytest.mark.soak), "--rdzv-endpoint=127.0.0.1:{}"]
)
def test_the_ranks_meet_where_the_user_says(tmp_path: Path, flag: str) -> None:
    """MASTER_ADDR and MASTER_PORT are the endpoint that was asked for; one that is taken is an error that says so."""
    script = tmp_path / "where.py"
    script.write_text("import os; print('at', os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'])")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [*RTRUN, flag.format(port), str(script)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode != 0
        assert f"cannot serve a store on 127.0.0.1:{port}" in result.stderr
        assert "Traceback" not in result.stderr
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert f"at 127.0.0.1 {port}" in result.stdout, result.stderr


def test_a_failure_without_restarts_is_shown(stock: Path, tmp_path: Path) -> None:
    """Exit code 1, torchrun's report, the rank that failed."""
    with Job(stock, ["--fail", "0"], flags=["--nproc-per-node=2"], log_dir=tmp_path / "logs") as job:
        assert job.finish(60) == 1, job.output
        assert "ValueError: boom" in job.output
        assert "Root Cause" in job.output
        assert "[rtrun] the job failed: rank 1" in job.output
        assert job.leftovers() == []


@pytest.mark.soak
def test_logs_tee_and_redirects(stock: Path, tmp_path: Path) -> None:
    """torchrun's log flags: files per rank, teed lines with prefixes."""
    flags = ["--nproc-per-node=2", "--tee=1", "--redirects=2"]
    with Job(stock, flags=flags, log_dir=tmp_path / "logs") as job:
        assert job.finish(60) == 0, job.output
        assert "[default1]:rank 1 sum 2" in job.output
        files = sorted(str(path.relative_to(tmp_path / "logs")) for path in (tmp_path / "logs").rglob("stdout.log"))
        assert [name.split("/", 1)[1] for name in files] == ["attempt_0/0/stdout.log", "attempt_0/1/stdout.log"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_signal_ends_the_job_in_good_order(stock: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C: workers are stopped, nothing is left, the exit code says that it was interrupted."""
    with Job(stock, ["--hang"], flags=["--nproc-per-node=2"], log_dir=tmp_path / "logs") as job:
        job.wait_for_line("rank 1 sum 2", 60)
        job.signal(number)
        assert job.finish(60) == 130, job.output
        assert f"the agent got {number.name}" in job.output
        assert job.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_store(stock: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Something listens and says nothing: it is said what is waited for, and no folder or process stays."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        flags = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{silent.getsockname()[1]}"]
        with Job(stock, flags=flags, log_dir=tmp_path / "logs") as job:
            job.wait_for_line("waiting for the control store at 127.0.0.1", 60)
            job.signal(number)
            assert job.finish(20) == 130, job.output
            assert f"ended by {number.name} while no job was running on this node" in job.output
            assert "Traceback" not in job.output
            assert job.leftovers() == []


@pytest.mark.parametrize("ended", [True, False])
def test_a_signal_behind_the_job_does_not_change_how_it_ended(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """The node that serves the record waits for the others to read it; a signal ends that, and was not the job's."""

    @contextmanager
    def joined(*_: object) -> Iterator[None]:
        if not ended:
            raise Interrupted("SIGTERM")
        yield None
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(rtrun, "joined", joined)
    monkeypatch.setattr(rtrun, "_take_part", lambda *_: ExitCode.SUCCESS)
    with pytest.raises(SystemExit) as caught:
        main(["--nproc-per-node=1", f"--log-dir={tmp_path}", str(stock)])
    assert caught.value.code == (0 if ended else ExitCode.INTERRUPTED)


def test_a_node_that_is_alone_says_what_it_waits_for(stock: Path, tmp_path: Path) -> None:
    """And ends in good order."""
    with Job(stock, flags=["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{free_port()}"], log_dir=tmp_path / "logs") as job:
        job.wait_for_line("waiting for nodes: 1 of 2 is here", 60)
        job.signal(signal.SIGINT)
        assert job.finish(30) == 130, job.output


def test_a_module_and_a_program(tmp_path: Path) -> None:
    """--module and --no-python work as in torchrun."""
    module = subprocess.run([*RTRUN, "-m", "this"], capture_output=True, text=True, timeout=60, check=False)
    assert module.returncode == 0, module.stderr
    assert "Beautiful" in module.stdout
    program = [*RTRUN, "--no-python", "--nproc-per-node=2", "sh", "-c", "echo hello $RANK of $WORLD_SIZE"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert sorted(result.stdout.split("\n")) == ["", "hello 0 of 2", "hello 1 of 2"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_script.py"], "there is no training script 'no_such_script.py'"),
        (["--nnodes=many", "SCRIPT"], "--nnodes must be a number or MIN:MAX, it is 'many'"),
        (["--nnodes=0", "SCRIPT"], "--nnodes must be at least 1"),
        (["--nnodes=3:2", "SCRIPT"], "--nnodes must be at least 1 and MIN at most MAX"),
        (["--nproc-per-node=some", "SCRIPT"], "nproc"),
        (["--max-restarts=-1", "SCRIPT"], "max_restarts must be >= 0"),
        (["--nproc-per-node=0", "SCRIPT"], "--nproc-per-node must be at least 1"),
        (["--node-rank=1", "SCRIPT"], "--node-rank=1 is not one of 1 nodes"),
        (["--rdzv-endpoint=localhost:many", "SCRIPT"], "the endpoint must be HOST:PORT, it is 'localhost:many'"),
        (["--local-addr=192.0.2.1", "SCRIPT"], "--local-addr=192.0.2.1 is no address of this machine"),
        (["--nnodes=2", "--local-addr=no.invalid", "--rdzv-endpoint=:1", "SCRIPT"], "--local-addr=no.invalid is not"),
        (["--detect-within=0", "SCRIPT"], "argument --detect-within: must be a number of seconds above 0, it is '0'"),
        (["--standby=-1", "SCRIPT"], "argument --standby: must be a whole number, 0 or more, it is '-1'"),
        (["--nnodes=2", "--rdzv-conf=timeout=1min", "SCRIPT"], "timeout must be a number of seconds, at least 0.1"),
        (
            ["--nnodes=2", "--rdzv-conf=last_call_timeout=nan", "SCRIPT"],
            "last_call_timeout must be a number",
        ),
        (["--nnodes=2", "--rdzv-conf=pasword=x", "SCRIPT"], "--rdzv-conf: 'pasword' is not known"),
        (["--rdzv-backend=etcd", "--rdzv-endpoint=h:1", "--rdzv-conf=key=x", "SCRIPT"], "cert and key"),
        (["--nnodes=2", "--rdzv-endpoint=h:1", "--rdzv-conf=user=x,password=y", "SCRIPT"], "would protect nothing"),
        (["--rdzv-id=../../x", "SCRIPT"], "--rdzv-id names folders and must not contain '/'"),
        (["--signals-to-handle=SIGTERM,SIGNOTHING", "SCRIPT"], "there is no signal SIGNOTHING"),
    ],
)
def test_nonsense_is_one_clear_error(
    stock: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line that says what to change; no traceback."""
    with pytest.raises(SystemExit) as ended:
        main([str(stock) if arg == "SCRIPT" else arg for arg in args])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.soak
def test_no_log_folder_is_left_where_none_was_asked_for(stock: Path, tmp_path: Path) -> None:
    """Without --log-dir nothing is written that stays."""
    env = {"TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    (tmp_path / "tmp").mkdir()
    command = [*RTRUN, "--nproc-per-node=1", str(stock)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
