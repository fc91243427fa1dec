"""Uploads in parts: what arrived before a server failed, or a keeper died, is not sent again, nor left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
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
DATA = b"".join(os.urandom(1 << 20) * 5 for _ in range(6)) + b"the end"
PARTS = 7
REFUSED = "403 Access Denied"


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
    fault = Parts(3, REFUSED)
    server.break_with(fault)
    with pytest.raises(StorageError, match=f"{path}: PermissionError: {REFUSED}"):
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
    before = interrupted(server, tier, "a/y")
    shorter = put(server, tier, "a/y", DATA[: PART + 3])
    assert shorter == sorted({1, 2} - ({1} & {*before})), "its last part is another"


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
    told, hurt = re.compile(rf"[?&]{request_}\b"), server.hurt
    server.break_with(lambda method, target: "501 Not Implemented" if method == "GET" and told.search(target) else None)
    assert tier.put("a/x", [DATA]) == len(DATA)
    assert with_begun(tier)["a"] == {"x"}
    assert tier.read("a/x", 0, len(DATA)) == DATA
    assert server.hurt > hurt
    tier.delete("a")


def test_a_server_that_only_cannot_tell_now_is_asked_again(server: FaultyServer, tier: FilesystemTier) -> None:
    """What has arrived is not given up for one 503."""
    interrupted(server, tier, "a/x")
    server.break_with(lambda method, target: "503 Service Unavailable" if "uploads" in target else None)
    for action in (lambda: tier.put("a/x", [DATA]), tier.begun, lambda: tier.delete("a")):
        with pytest.raises(StorageError, match="503"):
            action()
    server.heal()
    assert tier.begun() == {"a"}


def test_an_upload_that_cannot_be_gone_on_with_is_given_up(server: FaultyServer, tier: FilesystemTier) -> None:
    """Begun with another key, for instance: the next attempt begins a new one."""
    interrupted(server, tier, "a/x")
    server.break_with(lambda method, target: "400 Invalid Argument" if "partNumber" in target else None)
    with pytest.raises(StorageError, match="400 Invalid Argument"):
        tier.put("a/x", [DATA])
    assert tier.begun() == set()
    server.heal()
    assert put(server, tier, "a/x", DATA) == [*range(1, PARTS + 1)]


def test_a_lost_answer_to_the_end_of_an_upload_is_no_failure(server: FaultyServer, tier: FilesystemTier) -> None:
    """The upload is not there any more, and the file is, of the same parts; one of other parts is not taken for it."""

    def gone(method: str, target: str) -> str | None:
        return "404 No Such Upload" if method == "POST" and "uploadId" in target else None

    tier.put("a/x", [DATA])
    server.break_with(gone)
    assert tier.put("a/x", [DATA]) == len(DATA)
    with pytest.raises(StorageError, match="404 No Such Upload"):
        tier.put("a/x", [DATA[:-1] + b"?"])
    with pytest.raises(StorageError, match="404 No Such Upload"):
        tier.put("a/y", [DATA])


def test_uploads_that_must_not_be_given_up_do_not_stop_a_removal(server: FaultyServer, tier: FilesystemTier) -> None:
    """They cost room, which is for the bucket's owner to see to; checkpoints are removed all the same."""
    interrupted(server, tier, "a/x")
    tier.put("a/y", [b"1"])
    server.break_with(lambda method, target: REFUSED if method == "DELETE" and "uploadId" in target else None)
    tier.delete("a")
    server.heal()
    assert with_begun(tier) == {"a": set()}


def test_an_interrupt_waits_for_what_is_on_its_way_and_no_more(tier: FilesystemTier) -> None:
    """Once it is raised nobody reads the bytes any more."""
    given: list[int] = []

    def chunks() -> Iterator[bytes]:
        for number in range(100):
            given.append(number)
            if number == 2:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            yield DATA[:PART]

    # Not there if these tests run in the background of a shell, which has them ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tier.put("a/x", chunks())
    finally:
        signal.signal(signal.SIGINT, handler)
    before = len(given)
    assert before < 100
    time.sleep(0.5)  # Threads that went on would ask for more.
    assert len(given) == before


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


def test_all_parts_but_the_last_are_of_one_length() -> None:
    """As R2 asks for; of a length of which 10,000 are enough, that depends on nothing but how long the file is."""
    data = bytes(range(100))
    for size in (1, 3, 7, 100):
        chunks = [memoryview(data)[at : at + size] for at in range(0, 100, size)]
        pieces = list(multipart._pieces(chunks, 8))
        assert [len(piece) for piece in pieces] == [8] * 12 + [4]
        assert b"".join(pieces) == data
    assert list(multipart._pieces([], 8)) == list(multipart._pieces([b""], 8)) == []
    for size in (0, 1, 1 << 30, 78 << 30, 79 << 30, 300 << 30, (5 << 40) - 1, 5 << 40):
        length = multipart._part_length(size)
        assert length >= multipart.PART
        assert -(-size // length) <= 10_000
        assert length == multipart.PART or (length - (1 << 20)) * 10_000 < size, "no longer than it has to be"


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
