"""Nodes on a real network, of namespaces and virtual wires, some of which are cut."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from records import check_every_batch_once

from resilient_train.testing.network import Network, may_make_networks
from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not may_make_networks(), reason="needs root and iproute2 for network namespaces"),
]


def test_a_node_that_is_cut_off_never_trains_alone_and_comes_back(tmp_path: Path) -> None:
    """All packets dropped: the others go on without it, it stands still, and joins again once the wire is mended."""
    record = ["--record", str(tmp_path / "record")]
    flags = ["--nnodes=1:3", "--nproc-per-node=1", "--detect-within=2", "--rdzv-conf=last_call_timeout=60"]
    script = [*record, "--steps", "250", "--step-time", "0.05"]
    with (
        Network(3) as network,
        Nodes(SCRIPT, script, count=3, flags=flags, folder=tmp_path, network=network) as running,
    ):
        first, last = running.jobs[0], running.jobs[2]
        first.wait_for_line("step 10 size 3", 90)
        pids = set(last.workers().values())
        network.cut(2)
        at = time.monotonic()
        first.wait_for_line("size 2", 60)
        print(f"went on after {time.monotonic() - at:.2f} s")
        first.wait_for_line("size 2", 60, count=40)
        network.mend(2)
        first.wait_for_line("size 3 generation 3", 90)
        assert set(last.workers().values()) == pids
        assert running.finish(120) == [0, 0, 0], running.output
        check_every_batch_once(tmp_path / "record", running.events(), 250)
        # What the cut-off rank computed in the first world ended with the step in which the wire was cut.
        worlds = {event.generation: event.fields["size"] for event in running.events() if event.kind == "agreed"}
        assert worlds == {1: 3, 2: 2, 3: 3}
        assert [left for job in running.jobs for left in job.leftovers()] == []
