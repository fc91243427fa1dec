"""Import of what plain DCP wrote: nothing in it is executed, and what cannot be taken over is named."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcp_training
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as of_dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat

from resilient_train.errors import CheckpointDamaged, ConfigError, ExitCode, ResilientError, UnsupportedState
from resilient_train.interop.dcp_folder import read_folder
from resilient_train.interop.dcp_import import import_checkpoint, step_of
from resilient_train.launch import rtctl
from resilient_train.storage.filesystem import open_tier


def write(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **options))
    return folder


def taken(folder: Path, url: Path, step: int = 3) -> None:
    import_checkpoint(open_tier(str(folder)), open_tier(str(url)), step, lambda done, total: None)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("stored", list(SerializationFormat))
def test_a_training_goes_on_as_if_it_had_not_been_converted(
    tmp_path: Path, joined: bool, stored: SerializationFormat
) -> None:
    """Both forms of optimizer states, both serialisations: the same bits after further steps, and for dcp.load."""
    model, optim = dcp_training.made(0)
    dcp_training.train(model, optim, 0, 2)
    state = dcp_training.state_of(model, optim, joined=joined)
    # Of tied tensors safetensors refuses one, and DCP asks it to write both.
    options = {"serialization_format": stored, "thread_count": 2}
    if stored is SerializationFormat.SAFETENSORS:
        state["model"]["head.weight"] = state["model"]["head.weight"].clone()
    taken(write(tmp_path / "plain", state, **options), tmp_path / "ours")
    other, its = dcp_training.made(1)
    dcp_training.filled(tmp_path / "ours", model=other, optim=its)
    for one in (model, optim), (other, its):
        dcp_training.train(*one, 2, 4)
    dcp_training.assert_same(dcp_training.state_of(other, its), dcp_training.state_of(model, optim))
    dcp_training.assert_same(dcp_training.loaded(tmp_path / "ours", joined=joined).keys(), state.keys())
    assert len(list(tmp_path.glob("ours/step-000000003.g1/*.safetensors"))) == 2, "one image for each file"
    assert rtctl.run(["verify", str(tmp_path / "ours")]) is ExitCode.SUCCESS


def test_any_other_state_dict_can_be_loaded(tmp_path: Path) -> None:
    """Trees, values, numbered optimizer states: for dcp.load, under the names that they had."""
    model, optim = dcp_training.made(0)
    dcp_training.train(model, optim, 0, 1)
    state = {"optim": optim.state_dict(), "n": 4, "x": {"l": [torch.rand(2), {"y": (1, 2)}], "e": torch.empty(0, 3)}}
    taken(write(tmp_path / "plain", state), tmp_path / "ours")
    fresh, its = dcp_training.made(1)
    dcp_training.train(fresh, its, 0, 1)
    found = {"optim": its.state_dict(), "n": 0, "x": {"l": [torch.zeros(2), {"y": None}], "e": torch.empty(0, 3)}}
    dcp.load(found, storage_reader=dcp_training.rt_dcp.Reader(tmp_path / "ours"))
    dcp_training.assert_same(found, state)


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def metadata(planner_data: Any) -> of_dcp.Metadata:
    return of_dcp.Metadata(state_dict_metadata={}, planner_data=planner_data, storage_data={})


@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (os.system, ("touch MARK",), "posix.system"),
        (eval, ("open('MARK', 'w')",), "builtins.eval"),
        (getattr, ("torch", "load"), "builtins.getattr"),
        (torch.load, ("MARK",), "torch.serialization.load"),
        (torch.hub.load, ("MARK",), "torch.hub.load"),
        (__import__, ("this",), "builtins.__import__"),
    ],
)
def test_a_hostile_metadata_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, args: Any, named: str, capsys: Any
) -> None:
    """Nothing of it is called, nothing is written, and the error says what it wanted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata({"a": Call(function, *args)})))
    assert rtctl.run(["import", str(tmp_path), "--to", str(tmp_path / "ours"), "--step", "1"]) is ExitCode.USER_ERROR
    said = capsys.readouterr().err
    assert named in said
    assert "refused" in said
    assert [path.name for path in tmp_path.iterdir()] == [".metadata"]


def test_a_metadata_cannot_change_classes(tmp_path: Path) -> None:
    """The build opcode sets attributes of whatever it is given: of records of ours, gone with the file."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    hostile = b"\x80\x04" + name + b"N}X\x04\x00\x00\x00evilX\x01\x00\x00\x00xs\x86b."
    (tmp_path / ".metadata").write_bytes(hostile)
    with pytest.raises((CheckpointDamaged, UnsupportedState)):
        read_folder(open_tier(str(tmp_path)))
    assert not hasattr(of_dcp.Metadata, "evil")
    assert pickle.loads(hostile) is of_dcp.Metadata, "it would have"
    assert of_dcp.Metadata.evil == "x"  # type: ignore[attr-defined]
    del of_dcp.Metadata.evil  # type: ignore[attr-defined]


def laughing(place: str) -> bytes:
    """A list of lists of lists, small in memory and endless in print, where something else must be."""
    laughs: list[Any] = []
    for _ in range(60):
        laughs = [laughs] * 9
    described = metadata({"w": laughs if place == "path" else ("w",)})
    size: Any = laughs if place == "size" else torch.Size([1])
    leaf = of_dcp.TensorStorageMetadata(of_dcp.TensorProperties(), size, [])
    described.state_dict_metadata["w"] = of_dcp.BytesStorageMetadata() if place == "path" else leaf
    return pickle.dumps(described)


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x80\x04]r\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + b"\xff" * 5 + bytes(3) + b".",
        laughing("path"),
        laughing("size"),
        b"\x80\x04})" + b"2\x86" * 60 + b"Ns.",
        b"\x80\x04}()" + b"2\x86" * 60 + b"Nu.",
    ],
    ids=["memo", "bytes", "path", "size", "key", "keys"],
)
def test_a_metadata_that_claims_much_is_refused_at_once(tmp_path: Path, hostile: bytes) -> None:
    """Neither memory nor time for what a few bytes claim."""
    (tmp_path / ".metadata").write_bytes(hostile)
    with pytest.raises(CheckpointDamaged, match=r"\.metadata"):
        read_folder(open_tier(str(tmp_path)))


def packed(payload: bytes) -> bytes:
    """What torch.save would write, with another pickle inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


@pytest.mark.parametrize("which", ["tensor", "value"])
def test_a_hostile_item_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Tensors and values are unpickled by torch's unpickler for plain ones."""
    monkeypatch.chdir(tmp_path)
    state = {"x": {"value": {"k": 1}, "tensor": torch.rand(2)}}
    folder = write(tmp_path / "plain", state)
    described = pickle.loads((folder / ".metadata").read_bytes())
    hostile = packed(pickle.dumps(Call(os.system, "touch MARK"), protocol=2))
    for index, info in described.storage_data.items():
        if index.fqn.startswith(f"x.{which}"):
            info.relative_path, info.offset, info.length = "evil", 0, len(hostile)
    (folder / "evil").write_bytes(hostile)
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(UnsupportedState, match=rf"evil: x\.{which}.* needs posix\.system.*refused"):
        taken(folder, tmp_path / "ours")
    assert not (tmp_path / "MARK").exists()
    assert not list(tmp_path.glob("ours/*"))


@pytest.mark.parametrize("value", [{1, 2}, torch.nn.Identity(), (1, torch.rand(1))])
def test_a_value_that_json_cannot_hold_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    """By the name of the leaf; nothing is written."""
    folder = write(tmp_path / "plain", {"w": torch.rand(1), "x": {"odd": value}})
    with pytest.raises(UnsupportedState, match=r"x\.odd"):
        taken(folder, tmp_path / "ours")
    assert not list(tmp_path.glob("ours/*"))


def test_damage_of_the_source_is_found(tmp_path: Path) -> None:
    """A flipped bit in a tensor, a truncated file, a missing one: named, and nothing is committed."""
    folder = write(tmp_path / "plain", {"model": {"w": torch.zeros(1000), "v": torch.ones(3)}})
    (file,) = folder.glob("*.distcp")
    sound = file.read_bytes()
    flipped = bytearray(sound)
    flipped[sound.index(bytes(1000)) + 500] ^= 1
    for content in (bytes(flipped), sound[:-2000], None):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with pytest.raises(CheckpointDamaged, match=r"__0_0\.distcp"):
            taken(folder, tmp_path / "ours")
        assert not list(tmp_path.glob("ours/*"))
    with pytest.raises(CheckpointDamaged, match=r"\.metadata: the file is missing"):
        taken(tmp_path, tmp_path / "ours")


def test_a_damaged_metadata_is_never_anything_but_an_error(tmp_path: Path) -> None:
    """Hundreds of them: each is refused by an error of ours, or describes the same as before."""
    sound = (write(tmp_path, {"model": {"w": torch.rand(4, 3)}, "n": 3}) / ".metadata").read_bytes()
    tier, path = open_tier(str(tmp_path)), tmp_path / ".metadata"
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    for _ in range(500):
        data = bytearray(sound)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data[: dice.choice([len(data), len(data), dice.randrange(len(data))])])
        try:
            read_folder(tier)
        except ResilientError:
            continue


def test_the_step_is_said_or_in_the_folders_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Never guessed, since a training would go on from there."""
    assert step_of("s3://bucket/run/checkpoint-1200/") == 1200
    with pytest.raises(ConfigError, match="--step"):
        step_of("/data/latest")
    folder = write(tmp_path / "step_7", {"model": {"w": torch.rand(2)}, "n": 1})
    assert rtctl.run(["import", str(folder), "--to", str(tmp_path / "ours")]) is ExitCode.SUCCESS
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path}/ours/step-000000007.g1: 1 tensor, 8 B in 1 image", "  model: module", "  n: stateful"]
    assert rtctl.run(["import", str(folder), "--to", str(tmp_path / "ours"), "--step", "-1"]) is ExitCode.USAGE
