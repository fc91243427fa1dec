"""Uploads to S3 in parts that whoever comes next goes on with: the next attempt, or a killed keeper's successor.

A part that the server has already is recognised by its MD5, which S3 gives as its ETag (where keys of a key service
encrypt it, it gives something else, and the part is sent again).  A server or a policy that does not tell of unfinished
uploads costs just that: each attempt begins a new one.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resilient_train.storage.tier import Chunk

logger = logging.getLogger(__name__)

PART = 16 << 20
"""Bytes of a part; the same for all versions that go on with each other's uploads."""
_GROWS = 1000
"""Parts of one size, those behind them being longer: S3 takes no more than 10,000, here of 859 GiB together."""
_MOST_HELD = 8
"""Parts on their way at once, of all files together."""

_held = threading.BoundedSemaphore(_MOST_HELD)


class Unfinished(NamedTuple):
    """An upload that was begun."""

    key: str
    """The object's, in its bucket."""
    id: str
    """What the server calls it."""


@dataclass(kw_only=True)
class _Upload:
    """One object on its way."""

    place: dict[str, str]
    """Its bucket, its key, and the upload's id, as requests have them."""
    algorithm: str = ""
    """The checksum that the server wants to hear again at the end, if it does."""
    there: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the server has told of each part that it had from the beginning."""
    failed: threading.Event = field(default_factory=threading.Event)
    """A part could not be sent."""

    def told(self, number: int, answer: dict[str, Any]) -> dict[str, Any]:
        """What the server wants to hear of a part, of what it has said of it."""
        names = ("ETag", f"Checksum{self.algorithm}")
        return {"PartNumber": number} | {name: answer[name] for name in names if name in answer}


def put(fs: Any, path: str, chunks: Iterable[Chunk]) -> int:
    """Write an object that becomes visible whole or not at all; its length.

    After an error of the server its parts stay, for whoever puts it again; after one of ``chunks`` nothing does.

    Args:
        fs: of s3fs.
        path: bucket/key.
        chunks: its bytes, which must not change until this returns.
    """
    bucket, key, _ = fs.split_path(path)
    pieces = _pieces(chunks)
    first = next(pieces, b"")
    if len(first) < PART:
        fs.call_s3("put_object", Bucket=bucket, Key=key, Body=first)
        return len(first)
    upload = _upload(fs, bucket, key)
    sent: list[Future[dict[str, Any]]] = []
    written = 0
    try:
        with ThreadPoolExecutor(_MOST_HELD, "part") as pool:
            for number, piece in enumerate(_held_back(upload, itertools.chain([first], pieces)), 1):
                sent.append(pool.submit(_send, fs, upload, number, piece))
                written += len(piece)
    except BaseException:
        # What is to be written cannot be had.
        fs.call_s3("abort_multipart_upload", **upload.place)
        raise
    parts = [future.result() for future in sent]
    fs.call_s3("complete_multipart_upload", **upload.place, MultipartUpload={"Parts": parts})
    return written


def unfinished(fs: Any, path: str) -> list[Unfinished]:
    """The uploads that were begun of an object, or of those in a folder, oldest first; none if that is not told.

    Args:
        fs: of s3fs.
        path: bucket/key, of one or the other.
    """
    bucket, beginning, _ = fs.split_path(path)
    found: list[tuple[Any, Unfinished]] = []
    after: dict[str, str] = {}
    try:
        while True:
            answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=beginning, **after)
            for one in answer.get("Uploads", []):
                if not beginning or f"{one['Key']}/".startswith(f"{beginning}/"):
                    found.append((one["Initiated"], Unfinished(one["Key"], one["UploadId"])))
            if not answer.get("IsTruncated"):
                break
            after = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
    except Exception as error:  # It is not told to everybody, and not by every server.
        logger.debug("no unfinished uploads of %s are told: %s", path, error)
        return []
    return [upload for _, upload in sorted(found, key=lambda of: (of[0], of[1]))]


def abort(fs: Any, path: str) -> None:
    """Give up the uploads that `unfinished` tells of."""
    bucket, _, _ = fs.split_path(path)
    for upload in unfinished(fs, path):
        try:
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload.key, UploadId=upload.id)
        except FileNotFoundError:
            continue  # Somebody was faster.


def _upload(fs: Any, bucket: str, key: str) -> _Upload:
    """The newest upload of an object that was begun, with what it has; else a new one."""
    for begun in reversed(unfinished(fs, f"{bucket}/{key}")):
        if begun.key != key:
            continue
        try:
            return _known(fs, {"Bucket": bucket, "Key": key, "UploadId": begun.id})
        except Exception as error:  # As above; or it is complete by now, or given up.
            logger.debug("the parts of an unfinished upload of %s/%s are not told: %s", bucket, key, error)
    answer = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    place = {"Bucket": bucket, "Key": key, "UploadId": answer["UploadId"]}
    return _Upload(place=place, algorithm=answer.get("ChecksumAlgorithm", ""))


def _known(fs: Any, place: dict[str, str]) -> _Upload:
    upload = _Upload(place=place)
    after: dict[str, int] = {}
    while True:
        answer = fs.call_s3("list_parts", **place, **after)
        upload.there |= {part["PartNumber"]: part for part in answer.get("Parts", [])}
        upload.algorithm = answer.get("ChecksumAlgorithm", "")
        if not answer.get("IsTruncated"):
            return upload
        after = {"PartNumberMarker": answer["NextPartNumberMarker"]}


def _held_back(upload: _Upload, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, each as soon as there is room for it, until one could not be sent."""
    while not upload.failed.is_set():
        _held.acquire()
        piece = b""
        try:
            piece = next(pieces, b"")
        except BaseException:
            upload.failed.set()
            raise
        finally:
            if not piece:
                _held.release()
        if not piece:
            return
        yield piece


def _send(fs: Any, upload: _Upload, number: int, piece: bytes) -> dict[str, Any]:
    """Send a part, unless the server has it; what it wants to hear of it at the end."""
    try:
        if upload.failed.is_set():
            return {}
        there = upload.there.get(number, {})
        md5 = hashlib.md5(piece, usedforsecurity=False).hexdigest() if there else ""
        if there and there.get("Size") == len(piece) and there.get("ETag", "").strip('"') == md5:
            return upload.told(number, there)
        return upload.told(number, fs.call_s3("upload_part", **upload.place, PartNumber=number, Body=piece))
    except BaseException:
        upload.failed.set()
        raise
    finally:
        _held.release()


def _pieces(chunks: Iterable[Chunk]) -> Iterator[bytes]:
    """The same bytes in parts, whose lengths depend on nothing but their numbers; only the last is shorter."""
    held: list[memoryview] = []
    size, number = 0, 0
    for chunk in chunks:
        left = memoryview(chunk).cast("B")
        while len(left):
            wanted = PART * (1 + number // _GROWS) - size
            held.append(left[:wanted])
            size, left = size + len(held[-1]), left[wanted:]
            if len(held[-1]) == wanted:
                yield b"".join(held)
                held.clear()
                size, number = 0, number + 1
    if size:
        yield b"".join(held)
