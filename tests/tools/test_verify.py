"""Verification reads everything: whatever was done to a checkpoint is found, and named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient_train.errors import ExitCode
from resilient_train.image.native import checksum
from resilient_train.launch.rtctl import run
from resilient_train.worker.state import State

Make = Callable[..., State]
SECOND = "rank-00001-of-00002.safetensors"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def harm(image: Path, how: str) -> str:
    """Damage a checkpoint; the name of what must be reported."""
    folder = image.parent
    if how == "missing":
        image.unlink()
    elif how == "truncated":
        image.write_bytes(image.read_bytes()[:-100])
    elif how == "swapped":
        image.write_bytes((folder / SECOND.replace("1", "0", 1)).read_bytes())
    elif how == "manifest":
        (folder / "manifest.json").write_text("{")
        return "manifest.json"
    else:
        size = image.stat().st_size
        flip(image, {"header": 300, "data": 4200, "document": size - 4096 - 100, "padding": size - 1}[how])
    return image.name


def verdicts(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    "how", ["data", "header", "document", "padding", "truncated", "missing", "swapped", "manifest"]
)
def test_every_damage_is_found_and_named(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """Exit 1 and the file; the other files and checkpoints are whole."""
    make(tmp_path, 3)
    make(tmp_path, 4)
    name = harm(tmp_path / "step-000000004.g1" / SECOND, how)
    assert run(["verify", str(tmp_path), "--json"]) is ExitCode.USER_ERROR
    (verdict,) = verdicts(capsys)
    assert [one["file"] for one in verdict["damage"]] == [f"step-000000004.g1/{name}"]
    assert run(["verify", f"{tmp_path}@3", "--json"]) is ExitCode.SUCCESS
    assert verdicts(capsys)[0]["whole"]
    assert run(["verify", str(tmp_path), "--all"]) is ExitCode.USER_ERROR
    text = capsys.readouterr().out
    assert "step-000000003.g1: whole (2 images" in text
    assert "step-000000004.g1: DAMAGED" in text
    assert name in text


def test_what_is_unfinished_is_said_and_harms_nothing(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no manifest to be verified by."""
    make(tmp_path, 3)
    (tmp_path / "step-000000004.g1").mkdir()
    assert run(["verify", str(tmp_path), "--all"]) is ExitCode.SUCCESS
    assert "step-000000004.g1: unfinished" in capsys.readouterr().out
    assert run(["verify", str(tmp_path), "--all", "--json"]) is ExitCode.SUCCESS
    assert json.loads(capsys.readouterr().out)["unfinished"] == [{"step": 4, "lineage": 1}]
    assert run(["verify", str(tmp_path)]) is ExitCode.SUCCESS
    assert "unfinished" not in capsys.readouterr().out


def test_all_damaged_files_are_named(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Not only the first."""
    make(tmp_path, 3)
    images = sorted((tmp_path / "step-000000003.g1").glob("rank-*"))
    flip(images[0], 4200)
    images[1].unlink()
    assert run(["verify", str(tmp_path), "--json"]) == 1
    first, second = verdicts(capsys)[0]["damage"]
    assert (first["file"], "block 0" in first["reason"]) == (f"step-000000003.g1/{images[0].name}", True)
    assert (second["file"], "missing" in second["reason"]) == (f"step-000000003.g1/{images[1].name}", True)


def test_boxes_that_leave_holes_are_found(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file is sound and committed, but they do not add up to the tensors."""
    make(tmp_path, 3)
    folder = tmp_path / "step-000000003.g1"
    image = folder / SECOND
    data = image.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    # The second half of the embedding's rows is said to be the first half once more.
    before = rb"\"model/embed.weight\":[[9,6],[5,0]]"
    assert before in data[:length]
    header = data[:length].replace(before, before.replace(b"[5,0]", b"[0,0]"))
    # Nor is it said how they are laid out over the ranks, which would tell.
    header, forgotten = re.subn(rb'\\"model/embed\.weight(\\":\d)', rb'\\"model/embed.WEIGHT\1', header)
    assert forgotten == 1
    image.write_bytes(header + data[length:])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][1]["header_crc"] = checksum(header)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(["verify", str(tmp_path)]) == 1
    assert "do not cover model/embed.weight" in capsys.readouterr().out
    assert run(["export", str(tmp_path), "--to", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
