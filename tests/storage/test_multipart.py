"""Uploads in parts: what arrived before a server failed, or a keeper died, is not sent again, nor left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient_train.errors import StorageError
from resilient_train.storage import multipart
from resilient_train.storage.catalogue import listing, with_begun
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.testing.job import Job
from resilient_train.tools.survey import UNFINISHED, survey
from resilient_train.tools.verify import verify

from .faulty_server import FaultyServer

SCRIPT = Path(__file__).parent.parent / "multiprocess" / "scripts" / "train.py"
PART = 5 << 20  # S3 takes no shorter ones.
DATA = os.urandom(1 << 20) * 6 * 5 + b"the end"
PARTS = 7


class Parts:
    """A fault that notes which parts of uploads come, and refuses or stalls those behind the first few."""

    def __init__(self, most: int, then: str) -> None:
        self._most, self._then = most, then
        self._lock = threading.Lock()
        self.passed: list[int] = []

    def __call__(self, method: str, target: str) -> str | None:
        number = re.search(r"partNumber=(\d+)", target)
        if method != "PUT" or number is None:
            return None
        with self._lock:
            if len(self.passed) >= self._most:
                return self._then
            self.passed.append(int(number[1]))
            return None


@pytest.fixture
def server(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A proxy before the server, to which the environment leads."""
    monkeypatch.setattr(multipart, "PART", PART)
    with FaultyServer(endpoint) as proxy:
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        import fsspec
        import s3fs

        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": proxy.url})
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy


@pytest.fixture
def tier(server: FaultyServer) -> FilesystemTier:
    """A place in a fresh bucket, behind the proxy."""
    import s3fs

    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(endpoint_url=server.url).mkdir(bucket)
    return FilesystemTier(f"s3://{bucket}/run")


def environment(url: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "FSSPEC_S3": json.dumps({"endpoint_url": url}),
    }


def interrupted(server: FaultyServer, tier: FilesystemTier, path: str, data: bytes = DATA) -> list[int]:
    """Put a file while the server takes three parts; which these were."""
    fault = Parts(3, "403 Access Denied")
    server.break_with(fault)
    with pytest.raises(StorageError, match=f"{path}: PermissionError: 403 Access Denied"):
        tier.put(path, [data])
    assert len(fault.passed) == 3
    server.heal()
    return fault.passed


def arrived(tier: FilesystemTier) -> list[int]:
    """The parts that the server has, of the one upload that was begun."""
    (upload,) = multipart.unfinished(tier._fs, tier._root)
    bucket, _, _ = tier._fs.split_path(tier._root)
    return sorted(multipart._known(tier._fs, {"Bucket": bucket, "Key": upload.key, "UploadId": upload.id}).there)


def put(server: FaultyServer, tier: FilesystemTier, path: str, data: bytes) -> list[int]:
    """Put a file; which parts were sent."""
    fault = Parts(1000, "")
    server.break_with(fault)
    assert tier.put(path, [data]) == len(data)
    server.heal()
    assert tier.read(path, 0, len(data)) == data
    return sorted(fault.passed)


def test_an_upload_goes_on_with_what_has_arrived(server: FaultyServer, tier: FilesystemTier) -> None:
    """By whoever puts the same bytes next; the file is whole, and nothing is left of the upload."""
    before = interrupted(server, tier, "a/x")
    again = put(server, FilesystemTier(tier.name), "a/x", DATA)
    assert again == sorted(set(range(1, PARTS + 1)) - set(before))
    assert multipart.unfinished(tier._fs, tier._root) == []
    assert put(server, tier, "a/x", DATA) == [*range(1, PARTS + 1)], "a file that is there is written anew"


def test_parts_with_other_bytes_are_sent_again(server: FaultyServer, tier: FilesystemTier) -> None:
    """Whatever an upload of the same name has: the file is what was put last."""
    before = interrupted(server, tier, "a/x")
    other = bytearray(DATA)
    other[(before[0] - 1) * PART + 5] ^= 1
    assert before[0] in put(server, tier, "a/x", bytes(other))
    interrupted(server, tier, "a/y")
    assert put(server, tier, "a/y", DATA[: PART + 3]) in ([], [1], [2], [1, 2]), "one that is shorter by now"


def test_what_is_left_of_uploads_is_listed_and_goes_with_its_folder(server: FaultyServer, tier: FilesystemTier) -> None:
    """A folder of which nothing but parts is there is removed like any other; one whose name is longer stays."""
    for folder in ("step-000000001.g1", "step-000000001.g10"):
        interrupted(server, tier, f"{folder}/x")
    assert tier.begun() == {"step-000000001.g1", "step-000000001.g10"}
    tier.put("step-000000001.g1/y", [b"1"])
    assert with_begun(tier) == {"step-000000001.g1": {"y"}, "step-000000001.g10": set()}
    assert [(one.key.lineage, one.state) for one in survey(tier)] == [(1, UNFINISHED), (10, UNFINISHED)]
    tier.delete("step-000000001.g1")
    assert with_begun(tier) == {"step-000000001.g10": set()}
    tier.delete("step-000000001.g10")
    assert with_begun(tier) == {}


def test_bytes_that_cannot_be_had_leave_nothing(server: FaultyServer, tier: FilesystemTier) -> None:
    """Nobody will put them again."""

    def chunks() -> Iterator[bytes]:
        yield DATA[: 2 * PART]
        raise StorageError("the source failed")

    with pytest.raises(StorageError, match="the source failed"):
        tier.put("a/x", chunks())
    assert with_begun(tier) == {}
    assert multipart._held._value == multipart._MOST_HELD, "all room is given back"


@pytest.mark.parametrize("request_", ["uploads", "uploadId"])
def test_a_server_that_does_not_tell_of_uploads_is_good_enough(
    server: FaultyServer, tier: FilesystemTier, request_: str
) -> None:
    """Not implemented, or not allowed: each attempt begins a new upload."""
    interrupted(server, tier, "a/x")
    told = re.compile(rf"[?&]{request_}\b")
    server.break_with(lambda method, target: "501 Not Implemented" if method == "GET" and told.search(target) else None)
    assert tier.put("a/x", [DATA]) == len(DATA)
    assert with_begun(tier)["a"] == {"x"}
    assert tier.read("a/x", 0, len(DATA)) == DATA
    assert server.hurt > 0
    tier.delete("a")


class Pages:
    """An S3 that tells two things at a time, of an upload with five parts after four others."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.parts: list[dict[str, Any]] = []

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(self, method: str, **told: Any) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(self, method)(told)
        return answer

    def list_multipart_uploads(self, told: dict[str, Any]) -> dict[str, Any]:
        assert (told["Bucket"], told["Prefix"]) == ("b", "k")
        at = int(told.get("UploadIdMarker", -1)) + 1
        begun = [{"Key": "k", "UploadId": str(i), "Initiated": i} for i in range(5)]
        more = {"IsTruncated": at + 2 < 5, "NextKeyMarker": "k", "NextUploadIdMarker": str(at + 1)}
        return {"Uploads": begun[at : at + 2], **more}

    def list_parts(self, told: dict[str, Any]) -> dict[str, Any]:
        assert (told["Bucket"], told["Key"], told["UploadId"]) == ("b", "k", "4"), "the newest"
        at = told.get("PartNumberMarker", 0)
        parts = [self._part(number) for number in range(at + 1, min(at + 2, 5) + 1)]
        more = {"IsTruncated": at + 2 < 5, "NextPartNumberMarker": at + 2}
        return {"Parts": parts, "ChecksumAlgorithm": "SHA256", **more}

    def _part(self, number: int) -> dict[str, Any]:
        data = DATA[(number - 1) * PART : number * PART]
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return {"PartNumber": number, "Size": len(data), "ETag": f'"{md5}"', "ChecksumSHA256": f"sum {number}"}

    def upload_part(self, told: dict[str, Any]) -> dict[str, Any]:
        self.sent.append(told["PartNumber"])
        return {"ETag": "new", "ChecksumSHA256": f"sum {told['PartNumber']}", "ChecksumCRC32": "not asked for"}

    def complete_multipart_upload(self, told: dict[str, Any]) -> dict[str, Any]:
        self.parts = told["MultipartUpload"]["Parts"]
        return {}


def test_long_lists_come_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of uploads and of parts; checksums are repeated at the end where the upload was begun with them."""
    monkeypatch.setattr(multipart, "PART", PART)
    fs = Pages()
    assert multipart.put(fs, "b/k", [DATA]) == len(DATA)
    assert sorted(fs.sent) == [6, 7]
    assert [(part["PartNumber"], part["ChecksumSHA256"]) for part in fs.parts] == [(i, f"sum {i}") for i in range(1, 8)]
    assert all(part.keys() == {"PartNumber", "ETag", "ChecksumSHA256"} for part in fs.parts)


def test_parts_grow_behind_the_first_few_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 10,000 of them, which is all that S3 takes, hold any image; their lengths follow from their numbers."""
    monkeypatch.setattr(multipart, "PART", 2)
    monkeypatch.setattr(multipart, "_GROWS", 3)
    data = bytes(range(100))
    for size in (1, 3, 7, 100):
        chunks = [memoryview(data)[at : at + size] for at in range(0, 100, size)]
        pieces = list(multipart._pieces(chunks))
        assert [len(piece) for piece in pieces] == [2] * 3 + [4] * 3 + [6] * 3 + [8] * 3 + [10] * 3 + [10]
        assert b"".join(pieces) == data
    assert list(multipart._pieces([])) == list(multipart._pieces([b""])) == []


def test_a_killed_keeper_s_upload_is_gone_on_with(tmp_path: Path, server: FaultyServer, tier: FilesystemTier) -> None:
    """The last state, of which two parts have arrived; its successor sends the others, and the checkpoint is sound."""
    record = tmp_path / "record"
    args = ["--record", str(record), "--url", tier.name, "--steps", "3", "--width", "500", "--hidden", "5000"]
    fault = Parts(2, "stall")
    server.break_with(fault)
    flags = ["--nproc-per-node=1"]
    with Job(SCRIPT, args, flags=flags, log_dir=tmp_path / "logs", env=environment(server.url)) as job:
        job.wait_for(lambda: len(fault.passed) == 2 and server.hurt > 0, 60, "two parts")
        job.wait_for(lambda: len(arrived(tier)) == 2, 60, "their arrival")
        (keeper,) = job.keepers()
        os.kill(keeper, signal.SIGKILL)
        rest = Parts(1000, "")
        server.heal()
        server.break_with(rest)
        assert job.finish(60) == 0, job.output
    assert sorted(fault.passed + rest.passed) == [*range(1, len(fault.passed + rest.passed) + 1)], "none twice"
    assert len(rest.passed) > 1
    ((key,), unfinished) = listing(tier)
    assert key.step == 3
    assert unfinished == []
    assert verify(tier, key, lambda done, total: None).damage == []
