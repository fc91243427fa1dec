"""Exported models: the same bits, in files as Hugging Face's, all of them or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from resilient_train.errors import ExitCode, FormatError
from resilient_train.launch.rtctl import run
from resilient_train.plan.consolidated import plan_files
from resilient_train.spec.layout import Box
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.tools import export
from resilient_train.worker.state import State

Make = Callable[..., State]


def model_of(state: State) -> nn.Module:
    model = state._things["model"]
    assert isinstance(model, nn.Module)
    return model


def assert_same(loaded: dict[str, torch.Tensor], state: State) -> None:
    expected = model_of(state).state_dict()
    del expected["head.weight"]
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("slab", [1, 40, 1 << 20])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_one_file_holds_the_same_bits(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, slab: int, ranks: int
) -> None:
    """Whatever the sharding and however much is gathered at once; tied names stand in the metadata."""
    monkeypatch.setattr(export, "SLAB", slab)
    state = make(tmp_path / "run", 7, ranks=ranks)
    out = tmp_path / "made" / "out"
    assert run(["export", str(tmp_path / "run"), "--to", str(out)]) is ExitCode.SUCCESS
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert_same(load_file(out / "model.safetensors"), state)
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    fresh = type(model_of(state))()
    with torch.no_grad():
        fresh.embed.weight.zero_()
    load_model(fresh, out / "model.safetensors")
    assert torch.equal(fresh.head.weight, model_of(state).head.weight)


def test_several_files_have_an_index(tmp_path: Path, make: Make) -> None:
    """No file above the limit but for a single tensor; the index says where everything is, and how much it is."""
    state = make(tmp_path / "run", 7)
    out = tmp_path / "out"
    assert run(["export", str(tmp_path / "run@7.g1"), "--to", str(out), "--max-shard-size", "130B"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) >= 3
    assert {path.name for path in out.iterdir()} == {*names, "model.safetensors.index.json"}
    loaded = {}
    for name in names:
        part = load_file(out / name)
        assert sorted(part) == sorted(tensor for tensor, file in index["weight_map"].items() if file == name)
        sizes = [tensor.nbytes for tensor in part.values()]
        assert sum(sizes) <= 130 or len(sizes) == 1
        loaded.update(part)
    assert_same(loaded, state)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in loaded.values())}


def test_nothing_is_overwritten_without_force(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """With --force the model is replaced as a whole, what is no model file stays."""
    state = make(tmp_path / "run", 7)
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run"), "--to", str(out)]
    assert run([*command, "--max-shard-size", "130"]) == 0
    (out / "config.json").write_text("{}")
    before = sorted(path.name for path in out.iterdir())
    assert run(command) is ExitCode.USAGE
    assert "--force" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == before
    assert run([*command, "--force"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_file(out / "model.safetensors"), state)
    assert run(["export", str(tmp_path / "run"), "--to", str(out / "config.json")]) is ExitCode.USAGE


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_nothing(tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str], exists: bool) -> None:
    """A damaged block is found on the way: the error names the file, and no half of a model is there."""
    make(tmp_path / "run", 7)
    image = tmp_path / "run" / "step-000000007.g1" / "rank-00001-of-00002.safetensors"
    data = bytearray(image.read_bytes())
    data[4096 + 8] ^= 1
    image.write_bytes(data)
    out = tmp_path / "new" / "out"
    if exists:
        out.mkdir(parents=True)
    assert run(["export", str(tmp_path / "run"), "--to", str(out)]) is ExitCode.USER_ERROR
    assert image.name in capsys.readouterr().err
    assert list((tmp_path / "new").rglob("*")) == ([out] if exists else [])
    assert (tmp_path / "new").exists() == exists


def test_a_write_that_fails_is_an_error_and_leaves_nothing(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the last of several files fails to be moved into place."""
    make(tmp_path / "run", 7)
    out = tmp_path / "out"
    moved: list[object] = []
    real = export.settle.__globals__["os"].replace

    def replace(source: Path, target: Path) -> None:
        if len(moved) == 2:
            raise OSError(28, "No space left on device")
        moved.append(target)
        real(source, target)

    monkeypatch.setattr("resilient_train.tools.folder.os.replace", replace)
    command = ["export", str(tmp_path / "run"), "--to", str(out), "--max-shard-size", "130"]
    assert run(command) is ExitCode.USER_ERROR
    assert "No space left" in capsys.readouterr().err
    assert not out.exists()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.ones(3))
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None:
        del state


def test_parts_and_dtypes_that_cannot_be_exported_are_named(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several modules: --part says which; optimizers are none; complex numbers have no place in safetensors."""
    odd, small = Complex(), nn.Linear(2, 2)
    make(tmp_path, 1, state=State(odd=odd, small=small, optim=torch.optim.SGD(small.parameters())))
    command = ["export", str(tmp_path), "--to", str(tmp_path / "out")]
    assert run(command) is ExitCode.USAGE
    assert "odd (module), optim (optimizer), small (module)" in capsys.readouterr().err
    assert run([*command, "--part", "optim"]) is ExitCode.USAGE
    assert run([*command, "--part", "odd"]) is ExitCode.USER_ERROR
    assert "phase (complex64)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*command, "--part", "small"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"weight", "bias"}


def test_documents_that_say_nonsense_are_damage(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Aliases of what is not there, or of no name: an error, nothing written; no tensor takes the header's place."""
    make(tmp_path / "run", 7)
    command = ["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]
    for nonsense in ({"x": "gone"}, {"x": ["embed.weight"]}, {"scale": "one"}, [1], 3):
        document = {"model": {"kind": "module", "aliases": nonsense, "extra": {}}}
        monkeypatch.setattr("resilient_train.image.verified.VerifiedImage.json", lambda image, d=document: d)
        assert run(command) is ExitCode.USER_ERROR, nonsense
        assert "model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match="__metadata__"):
        plan_files([export.Whole(name="__metadata__", dtype="F32", shape=(1,))], {}, 10)


def test_slabs_cut_rows_and_lose_none() -> None:
    """One after the other they are the tensor; one row is the least, a tensor without elements has none."""
    tensor = export.Whole(name="t", dtype="F32", shape=(7, 5))
    for limit in (1, 20, 45, 139, 140):
        boxes = list(export.slabs(tensor, limit))
        assert sum(box.shape[0] for box in boxes) == 7
        assert [box.offset[0] for box in boxes] == [sum(b.shape[0] for b in boxes[:i]) for i in range(len(boxes))]
        assert max(box.size * 4 for box in boxes) <= max(limit, 20)
    assert list(export.slabs(export.Whole(name="t", dtype="F32", shape=()), 1)) == [Box((), ())]
    assert list(export.slabs(export.Whole(name="t", dtype="F32", shape=(0, 4)), 1)) == []


def test_memory_is_bounded_by_slabs_and_not_by_the_model(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read is longer than a slab and the blocks that it touches."""
    big = nn.Linear(1024, 3000, bias=False)
    make(tmp_path / "run", 1, state=State(big=big))
    monkeypatch.setattr(export, "SLAB", 1 << 20)
    longest = 0
    read = FilesystemTier.read

    def measured(self: FilesystemTier, path: str, offset: int, length: int) -> bytes:
        nonlocal longest
        longest = max(longest, length)
        return read(self, path, offset, length)

    monkeypatch.setattr(FilesystemTier, "read", measured)
    assert run(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert longest <= 3 << 20
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], big.weight)
