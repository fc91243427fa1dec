"""A keeper that lives and does nothing is noticed, and replaced without losing what it held."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from records import check_every_batch_once

from resilient_train.testing.job import Job

SCRIPT = Path(__file__).parent / "scripts" / "train.py"


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_a_stopped_keeper_is_replaced_and_the_next_one_has_its_images(tmp_path: Path) -> None:
    """SIGSTOP: another takes over after the limit; a rank that is lost then is resumed from memory."""
    args = ["--record", str(tmp_path / "record"), "--steps", "400", "--step-time", "0.05"]
    flags = ["--nproc-per-node=2", "--detect-within=1"]
    with Job(SCRIPT, args, flags=flags, log_dir=tmp_path / "logs") as job:
        job.wait_for_line("step 10 ", 90)
        (keeper,) = job.keepers()
        os.kill(keeper, signal.SIGSTOP)
        job.wait_for_line("the keeper has not answered 5 times in a row", 60)
        job.wait_for_line("another takes over its images", 30)
        job.wait_for(lambda: job.keepers() and keeper not in job.keepers(), 30, "another keeper")
        job.wait_for_line("size 2", 30, count=5)
        job.kill(1)
        assert job.finish(120) == 0, job.output
        check_every_batch_once(tmp_path / "record", job.events(), 400)
        assert job.leftovers() == []
