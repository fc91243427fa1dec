"""Several nodes make states durable in one place: the same steps, the last one too; none removes what is another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import digests, read, restores

from resilient_train.spec.world import Key
from resilient_train.storage.catalogue import listing, read_manifest
from resilient_train.storage.filesystem import FilesystemTier
from resilient_train.testing.nodes import Nodes

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
pytestmark = pytest.mark.timeout(300)


@pytest.mark.soak
def test_nodes_agree_on_what_to_save_by_time_and_save_the_last_state(tmp_path: Path) -> None:
    """Every 0.4 s, on two nodes: what is begun becomes complete; the last state is durable; another number of nodes
    resumes it."""
    args = ["--url", str(tmp_path / "url"), "--persist-every", "0.4s", "--step-time", "0.05"]
    flags = ["--nproc-per-node=2", "--nnodes=1:2"]
    record = ["--record", str(tmp_path / "first")]
    both = ["--nproc-per-node=2", "--nnodes=2:2"]
    with Nodes(SCRIPT, [*args, *record, "--steps", "60"], count=2, flags=both, folder=tmp_path / "a") as running:
        assert running.finish(120) == [0, 0], running.output
        saved = {int(text.split()[1]) for text in _texts(running, "persisted")}
    assert 60 in saved, running.output
    assert len(saved) >= 3, running.output
    tier = FilesystemTier(str(tmp_path / "url"))
    committed, unfinished = listing(tier)
    assert committed[-1] == Key(1, 60)
    assert unfinished == []
    assert len(committed) == 3
    assert len(read_manifest(tier, Key(1, 60)).files) == 4
    final = digests(read(tmp_path / "first"))[1]["finished"][60]
    record = ["--record", str(tmp_path / "second")]
    with Nodes(SCRIPT, [*args, *record, "--steps", "70"], count=1, flags=flags, folder=tmp_path / "b") as running:
        assert running.finish(120) == [0], running.output
        assert restores(running.events())[0].source == Key(1, 60)
    assert digests(read(tmp_path / "second"))[1]["restored"] == {60: final}


def _texts(running: Nodes, kind: str) -> list[str]:
    return [event.text for event in running.events() if event.kind == kind]
