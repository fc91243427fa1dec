"""Several ranks: saved by two with FSDP2, and read by any number, by DCP and by rt.Checkpointer."""

from __future__ import annotations

from pathlib import Path

import dcp_training
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import world

from resilient_train.interop import dcp as rt_dcp
from resilient_train.launch import rtctl

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def test_a_state_goes_through_every_form_and_world_bit_for_bit(tmp_path: Path) -> None:
    """FSDP2 on two ranks: dcp.save, rt.Checkpointer, dcp.load, import; then the same on three ranks and on one."""
    world(2, dcp_training.save_and_go_on, tmp_path)
    images = sorted(path.name for path in (tmp_path / "run" / "step-000000002.g1").iterdir())
    both = [f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    assert images == ["manifest.json", "part-00000.json", *both]
    world(3, dcp_training.load_both, tmp_path)
    dcp_training.load_both(tmp_path)
    for place in ("run", "imported"):
        assert rtctl.run(["verify", "--all", str(tmp_path / place)]) == 0


def test_failures_leave_nothing_and_keys_of_a_ranks_own_are_kept(tmp_path: Path) -> None:
    """Two ranks: nothing is committed if one fails; values that only one rank has are there; async_save is complete."""
    world(2, dcp_training.fail_and_save, tmp_path)
    stages = {f"stage{rank}": {"weight": torch.zeros(3), "options": {"rank": None, "pair": None}} for rank in (0, 1)}
    dcp.load(stages, storage_reader=rt_dcp.Reader(tmp_path / "stages"))
    assert [stage["options"] for stage in stages.values()] == [{"rank": r, "pair": (r, 1)} for r in (0, 1)]
    (whole, its), (model, optim) = dcp_training.staged(0), dcp_training.staged(1)
    dcp_training.filled(tmp_path / "pipeline", model=model, optim=optim)
    dcp_training.assert_same(model.state_dict(), whole.state_dict())
    dcp_training.assert_same(optim.state_dict(), its.state_dict())
    assert [stage["weight"].tolist() for stage in stages.values()] == [[0.0] * 3, [1.0] * 3]
