"""``s3://`` over HTTP: moto's server speaks the protocol, s3fs is the client, and the suite of tiers is the judge."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from resilient_train.errors import CheckpointDamaged, StorageError
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.storage.tier import Tier
from resilient_train.testing.tier import TierConformance

from .faulty_server import FaultyServer


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's name; the environment leads s3fs to the server."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(endpoint_url=endpoint).mkdir(name)
    return name


class TestS3Tier(TierConformance):
    @pytest.fixture(autouse=True)
    def _bucket(self, bucket: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.url = f"s3://{bucket}/run-1"
        self.monkeypatch = monkeypatch
        with FaultyServer(endpoint) as self.server:
            yield

    def tier(self) -> Tier:
        return FilesystemTier(self.url)

    def refusing(self) -> Tier:
        self.server.break_with(lambda *_: "403 Access Denied")
        self.monkeypatch.setenv("AWS_ENDPOINT_URL", self.server.url)
        self.monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", self.server.url)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        return FilesystemTier(self.url.removesuffix("/run-1"))  # Where fsspec's `exists` says no to every error.


def test_large_files_go_in_parts(bucket: str) -> None:
    """Longer than one part of a multipart upload, read back in ranges."""
    tier = FilesystemTier(f"s3://{bucket}/run")
    data = os.urandom(1 << 20) * 60
    assert tier.put("a/x", (memoryview(data)[at : at + (8 << 20)] for at in range(0, len(data), 8 << 20))) == len(data)
    assert FilesystemTier(f"s3://{bucket}/run").read("a/x", 50 << 20, 1000) == data[50 << 20 : (50 << 20) + 1000]


SCRIPT = """
import sys, torch, resilient_train as rt
torch.manual_seed(0)
model = torch.nn.Linear(50, 50)
optim = torch.optim.AdamW(model.parameters())
ckpt = rt.Checkpointer(rt.State(model=model, optim=optim), sys.argv[1], persist_every=5)
steps = []
for step in ckpt.steps(int(sys.argv[2])):
    steps.append(step)
    model(torch.ones(2, 50)).square().sum().backward()
    optim.step(); optim.zero_grad()
ckpt.close()
print(steps[:1], float(sum(p.double().sum() for p in model.parameters())))
"""


def test_a_training_goes_on_from_a_bucket(bucket: str) -> None:
    """The whole way: snapshots, keeper, upload, manifest, restore with ranged reads."""

    def run(url: str, steps: int) -> str:
        command = [sys.executable, "-c", SCRIPT, url, str(steps)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(f"s3://{bucket}/run", 12)
    second = run(f"s3://{bucket}/run", 20)
    assert second.startswith("[12]")
    assert second.split("]")[1] == run(f"s3://{bucket}/whole", 20).split("]")[1]


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    """Before any training is done."""
    tier = FilesystemTier("s3://no-such-bucket/run")
    with pytest.raises(StorageError, match="s3://no-such-bucket"):
        tier.check_writable()
    with pytest.raises(StorageError, match="there is no such place") as raised:
        tier.put("a/x", [b"1"])
    assert not isinstance(raised.value, CheckpointDamaged)
