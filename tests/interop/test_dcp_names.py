"""Which part each leaf of a state dict belongs to, by names alone, and the document that rt.State expects."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from resilient_train.errors import FormatError
from resilient_train.interop.dcp_document import document_of
from resilient_train.interop.dcp_names import entry_name, nested, parts_of

T = torch.zeros(1)
STATE = {"0.weight": {"step": T, "exp_avg": T}, "0.bias": {"step": T}}
GROUPS = [{"lr": 0.1, "params": ["0.weight"]}, {"lr": 0.1, "betas": (0.9, 0.99), "params": ["0.bias", "2.bias"]}]
MODEL = {"0.weight": T, "0.bias": T, "2.bias": T}
JOINED = {
    "state.0.weight.exp_avg": T,
    "state.0.bias.step": T,
    **{f"param_groups.{name}.lr": 0.1 for name in ("0.weight", "0.bias")},
    "param_groups.2.bias.lr": 0.2,
}


def parts(state: dict[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Kinds of the parts, names of the tensors, the document."""
    flat, paths = flatten_state_dict(state)
    tensors = {fqn for fqn, value in flat.items() if torch.is_tensor(value)}
    found = parts_of(paths, tensors)
    names = {leaf.fqn: entry_name(part, leaf) for part in found for leaf in part.leaves if leaf.tensor}
    values = {fqn: value for fqn, value in flat.items() if fqn not in tensors}
    return {part.name: part.kind for part in found}, names, json.loads(document_of(found, values))


def test_the_usual_shape_is_named_as_state_names_it() -> None:
    """Module and optimizer, the optimizer's tensors by the module's parameters."""
    kinds, names, document = parts({"model": MODEL, "optim": {"state": STATE, "param_groups": GROUPS}})
    assert kinds == {"model": "module", "optim": "optimizer"}
    assert names["model.0.weight"] == "model/0.weight"
    assert names["optim.state.0.bias.step"] == "optim/model.0.bias/step"
    assert document["optim"]["parameters"] == ["model.0.weight", "model.0.bias", "model.2.bias"]
    assert document["optim"]["sizes"] == [1, 2]
    assert document["optim"]["groups"] == [{"lr": 0.1}, {"lr": 0.1, "betas": {"$tuple": [0.9, 0.99]}}]
    assert document["optim"]["state"]["model.0.weight"] == {
        "step": {"tensor": "optim/model.0.weight/step", "device": "cpu"},
        "exp_avg": {"tensor": "optim/model.0.weight/exp_avg", "device": "parameter"},
    }
    assert document["rng"] is None


def test_joined_names_are_taken_apart_by_the_modules_names() -> None:
    """Neighbours with the same options are a group."""
    kinds, names, document = parts({"model": MODEL, "optim": JOINED})
    assert kinds["optim"] == "optimizer"
    assert names["optim.state.0.weight.exp_avg"] == "optim/model.0.weight/exp_avg"
    assert document["optim"]["sizes"] == [2, 1]
    assert document["optim"]["groups"] == [{"lr": 0.1}, {"lr": 0.2}]


def test_of_several_modules_the_one_that_fits_is_optimised() -> None:
    """By names; the one called model if both fit."""
    optim = {"state": STATE, "param_groups": GROUPS}
    assert parts({"ema": MODEL, "model": MODEL, "o": optim})[1]["o.state.0.bias.step"] == "o/model.0.bias/step"
    assert parts({"a": {"x": T}, "b": MODEL, "o": optim})[1]["o.state.0.bias.step"] == "o/b.0.bias/step"


@pytest.mark.parametrize(
    "optim",
    [
        {"state": {0: {"step": T}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        {"state": STATE, "param_groups": [{"lr": 0.1}]},
        {"state": STATE, "param_groups": [{"params": ["0.weight"]}]},
        {"state": {}, "param_groups": [{"params": ["0.weight", "0.weight"]}]},
        {"state": STATE, "other": 3},
        {**JOINED, "param_groups.0.weight.lr": T},
        {**JOINED, "state.elsewhere.step": T},
    ],
)
def test_what_is_no_optimizer_of_the_module_is_a_tree(optim: dict[str, Any]) -> None:
    """Its tensors are all there, under whatever names, and the document says so."""
    _, names, document = parts({"model": MODEL, "optim": optim})
    assert document["optim"]["kind"] == "stateful"
    said = json.dumps(document["optim"])
    mine = [name for fqn, name in names.items() if fqn.startswith("optim")]
    assert all(f'"$tensor": {json.dumps(name)}' in said for name in mine)


def test_a_module_may_have_children_called_like_an_optimizers_sections() -> None:
    """An optimizer has options."""
    assert parts({"model": {"state.weight": T, "state.bias": T}})[0] == {"model": "module"}


def test_part_names_never_collide() -> None:
    """A slash ends a part's name and rng is taken; what DCP calls the part is kept."""
    kinds, _, document = parts({"rng": {"a": 1}, "rng_": {"a": 2}, "a/b": {"t": T}, "a_b": {"t": T}, "": {"t": T}})
    assert list(kinds) == ["rng_", "rng__", "a_b", "a_b_", "_"]
    assert [document[name].get("prefix") for name in kinds] == [["rng"], ["rng_"], ["a/b"], ["a_b"], [""]]


def test_extra_states_belong_to_the_module_if_json_can_hold_them() -> None:
    """Else the part is no module that rt.State could restore."""
    kinds, _, document = parts({"model": {"w": T, "a._extra_state": {"n": [1, 2]}, "_extra_state": 3}})
    assert kinds == {"model": "module"}
    assert document["model"]["extra"] == {"a.": {"n": [1, 2]}, "": 3}
    assert parts({"model": {"w": T, "_extra_state": T}})[0] == {"model": "stateful"}
    assert parts({"w": T, "a._extra_state": 3})[0] == {"model": "module"}


def test_trees_are_built_from_paths() -> None:
    """Lists where numbers lead, and only as long as can be meant."""
    assert nested([((), 5)]) == 5
    assert nested([(("a", 1, "b"), 1), (("a", 0), 2)]) == {"a": [2, {"b": 1}]}
    assert nested([(("a", 2), 1)]) == {"a": [None, None, 1]}, "empty containers vanish when DCP flattens"
    for impossible in ([(("a", 1 << 40), 1)], [(("a",), 1), (("a", "b"), 2)], [(("a", -1), 1)]):
        with pytest.raises(FormatError):
            nested(impossible)
