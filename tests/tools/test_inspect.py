"""Listing and inspecting: every checkpoint, every tensor, as text and as JSON; and which one is meant."""

from __future__ import annotations

import functools
import http.server
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient_train.errors import ConfigError, ExitCode, StorageError
from resilient_train.launch.rtctl import run
from resilient_train.spec.world import Key
from resilient_train.tools.location import Location, choose, parse
from resilient_train.tools.text import human, parse_size
from resilient_train.worker.state import State

Make = Callable[..., State]


def test_ls_shows_every_checkpoint(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Newest last, with what is unfinished or damaged."""
    make(tmp_path, 9)
    make(tmp_path, 7, 2)
    make(tmp_path, 8, 2)
    make(tmp_path, 12, 2, last=1)
    (tmp_path / "step-000000008.g2" / "rank-00000-of-00002.safetensors").unlink()
    (tmp_path / "something else").mkdir()
    assert run(["ls", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(one["step"], one["lineage"], one["ranks"], one["state"]) for one in found["checkpoints"]]
    assert rows == [(9, 1, 2, "committed"), (7, 2, 2, "committed"), (8, 2, 2, "damaged"), (12, 2, 2, "unfinished")]
    folder = tmp_path / "step-000000009.g1"
    assert found["checkpoints"][0]["bytes"] == sum(p.stat().st_size for p in folder.glob("rank-*"))
    assert run(["ls", str(tmp_path)]) == 0
    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["STEP", "LINEAGE", "RANKS", "SIZE", "STATE", "NOTE"]
    assert [line.split()[:3] for line in lines] == [["9", "1", "2"], ["7", "2", "2"], ["8", "2", "2"], ["12", "2", "2"]]
    assert "1 of 2 images are there" in lines[-1]
    assert total.startswith("2 committed checkpoints, 2 unfinished or damaged, ")
    for one in (f"{tmp_path}@7", str(tmp_path / "step-000000007.g2")):
        assert run(["ls", one]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("1 committed checkpoint, 0 unfinished or damaged, ")
    assert run(["ls", f"{tmp_path}@70"]) == 1
    assert "nothing of step 70" in capsys.readouterr().err


def test_other_tiers_are_read_too(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever fsspec knows; a place without checkpoints is empty for ls and an error for the rest."""
    url = f"memory://{uuid.uuid4().hex}"
    assert run(["ls", url]) == 0
    assert capsys.readouterr().out == "0 committed checkpoints, 0 unfinished or damaged, 0 B in all\n"
    assert run(["inspect", url]) is ExitCode.USER_ERROR
    assert "no committed checkpoint" in capsys.readouterr().err
    make(url, 5)
    assert run(["ls", f"local://{tmp_path}"]) == 0
    assert run(["verify", url]) == 0
    assert run(["inspect", url]) == 0


@pytest.mark.parametrize("command", [["ls"], ["clean"], ["verify"], ["inspect"]])
def test_a_folder_that_is_not_there_is_an_error(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip of the pen is no empty place."""
    assert run([*command, str(tmp_path / "mistyped")]) is ExitCode.USER_ERROR
    assert "mistyped: there is no" in capsys.readouterr().err


def test_ls_sees_images_that_were_cut_short(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """On disks their lengths are looked at."""
    make(tmp_path, 5)
    image = next(tmp_path.glob("*/rank-00001*"))
    os.truncate(image, 1000)
    assert run(["ls", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "damaged" in said.splitlines()[1]
    assert f"{image.name} has 1000 bytes, the manifest says" in said


def test_a_server_that_gives_no_parts_of_files_is_named(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is damaged there."""
    make(tmp_path, 5)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert run(["verify", f"http://127.0.0.1:{server.server_port}"]) is ExitCode.USER_ERROR
        finally:
            server.shutdown()
            thread.join()
    said = capsys.readouterr()
    assert "the server gives no parts of files" in said.out + said.err
    assert "DAMAGED" not in said.out


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, but no ranges of them."""

    def log_message(self, *_: object) -> None:
        pass


def test_inspect_shows_parts_and_tensors(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Kinds, dtypes, global shapes and numbers of shards."""
    make(tmp_path, 5)
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["lineage"], found["ranks"]) == (5, 1, 2)
    assert found["parts"] == {"model": "module", "optim": "optimizer", "schedule": "stateful"}
    lines = {one["name"]: one for one in found["tensors"]}
    wide = {"name": "model/wide.weight", "dtype": "BF16", "shape": [10, 6], "shards": 2, "bytes": 120}
    assert lines["model/wide.weight"] == wide
    assert (lines["model/scale"]["shape"], lines["model/scale"]["shards"]) == ([], 1)
    assert lines["model/empty"]["bytes"] == 0
    assert "model/head.weight" not in lines
    assert found["tensor_bytes"] == sum(one["bytes"] for one in lines.values())
    generators = sum(one["bytes"] for one in lines.values() if one["name"].startswith("rng/"))
    image = found["memory_per_rank"]["snapshots"] / 3
    others = found["tensor_bytes"] - generators
    assert generators / 2 + others / 2 <= image <= generators / 2 + 1.1 * others
    assert found["memory_per_rank"]["while_one_is_written"] == 4 * image
    assert run(["inspect", f"{tmp_path}@5"]) == 0
    text = capsys.readouterr().out
    assert "model/wide.weight" in text
    assert "10x6" in text
    assert "for the snapshots of each of as many ranks" in text
    assert text.splitlines()[-1].startswith(f"{len(lines)} tensors, ")


def test_a_damaged_header_is_an_error(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect does not show what cannot be trusted."""
    make(tmp_path, 5)
    image = tmp_path / "step-000000005.g1" / "rank-00001-of-00002.safetensors"
    data = bytearray(image.read_bytes())
    data[400] ^= 1
    image.write_bytes(data)
    assert run(["inspect", str(tmp_path)]) is ExitCode.USER_ERROR
    assert image.name in capsys.readouterr().err


def test_which_checkpoint_is_meant() -> None:
    """The newest, a step, a step of a lineage; an @ within a URL is no step."""
    assert parse("s3://bucket/run@120") == Location(url="s3://bucket/run", step=120)
    assert parse("run@120.g3") == Location(url="run", step=120, lineage=3)
    assert parse("ftp://me@host/run") == Location(url="ftp://me@host/run")
    assert parse("s3://b/run/step-000000120.g3/") == Location(url="s3://b/run", step=120, lineage=3)
    assert parse("/step-000000120.g3") == Location(url="/", step=120, lineage=3)
    assert parse("step-000000120.g3") == Location(url=".", step=120, lineage=3)
    assert parse("run@3/step-000000120.g3") == Location(url="run@3", step=120, lineage=3)
    assert parse("run@3", lambda text: text == "run@3") == Location(url="run@3")
    assert parse("run@3@4", lambda text: text == "run@3") == Location(url="run@3", step=4)
    assert parse("step-120.g3") == Location(url="step-120.g3")
    keys = [Key(1, 120), Key(1, 130), Key(2, 120)]
    assert choose(parse("run"), keys, []) == Key(2, 120)
    assert choose(parse("run@130"), keys, []) == Key(1, 130)
    assert choose(parse("run@120.g1"), keys, []) == Key(1, 120)
    with pytest.raises(ConfigError, match=r"120\.g1, 120\.g2"):
        choose(parse("run@120"), keys, [])
    with pytest.raises(StorageError, match=r"no checkpoint of step 7; the newest are 120\.g1, 130\.g1, 120\.g2"):
        choose(parse("run@7"), keys, [])
    with pytest.raises(StorageError, match="unfinished"):
        choose(parse("run@7"), keys, [Key(3, 7)])
    with pytest.raises(StorageError, match="URL@120"):
        choose(parse("run@latest"), [], [])


def test_sizes() -> None:
    """GB is 1000 to the third, GiB 1024 to the third."""
    assert [human(n) for n in (0, 1023, 1024, 1536 << 20)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]
    assert human(None) == "-"
    assert [parse_size(text) for text in ("7", "5GB", "1.5 MiB", "10kb")] == [7, 5 * 10**9, 3 << 19, 10_000]
    for bad in ("", "GB", "0", "-1", "5XB", "1e9", "0.1"):
        with pytest.raises(ConfigError, match="5GB"):
            parse_size(bad)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["ls"],
        ["frobnicate", "run"],
        ["export", "run"],
        ["export", "run", "--to", "out", "--max-shard-size", "x"],
        ["verify", "run@3", "--all"],
        ["clean", "run", "--keep", "many"],
        ["clean", "run@3"],
        ["inspect", ""],
        ["export", "run", "--to", ""],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And says what is wrong."""
    with pytest.raises(SystemExit) as ended:
        sys.exit(int(run(command)))
    assert ended.value.code == ExitCode.USAGE
    assert "error: " in capsys.readouterr().err
