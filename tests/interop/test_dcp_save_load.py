"""Writer and Reader in one process: whatever a state dict may hold comes back, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dcp_training
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from resilient_train.errors import CheckpointDamaged, ConfigError, StateMismatch, StorageError, UnsupportedState
from resilient_train.interop.dcp import Reader, Writer
from resilient_train.launch import rtctl


def save(url: Path, state: dict[str, Any], step: int = 1, **options: Any) -> None:
    dcp.save(state, storage_writer=Writer(url, step=step), **options)


def load(url: Path, state: dict[str, Any], step: int | None = None, **options: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=Reader(url, step=step), **options)
    return state


def cause(caught: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    """What DCP has wrapped."""
    ((error, _),) = caught.value.failures.values()
    return error


def emptied(tree: Any) -> Any:
    """A state dict of the same form with other values."""
    if isinstance(tree, dict):
        return {key: emptied(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [emptied(value) for value in tree]
    return torch.zeros_like(tree) if torch.is_tensor(tree) else None


def filled(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(24 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype is torch.bool else 120)
    return bits.view(dtype).view(2, 3, 4)


DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.uint8, torch.int64, torch.uint32, torch.bool, torch.complex64, torch.float8_e4m3fnuz,
]  # fmt: skip
STATES: dict[str, dict[str, Any]] = {
    "dtypes": {"x": {str(dtype): filled(dtype) for dtype in DTYPES}},
    "shapes": {"x": {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "strided": torch.rand(4, 6).t()[::2]}},
    "flat": {"a.weight": torch.rand(3), "a.bias": torch.tensor(1)},
    "values": {
        "n": 3,
        "x": {"f": 0.1, "s": "é", "b": b"\0", "none": None, "t": (1, (2,)), "l": [1, [2]], "inf": 1e999},
    },
    "lists": {"x": {"l": [torch.rand(2), {"y": [torch.tensor(1), 5]}, 7], "after": "z"}},
    "names": {
        "rng": {"state": torch.get_rng_state()},
        "a/b": {"c/d": torch.rand(1)},
        "a_b": {"e": torch.rand(1)},
        "": {"f": 1, "g": torch.rand(2)},
    },
    "one tensor": {"t": torch.rand(2), "n": {"v": 1}},
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_state_dict_holds_comes_back(tmp_path: Path, name: str) -> None:
    """Same bits, dtypes and types; rtctl finds the checkpoint whole."""
    state = STATES[name]
    save(tmp_path, state)
    dcp_training.assert_same(load(tmp_path, emptied(state)), state)
    for command in ("ls", "inspect", "verify"):
        assert rtctl.run([command, str(tmp_path)]) == 0


def test_without_flattening(tmp_path: Path) -> None:
    """Planners that keep the state dict as it is give names without paths."""
    state = {"w": torch.rand(3, 2), "v": torch.rand(1)}
    save(tmp_path, state, planner=DefaultSavePlanner(flatten_state_dict=False))
    found = load(tmp_path, emptied(state), planner=DefaultLoadPlanner(flatten_state_dict=False))
    dcp_training.assert_same(found, state)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"model": {"w": torch.rand(2)}, "x": {"deep": object()}}, "x.deep is a builtins.object"),
        ({"model": {"w": torch.rand(2)}, "x": {"pair": (1, torch.rand(1))}}, "x.pair[1] is a torch.Tensor"),
        ({"x": {"sparse": torch.eye(2).to_sparse()}}, "x/sparse is a Tensor with layout torch.sparse_coo"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, state: dict[str, Any], named: str) -> None:
    """Nothing is pickled, and nothing is left."""
    with pytest.raises(CheckpointException) as caught:
        save(tmp_path, state)
    assert isinstance(cause(caught), UnsupportedState)
    assert named in str(cause(caught))
    assert list(tmp_path.iterdir()) == []


class Restless(DefaultSavePlanner):
    """A planner of a training that does not stand still."""

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        data += 1
        return data


def test_tensors_that_change_while_they_are_saved_are_found_out(tmp_path: Path) -> None:
    """A checkpoint whose checksums are wrong must not come to be."""
    with pytest.raises(CheckpointException) as caught:
        save(tmp_path, {"w": torch.zeros(3)}, planner=Restless())
    assert "changed while they were being saved" in str(cause(caught))
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_saved_again_stands_beside_the_first(tmp_path: Path) -> None:
    """Nothing committed is overwritten; the newer one is read."""
    for value in (1.0, 2.0):
        save(tmp_path, {"w": torch.tensor([value])}, step=5)
    save(tmp_path, {"w": torch.tensor([3.0])}, step=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-00000000{s}" for s in ("4.g3", "5.g1", "5.g2")]
    assert load(tmp_path, {"w": torch.zeros(1)}, step=5)["w"].item() == 2
    assert load(tmp_path, {"w": torch.zeros(1)})["w"].item() == 3, "the newest is the one that was saved last"


def test_arguments_that_cannot_be_meant(tmp_path: Path) -> None:
    """Said at once, or when DCP begins."""
    for make in (lambda: Writer("", step=1), lambda: Writer(tmp_path, step=-1), lambda: Reader(tmp_path, step=-1)):
        with pytest.raises(ConfigError):
            make()
    state = {"w": torch.zeros(1)}
    with pytest.raises(ConfigError, match="exclude each other"):
        save(tmp_path, state, checkpoint_id="elsewhere")
    with pytest.raises(ConfigError, match="exclude each other"):
        load(tmp_path, state, checkpoint_id="elsewhere")
    with pytest.raises(ConfigError, match="use_collectives"):
        save(tmp_path, state, use_collectives=False)


def test_cached_plans_are_refused(tmp_path: Path) -> None:
    """They would carry the first checkpoint's key into the second."""
    state = {"w": torch.zeros(1)}
    save(tmp_path, state, planner=DefaultSavePlanner(enable_plan_caching=True))
    with pytest.raises(CheckpointException, match="enable_plan_caching"):
        save(tmp_path, state, step=2, planner=DefaultSavePlanner(enable_plan_caching=True))


def harm(folder: Path, how: str) -> None:
    image = folder / "rank-00000-of-00001.safetensors"
    if how == "missing":
        image.unlink()
        return
    path = folder / "manifest.json" if how == "manifest" else image
    data = bytearray(path.read_bytes())
    data[{"block": 4096 + (1 << 20) + 5, "header": 300, "manifest": 3}[how]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["block", "header", "missing", "manifest"])
def test_damage_is_named_and_nothing_is_loaded(tmp_path: Path, how: str) -> None:
    """The file, and the block where one fails its checksum."""
    save(tmp_path, {"w": torch.rand(1 << 19)})
    harm(tmp_path / "step-000000001.g1", how)
    state = {"w": torch.zeros(1 << 19)}
    with pytest.raises(CheckpointException) as caught:
        load(tmp_path, state)
    said = str(cause(caught))
    assert ("manifest.json" if how == "manifest" else "rank-00000-of-00001.safetensors") in said
    assert not state["w"].any()
    if how == "block":
        assert isinstance(cause(caught), CheckpointDamaged)
        assert "block 1 (from byte" in said


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """An empty place, a step, a key."""
    with pytest.raises(StorageError, match="no committed checkpoint"):
        Reader(tmp_path).read_metadata()
    save(tmp_path, {"w": torch.rand(1)})
    with pytest.raises(StorageError, match=r"no committed checkpoint of step 2; the newest are step 1"):
        Reader(tmp_path, step=2).read_metadata()
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: other"):
        load(tmp_path, {"other": torch.zeros(1)})


def test_a_resharded_read_takes_only_the_rows_it_needs(tmp_path: Path) -> None:
    """Damage elsewhere in the tensor does not matter, because it is not read."""
    whole = torch.arange(1 << 20, dtype=torch.float32).view(-1, 64)
    save(tmp_path, {"w": whole})
    harm(tmp_path / "step-000000001.g1", "block")
    reader = Reader(tmp_path)
    metadata = reader.read_metadata()
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"w": torch.zeros_like(whole)}, metadata, True)
    plan = planner.create_local_plan()
    (item,) = plan.items
    rows = torch.zeros(16, 64)
    part = type(item)(
        type=item.type, dest_index=item.dest_index, dest_offsets=item.dest_offsets, storage_index=item.storage_index,
        storage_offsets=torch.Size((5, 0)), lengths=torch.Size((16, 64)),
    )  # fmt: skip
    planner.resolve_tensor = lambda _: rows  # type: ignore[method-assign]
    reader.read_data(type(plan)([part]), planner)
    assert torch.equal(rows, whole[5:21])


def test_checkpointer_says_what_does_not_fit(tmp_path: Path) -> None:
    """A state dict that is no training's, another optimizer, other groups."""
    model, optim = dcp_training.made(0)
    dcp_training.train(model, optim, 0, 1)
    save(tmp_path, dcp_training.state_of(model, optim))
    other, its = dcp_training.made(1)
    dcp_training.filled(tmp_path, model=other, optim=its)
    dcp_training.assert_same(dcp_training.state_of(other, its), dcp_training.state_of(model, optim))
    sgd = torch.optim.SGD([{"params": group["params"]} for group in its.param_groups], lr=0.1)
    with pytest.raises(StateMismatch, match="optim is an optimizer SGD here, and group 0 of the checkpoint's has no"):
        dcp_training.filled(tmp_path, model=other, optim=sgd)
    with pytest.raises(StateMismatch, match="groups"):
        dcp_training.filled(tmp_path, model=other, optim=torch.optim.AdamW(other.parameters()))
    with pytest.raises(StateMismatch, match="this state has model"):
        dcp_training.filled(tmp_path, model=other)
    save(tmp_path, {"model": other.state_dict(), "optim": its.state_dict()}, step=2)
    with pytest.raises(StateMismatch, match="optim is a optimizer here, a stateful in the checkpoint"):
        dcp_training.filled(tmp_path, model=other, optim=its)


def test_tied_tensors_that_differ_are_not_taken(tmp_path: Path) -> None:
    """A state dict holds them under each name; only what is the same can be one tensor."""
    model, _ = dcp_training.made(0)
    state = model.state_dict()
    save(tmp_path, {"model": state})
    dcp_training.filled(tmp_path, model=dcp_training.made(1)[0])
    save(tmp_path, {"model": {**state, "head.weight": state["head.weight"] + 1}}, step=2)
    with pytest.raises(StateMismatch, match=r"model/head.weight is tied .* differs"):
        dcp_training.filled(tmp_path, model=dcp_training.made(1)[0])


class Counters:
    """A stateful whose state dict looks like a module's."""

    def __init__(self) -> None:
        self.state = {"step": torch.tensor(0), "seen": torch.zeros(3, dtype=torch.int64)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_named_tensors_need_not_be_a_module(tmp_path: Path) -> None:
    """Counters of a trainer are restored into the object that has them."""
    state = {"step": torch.tensor(7), "seen": torch.arange(3)}
    save(tmp_path, {"counters": state})
    counters = Counters()
    dcp_training.filled(tmp_path, counters=counters)
    dcp_training.assert_same(counters.state, state)


def test_a_scheduler_goes_through_both_ways(tmp_path: Path) -> None:
    """What is neither module nor optimizer is a tree of values, for dcp.load and for rt.State."""
    _, optim = dcp_training.made(0)
    schedule = torch.optim.lr_scheduler.StepLR(optim, 3)
    schedule.last_epoch = 7
    save(tmp_path, {"schedule": schedule.state_dict()})
    fresh = torch.optim.lr_scheduler.StepLR(optim, 5)
    state = load(tmp_path, {"schedule": fresh.state_dict()})
    assert state["schedule"] == schedule.state_dict()
    dcp_training.filled(tmp_path, schedule=fresh)
    assert fresh.state_dict() == schedule.state_dict()
