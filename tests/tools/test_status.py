"""What `rtctl status` shows of a job."""

from __future__ import annotations

from resilient_train.spec.messages import Status
from resilient_train.spec.node import NodeInfo, WorkerInfo
from resilient_train.spec.world import WorldRecord
from resilient_train.tools.status import Job, describe


def job(members: tuple[str, ...], *nodes: NodeInfo, here: frozenset[str] = frozenset()) -> Job:
    record = WorldRecord(revision=3, generation=2, members=members, bootstrap="h:1", reason="test")
    said = [node.to_json() for node in nodes]
    status = Status(
        job="run", node="n0", record=record.to_json(), nodes=said, step=7, incidents=[[61.0, "lost"]], store=""
    )
    return Job("job-1", status, here)


def node(order: int, *workers: WorkerInfo) -> NodeInfo:
    return NodeInfo(node=f"n{order}", order=order, endpoint="h:1", slots=1, link=f"h{order}:2", workers=workers)


def row(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name))


def test_every_node_of_this_machine_is_marked() -> None:
    """Several agents on one machine are all here."""
    nodes = [node(order, WorkerInfo(member=f"n{order}/0.0", elastic=True)) for order in range(3)]
    lines = describe(job(("n0/0.0", "n1/0.0", "n2/0.0"), *nodes, here=frozenset({"n0", "n2"})))
    assert lines[0] == "job run: running, generation 2, 3 ranks on 3 nodes, step 7"
    assert ["(here)" in row(lines, f"n{order}") for order in range(3)] == [True, False, True]
    assert lines[-1].split() == ["61.0", "s", "ago", "lost"]


def test_workers_of_a_parked_job_do_not_stand_by() -> None:
    """They wait for nodes; beside a world that trains they do stand by."""
    idle = WorkerInfo(member="n0/0.0", elastic=True, idle=True)
    parked = describe(job((), node(0, idle)))
    assert "parked" in parked[0]
    assert "1 waiting for nodes" in row(parked, "n0")
    spare = WorkerInfo(member="n1/0.0", elastic=True, idle=True)
    training = describe(job(("n0/0.0",), node(0, WorkerInfo(member="n0/0.0", elastic=True)), node(1, spare)))
    assert "1 standing by" in row(training, "n1")
