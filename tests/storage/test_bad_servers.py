"""Storage that refuses, hangs up, stalls, is full of rules or read-only: said, and the training is unharmed."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilient_train.errors import StorageError
from resilient_train.storage import s3
from resilient_train.storage.catalogue import listing
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.testing.job import Job
from resilient_train.tools.verify import verify

from .faulty_server import FaultyServer

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "multiprocess" / "scripts" / "train.py"
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def server(endpoint: str) -> Iterator[FaultyServer]:
    with FaultyServer(endpoint) as proxy:
        yield proxy


def credentials(url: str) -> dict[str, str]:
    """The environment that leads s3fs to a server."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "FSSPEC_S3_ENDPOINT_URL": url,
        "FSSPEC_S3": json.dumps({"config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": 1}}),
    }


def tier(endpoint: str, bucket: str) -> FilesystemTier:
    """The bucket, past the proxy."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(endpoint_url=endpoint, key="test", secret="test").mkdir(bucket, exist_ok=True)
    return FilesystemTier(f"s3://{bucket}/run")


def steps(record: Path) -> int:
    """The steps that were finished so far."""
    return sum(path.read_bytes().count(b'"used"') for path in record.glob("*.jsonl"))


def writes(method: str, target: str) -> bool:
    return method in ("PUT", "POST") and "delete" not in target


def test_a_server_that_fails_in_every_way_costs_nothing_but_what_it_refused(
    tmp_path: Path, endpoint: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503, a connection cut in the middle of an upload, a stall: each is one line that names what and where, the steps
    go on meanwhile, and once the server is well the next save succeeds.  A last state that is refused is exit code 74,
    and at no time is anything half visible."""
    for name, value in credentials(endpoint).items():
        monkeypatch.setenv(name, value)
    bucket, record = f"bucket-{uuid.uuid4().hex}", tmp_path / "record"
    direct = tier(endpoint, bucket)
    url = f"s3://{bucket}/run"
    args = ["--record", str(record), "--url", url, "--steps", "300", "--step-time", "0.1", "--persist-every", "2"]
    env = {**credentials(server.url), "PYTHONPATH": str(HERE / "impatient")}
    with Job(SCRIPT, args, flags=["--nproc-per-node=1"], log_dir=tmp_path / "logs", env=env) as job:
        job.wait_for_line("is durable in", 60)
        for fault, says in (("503 Slow Down", "503 Slow Down"), ("drop", "onnection"), ("stall", "imeout")):
            failures, hurt = count(job, "is not durable"), server.hurt
            server.break_with(lambda method, target, fault=fault: fault if writes(method, target) else None)
            job.wait_for(lambda hurt=hurt: server.hurt > hurt, 20, fault)
            before = steps(record)
            job.wait_for_line("is not durable", 30, failures + 1)
            job.wait_for(lambda before=before: steps(record) > before + 5, 20, "steps meanwhile")
            server.heal()
            line = [line for _, line in job.lines if "is not durable" in line][failures]
            assert url in line, line
            assert says in line, line
            job.wait_for_line("is durable in", 30, count(job, "is durable in") + 1)
        server.break_with(lambda method, target: "403 Access Denied" if writes(method, target) else None)
        (record / "hurry").touch()
        assert job.finish(40) == 74, job.output
        assert f"the last state (step 300 (lineage 1)) could not be made durable in {url}" in job.output
        assert "Access Denied" in job.output
        assert "Traceback" not in job.output
        said = [line.split(" is not durable")[0] for _, line in job.lines if "is not durable" in line]
        # The last state is tried twice: when it is handed over, and once more at the end.
        assert len(said) - len(set(said)) <= 1, "one line a failure"
        assert job.leftovers() == []
    server.heal()
    committed, _ = listing(direct)
    assert committed
    for key in committed:
        assert verify(direct, key, lambda done, total: None).damage == []


def count(job: Job, text: str) -> int:
    return sum(text in line for _, line in list(job.lines))


def test_no_request_is_waited_for_without_an_end(
    endpoint: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes the connection and never asks for the body; botocore alone would wait for ever."""
    for name, value in credentials(server.url).items():
        monkeypatch.setenv(name, value)
    import fsspec
    import s3fs

    monkeypatch.setattr(s3, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    retries = {"retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url, "config_kwargs": retries})
    stalled = tier(endpoint, f"bucket-{uuid.uuid4().hex}")
    server.break_with(lambda method, target: "stall" if method == "PUT" else None)
    with pytest.raises(StorageError, match="Read timeout"):
        stalled.put("a/x", [b"1" * 100_000])
    server.heal()
    assert stalled.put("a/x", [b"1" * 100_000]) == 100_000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_read_only_disk_is_named_before_any_training(tmp_path: Path) -> None:
    """Root may write anywhere, but not where nothing can be written."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        disk = FilesystemTier(f"{place}/run")
        disk.put("step-000000001.g1/manifest.json", [b"{}"])
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(StorageError, match=rf"{place}/run: cannot be written: OSError: .*Read-only file system"):
            disk.check_writable()
        with pytest.raises(StorageError, match=r"step-000000002.g1/x: OSError: .*Read-only file system"):
            disk.put("step-000000002.g1/x", [b"1"])
        with pytest.raises(StorageError, match="step-000000001"):
            disk.delete("step-000000001.g1")
        assert disk.folders() == {"step-000000001.g1": {"manifest.json"}}
    finally:
        subprocess.run(["umount", place], check=True)
