"""fsspec tiers pass the conformance suite; what a local disk refuses becomes a clear error."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from resilient_train.errors import CheckpointDamaged, StorageError
from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import commit, listing, read_manifest
from resilient_train.storage.commit import ImageFile, Manifest, decode_part, encode_part, folder_of, key_of, merge
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.storage.tier import Tier
from resilient_train.testing.tier import TierConformance


class TestLocalTier(TierConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.url = f"file://{tmp_path}/run"

    def tier(self) -> Tier:
        return FilesystemTier(self.url)

    def refusing(self) -> Tier:
        (self.folder / "loop").symlink_to("loop")
        return FilesystemTier(f"file://{self.folder}/loop/run")


class TestMemoryTier(TierConformance):
    """fsspec's memory:// stands for object stores here: no folders, no rename."""

    @pytest.fixture(autouse=True)
    def _folder(self) -> None:
        self.url = f"memory://{uuid.uuid4().hex}"

    def tier(self) -> Tier:
        return FilesystemTier(self.url)

    def refusing(self) -> Tier:
        fsspec.register_implementation("refusing", RefusingFileSystem, clobber=True)
        return FilesystemTier("refusing://run")


class RefusingFileSystem(MemoryFileSystem):
    """One to which every question is too much."""

    protocol = "refusing"

    def info(self, path: str, **kwargs: Any) -> Any:
        raise OSError(errno.ESTALE, "stale file handle", path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        raise OSError(errno.ESTALE, "stale file handle", path)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    """A file where a folder should be: the error names the place before any training is done."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="file/run: cannot be written"):
        FilesystemTier(f"{blocked}/run").check_writable()
    with pytest.raises(StorageError, match="nonsense"):
        FilesystemTier("nonsense://bucket")


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would have its reader wait for ever; a folder is not missing."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    tier = FilesystemTier(str(tmp_path))
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointDamaged, match=f"{name}: is no file"):
            tier.size(name)
        with pytest.raises(CheckpointDamaged, match=f"{name}: is no file"):
            tier.read(name, 0, 10)
        with pytest.raises(CheckpointDamaged, match=f"{name}: is no file"), tier.handle(name):
            pass


def test_a_url_with_a_slash_too_few_is_no_path_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec takes the host of file://host/path for a folder of the current one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="file:///tmp/run"):
        FilesystemTier("file://tmp/run")
    FilesystemTier("file://./run").check_writable()
    assert (tmp_path / "run").is_dir()


def files(ranks: list[int]) -> list[ImageFile]:
    return [ImageFile(name=f"r{rank}", rank=rank, size=1, header_crc=2, table_crc=3) for rank in ranks]


def part(key: Key, world: int, ranks: list[int], **more: Any) -> Manifest:
    return Manifest(key=key, world=world, files=tuple(files(ranks)), past={3: None}, **more)


def test_a_checkpoint_is_committed_by_whoever_puts_the_last_part(tmp_path: Path) -> None:
    """No manifest until the parts name every rank; then the same manifest whoever writes it."""
    tier = FilesystemTier(str(tmp_path))
    key = Key(3, 41)
    for file in files([0, 1, 2]):
        tier.put(f"{folder_of(key)}/{file.name}", [b"1"])
    assert not commit(tier, part(key, 3, [2]))
    assert listing(tier) == ([], [key])
    with pytest.raises(CheckpointDamaged, match="missing"):
        read_manifest(tier, key)
    assert commit(tier, part(key, 3, [0, 1]))
    assert listing(tier) == ([key], [])
    assert read_manifest(tier, key) == Manifest(key=key, world=3, files=tuple(files([0, 1, 2])), past={3: None})


def test_a_checkpoint_whose_images_were_removed_is_not_committed(tmp_path: Path) -> None:
    """A job that is started again while its predecessor's keeper still writes removes that as a leftover."""
    tier = FilesystemTier(str(tmp_path))
    key = Key(3, 41)
    tier.put(f"{folder_of(key)}/r0", [b"1"])
    with pytest.raises(StorageError, match="r1 was removed"):
        commit(tier, part(key, 2, [0, 1]))
    assert listing(tier) == ([], [key])


def test_every_folder_that_is_made_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not take the root's name, and with it what was said to be on the device."""
    synced: set[str] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    tier = FilesystemTier(str(tmp_path / "a" / "b" / "run"))
    tier.check_writable()
    assert synced >= {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")}
    synced.clear()
    tier.put("step/x", [b"1"])
    assert synced >= {str(tmp_path / "a" / "b" / "run"), str(tmp_path / "a" / "b" / "run" / "step")}


def test_folder_names_are_keys() -> None:
    """step-000000041.g3 and back; other names are nobody's."""
    assert folder_of(Key(3, 41)) == "step-000000041.g3"
    assert key_of("step-000000041.g3") == Key(3, 41)
    assert key_of("step-41") is None
    assert key_of("models") is None
    # Not what folder_of makes: another folder's name for the same key, or lineages that no key can have.
    assert key_of("step-000000041.g03") is None
    assert key_of("step-0000000041.g3") is None
    assert key_of("step-000000041.g999999999") is None
    assert key_of("step-00000004\u0661.g3") is None


def test_nonsense_manifests_are_refused_by_name() -> None:
    """Hostile and damaged manifests are errors that name the file."""
    good = Manifest(key=Key(1, 2), world=1, files=tuple(files([0])), past={1: None})
    assert decode_part(encode_part(good), "p") == good
    bad_name = encode_part(good).replace(b'"r0"', b'"../../etc/passwd"')
    for data in (b"", b"[]", b"{}", b'{"format": 99}', b"\xff\xfe", b"[" * 50_000, bad_name):
        with pytest.raises(CheckpointDamaged, match="p: "):
            decode_part(data, "p")
    assert merge([]) is None
    assert merge([good, Manifest(key=Key(1, 3), world=1, files=good.files, past={})]) is None


def test_an_endless_manifest_is_not_read(tmp_path: Path) -> None:
    """A terabyte in the manifest's place is an error by its size."""
    folder = tmp_path / folder_of(Key(1, 2))
    folder.mkdir()
    with open(folder / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointDamaged, match=r"step-000000002.g1/manifest.json: not a manifest"):
        read_manifest(FilesystemTier(str(tmp_path)), Key(1, 2))


def test_what_a_killed_keeper_had_begun_goes_with_the_next_write(tmp_path: Path) -> None:
    """The image is written again by its successor, under the same name; other files' leftovers are not its business."""
    tier = FilesystemTier(str(tmp_path))
    tier.put("a/x.safetensors", [b"1"])
    others = {"y.safetensors.0123.tmp", "manifest.json.0123.tmp"}
    for name in ("x.safetensors.0123.tmp", *others):
        (tmp_path / "a" / name).write_bytes(b"half")
    tier.put("a/x.safetensors", [b"12"])
    tier.put("a/manifest.json", [b"{}"])
    assert tier.folders() == {"a": {"x.safetensors", "manifest.json", *others}}
    assert tier.read("a/x.safetensors", 0, 2) == b"12"
