"""Real jobs on meshes of two dimensions, and what replicas are good for: no finished step is lost while one is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import records
from test_recovery import check_restored_bit_for_bit

from resilient_train.testing.job import Job

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
pytestmark = pytest.mark.timeout(240)

LEFT = {"ddp": 3, "hsdp": 2, "tp": 2}
"""Ranks that a world of four goes on with after the loss of one."""


@pytest.mark.parametrize(
    ("parallel", "every"),
    [
        ("hsdp", 1),
        pytest.param("tp", 1, marks=pytest.mark.soak),
        pytest.param("ddp", 5, marks=pytest.mark.soak),
        pytest.param("ddp", 1, marks=pytest.mark.soak),
        pytest.param("hsdp", 5, marks=pytest.mark.soak),
    ],
)
def test_a_rank_is_lost_and_replaced(tmp_path: Path, parallel: str, every: int) -> None:
    """The others go on in their processes on what fits the mesh, with the same bits; every batch is used once.

    They go on with the last step that survivors have finished who hold everything together, whenever the last snapshot
    was: of each shard that HSDP makes, one replica.
    """
    steps = 400
    args = ("--record", str(tmp_path / "record"), "--parallel", parallel, "--steps", str(steps), "--step-time", "0.08")
    args += ("--snapshot-every", str(every))
    with Job(SCRIPT, args, flags=["--nproc-per-node=4"], log_dir=tmp_path / "logs") as running:
        running.wait_for_line("step 6 size 4", 90)
        before = running.workers()
        running.kill(1)
        running.wait_for_line(f"size {LEFT[parallel]} generation 2", 60)
        running.wait_for_line("size 4 generation 3", 90)
        (tmp_path / "record" / "hurry").touch()
        after = running.workers()
        assert running.finish(120) == 0, running.output
        kept = {member: pid for member, pid in before.items() if member in after}
        assert len(kept) == 3
        assert kept.items() <= after.items(), "a survivor's process was restarted"
        records.check_every_batch_once(tmp_path / "record", running.events(), steps)
        check_restored_bit_for_bit(tmp_path, running)
        assert running.leftovers() == []
    if parallel != "tp":
        finished: dict[int, int] = {}
        for pid in kept.values():
            for r in records.lines(tmp_path / "record" / f"{pid}.jsonl"):
                if "step" in r and r["generation"] == 1:
                    part = r["rank"] % 2 if parallel == "hsdp" else 0
                    finished[part] = max(finished.get(part, 0), r["step"] + 1)
        (shrunk,) = [r for r in records.restores(running.events()) if r.generation == 2]
        assert shrunk.source is not None
        assert shrunk.source.step == min(finished.values()), "a finished step was lost"
