"""Uploads to S3 in parts that whoever comes next goes on with: the next attempt, or a killed keeper's successor.

A part that the server has already is recognised by its MD5, which S3 gives as its ETag (where keys of a key service
encrypt it, it gives something else, and the part is sent again).  A server or a policy that does not tell of unfinished
uploads costs just that: each attempt begins a new one.  All parts of a file but the last are of one length, as some
servers ask for.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resilient_train.storage.tier import Chunk

logger = logging.getLogger(__name__)

PART = 8 << 20
"""Bytes of a part, unless there would be too many; a request may hold four times as much."""
_MOST_PARTS = 10_000
_LENGTHS = 1 << 20
"""What the length of longer parts is a multiple of."""
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
    resumed: bool = False
    """Whether somebody else has begun it."""

    def told(self, number: int, answer: dict[str, Any]) -> dict[str, Any]:
        """What the server wants to hear of a part, of what it has said of it."""
        names = ("ETag", f"Checksum{self.algorithm}")
        return {"PartNumber": number} | {name: answer[name] for name in names if name in answer}


def put(fs: Any, path: str, chunks: Iterable[Chunk], size: int = 0) -> int:
    """Write an object that becomes visible whole or not at all; its length.

    After an error of the server its parts stay, for whoever puts it again; after one of ``chunks`` nothing does.

    Args:
        fs: of s3fs.
        path: bucket/key.
        chunks: its bytes, which must not change until this returns; taken by several threads in turns.
        size: how many they are, if that is known; of what is longer than 78 GiB it has to be.
    """
    bucket, key, _ = fs.split_path(path)
    length = _part_length(size)
    pieces = _pieces(chunks, length)
    first = next(pieces, b"")
    if len(first) < length:
        fs.call_s3("put_object", Bucket=bucket, Key=key, Body=first)
        return len(first)
    upload, source = _upload(fs, bucket, key), _Source(itertools.chain([first], pieces))
    del first  # Its bytes are held as long as they are sent.
    try:
        _complete(fs, upload, _all_sent(fs, upload, source))
    except BaseException as error:
        # What was begun in another way, or is not there as it was told, would fail again and again.
        gone = isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno == errno.EINVAL)
        if source.broken or (upload.resumed and gone):
            with contextlib.suppress(Exception):  # The error to be told is the other.
                fs.call_s3("abort_multipart_upload", **upload.place)
        raise
    return source.given


def _part_length(size: int) -> int:
    """Bytes of each part of so many; the same for all that put the same file."""
    return max(PART, -(-size // (_MOST_PARTS * _LENGTHS)) * _LENGTHS)


def _all_sent(fs: Any, upload: _Upload, source: _Source) -> list[dict[str, Any]]:
    """Send what the server lacks; what it wants to hear of each part at the end."""
    with ThreadPoolExecutor(_MOST_HELD, "part") as pool:
        try:
            senders = [pool.submit(_send, fs, upload, source) for _ in range(_MOST_HELD)]
            wait(senders)
        finally:
            source.over = True  # Of an interrupted upload only what is on its way is waited for.
    return sorted((part for sender in senders for part in sender.result()), key=lambda part: part["PartNumber"])


def _complete(fs: Any, upload: _Upload, parts: list[dict[str, Any]]) -> None:
    """Make one object of the parts."""
    try:
        fs.call_s3("complete_multipart_upload", **upload.place, MultipartUpload={"Parts": parts})
    except FileNotFoundError:
        # It was told before, and the answer was lost; or another keeper was faster.  Then it is of these very parts.
        if not _is_made_of(fs, upload, parts):
            raise


def _is_made_of(fs: Any, upload: _Upload, parts: list[dict[str, Any]]) -> bool:
    """Whether the object that is there was made of these parts, by the ETag that S3 gives such objects."""
    try:
        sums = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
        there = fs.call_s3("head_object", Bucket=upload.place["Bucket"], Key=upload.place["Key"])
    except (ValueError, OSError):  # The error to be told is the other.
        return False
    expected = f"{hashlib.md5(sums, usedforsecurity=False).hexdigest()}-{len(parts)}"
    return bool(there["ETag"].strip('"') == expected)


def unfinished(fs: Any, path: str) -> list[Unfinished]:
    """The uploads that were begun of an object, or of those in a folder, oldest first; none if that is not told.

    Args:
        fs: of s3fs.
        path: bucket/key, of one or the other.
    """
    bucket, beginning, _ = fs.split_path(path)
    found: list[tuple[Any, Unfinished]] = []
    try:
        markers, place = ("KeyMarker", "UploadIdMarker"), {"Bucket": bucket, "Prefix": beginning}
        for page in _pages(fs, "list_multipart_uploads", *markers, **place):
            for one in page.get("Uploads", []):
                if not beginning or f"{one['Key']}/".startswith(f"{beginning}/"):
                    found.append((one["Initiated"], Unfinished(one["Key"], one["UploadId"])))
    except FileNotFoundError:
        return []  # No bucket, which whoever writes to it will say.
    except OSError as error:
        _check_not_told(error)
        _mention(f"s3://{bucket} does not tell of unfinished uploads, so each attempt begins anew: {error}")
        return []
    return [upload for _, upload in sorted(found, key=lambda of: (of[0], of[1]))]


def abort(fs: Any, path: str) -> None:
    """Give up the uploads that `unfinished` tells of; one that must not be is said, and costs room only."""
    bucket, _, _ = fs.split_path(path)
    for upload in unfinished(fs, path):
        try:
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload.key, UploadId=upload.id)
        except FileNotFoundError:
            continue  # Somebody was faster.
        except OSError as error:
            _check_not_told(error)
            _mention(f"s3://{bucket} keeps what was left of uploads, which costs room: {error}")


def _check_not_told(error: OSError) -> None:
    """Go on only where a server or a policy does not do such things.

    Raises:
        OSError: anything else, which may be another time.
    """
    if not isinstance(error, PermissionError) and error.errno not in (errno.ENOSYS, errno.EINVAL):
        raise error


@functools.cache
def _mention(text: str) -> None:
    """Say it once."""
    logger.warning("%s", text)


def _upload(fs: Any, bucket: str, key: str) -> _Upload:
    """The newest upload of an object that was begun, with what it has; else a new one."""
    for begun in reversed(unfinished(fs, f"{bucket}/{key}")):
        if begun.key != key:
            continue
        try:
            return _known(fs, {"Bucket": bucket, "Key": key, "UploadId": begun.id})
        except FileNotFoundError:
            continue  # It is complete by now, or given up.
        except OSError as error:
            _check_not_told(error)
            _mention(f"s3://{bucket} does not tell of the parts of uploads, so each attempt begins anew: {error}")
    answer = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    place = {"Bucket": bucket, "Key": key, "UploadId": answer["UploadId"]}
    return _Upload(place=place, algorithm=answer.get("ChecksumAlgorithm", ""))


def _known(fs: Any, place: dict[str, str]) -> _Upload:
    upload = _Upload(place=place, resumed=True)
    for page in _pages(fs, "list_parts", "PartNumberMarker", **place):
        upload.there |= {part["PartNumber"]: part for part in page.get("Parts", [])}
        upload.algorithm = page.get("ChecksumAlgorithm", "")
    return upload


def _pages(fs: Any, method: str, *markers: str, **place: str) -> Iterator[dict[str, Any]]:
    """The pages of a list; no more where a server names no next one."""
    before, after = None, dict[str, Any]()
    while after != before:
        page = fs.call_s3(method, **place, **after)
        yield page
        before = after
        if page.get("IsTruncated"):
            after = {marker: page[f"Next{marker}"] for marker in markers if page.get(f"Next{marker}")}


class _Source:
    """The parts of an object, for several threads."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._lock = threading.Lock()
        self._pieces = enumerate(pieces, 1)
        self.broken = False
        """Whether what is to be written cannot be had."""
        self.over = False
        """Whether there are no further ones, or they are of no use any more."""
        self.given = 0
        """Bytes that were handed out."""

    def next(self) -> tuple[int, bytes]:
        """The next part: its number, its bytes; nothing when it is over."""
        with self._lock:
            if self.over:
                return 0, b""
            try:
                number, piece = next(self._pieces, (0, b""))
            except BaseException:
                self.broken = self.over = True
                raise
            if not piece:  # Not taken back where others have ended it meanwhile.
                self.over = True
            self.given += len(piece)
            return number, piece


def _send(fs: Any, upload: _Upload, source: _Source) -> list[dict[str, Any]]:
    """Send parts until there are no more, or one fails; what the server wants to hear of each at the end."""
    sent: list[dict[str, Any]] = []
    while True:
        with _held:
            number, piece = source.next()
            if not piece:
                return sent
            try:
                sent.append(upload.told(number, _there(upload, number, piece) or _sent(fs, upload, number, piece)))
            except BaseException:
                source.over = True
                raise


def _there(upload: _Upload, number: int, piece: bytes) -> dict[str, Any] | None:
    """What the server told of a part at the beginning, if it had this very one."""
    there = upload.there.get(number)
    if there is None or there.get("Size") != len(piece):
        return None
    md5 = hashlib.md5(piece, usedforsecurity=False).hexdigest()
    return there if there.get("ETag", "").strip('"') == md5 else None


def _sent(fs: Any, upload: _Upload, number: int, piece: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = fs.call_s3("upload_part", **upload.place, PartNumber=number, Body=piece)
    return answer


def _pieces(chunks: Iterable[Chunk], length: int) -> Iterator[bytes]:
    """The same bytes in pieces of one length; only the last is shorter."""
    held: list[memoryview] = []
    size = 0
    for chunk in chunks:
        left = memoryview(chunk).cast("B")
        while len(left):
            held.append(left[: length - size])
            size, left = size + len(held[-1]), left[length - size :]
            if size == length:
                yield b"".join(held)
                held.clear()
                size = 0
    if size:
        yield b"".join(held)
