"""Runs a scenario and says how it went."""

from __future__ import annotations

from dataclasses import dataclass

from resilient_train.errors import ExitCode
from resilient_train.plan.view import Timing
from resilient_train.sim.cluster import Cluster
from resilient_train.sim.faults import OF_STORE, PLANNED, VERBS, Fault, Scenario
from resilient_train.spec.world import Phase

SETTLED = 40.0
"""Seconds after the last fault within which all that is alive trains, for ``within`` = 5; where a world may have to be
waited for that nobody hears of, so much more as that takes."""
_START = 15.0
"""Seconds that a job needs to start where nothing goes wrong."""
_SLOWEST = 0.3
"""Seconds that a step takes at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a scenario went."""

    problems: tuple[str, ...]
    """What should not have been."""
    story: tuple[str, ...]
    """Each world in a line, and the end."""
    seconds: float
    """Simulated."""
    settled_after: float
    """Seconds from the end of the last fault until all that was alive trained."""


def run(scenario: Scenario) -> Result:
    """Run it to its end."""
    cluster = Cluster(scenario.job)
    for fault in scenario.faults:
        cluster.engine.at(fault.at, lambda fault=fault: _happen(cluster, fault))  # type: ignore[misc]
    cluster.run(scenario.over_at, to_the_end=True)
    quiet = max(scenario.over_at, _START)
    cluster.run(quiet)
    settled_after = 0.0
    while not cluster.checker.problems and not cluster.over():
        missing = cluster.settled()
        if not missing:
            break
        limit = SETTLED + _fences(cluster)
        if settled_after >= limit and cluster.unhelped():
            break
        if settled_after >= limit:
            cluster.checker.wrong(f"{limit:g} s after the last fault {missing}")
        settled_after += 0.25
        cluster.run(quiet + settled_after)
    cluster.run(quiet + settled_after + SETTLED + _fences(cluster) + _SLOWEST * scenario.job.steps)
    _judge(cluster, scenario)
    return Result(
        problems=tuple(cluster.checker.problems),
        story=tuple(cluster.story()),
        seconds=cluster.engine.now,
        settled_after=settled_after,
    )


def _fences(cluster: Cluster) -> float:
    """Seconds that worlds took to have stopped for sure."""
    count = sum(not world.members and bool(world.former) for world in cluster.checker.worlds.values())
    return count * Timing.scaled(cluster.job.within).fence


def _happen(cluster: Cluster, fault: Fault) -> None:
    if fault.what not in OF_STORE | PLANNED:
        cluster.checker.disturbed = max(cluster.checker.disturbed, fault.at + fault.seconds)
    VERBS[fault.what](cluster, fault)


def _judge(cluster: Cluster, scenario: Scenario) -> None:
    """The end must be a good one, and where only the store had troubles nothing may have changed."""
    record, checker = cluster.record, cluster.checker
    if checker.problems:
        return
    verbs = {fault.what for fault in scenario.faults}
    killed = bool(verbs & {"kill-worker", "stop-worker"})
    meant = record is not None and (
        (bool(verbs & {"drain", "wish-drain"}) and record.exit_code == ExitCode.INTERRUPTED)
        # Until a script is known to be elastic, a killed worker means what it means to torchrun.
        or (killed and "nobody had called an elastic function yet" in record.error)
    )
    if record is not None and record.phase is Phase.RUNNING and (_all_left(cluster, verbs) or cluster.unhelped()):
        return
    if record is None or record.phase is Phase.RUNNING:
        checker.wrong(f"the job did not end: {cluster.outcome()}")
    elif record.phase is Phase.FAILED and not meant:
        checker.wrong(f"the job {cluster.outcome()}")
    elif left := [node.name for node in cluster.nodes.values() if node.alive]:
        checker.wrong(f"the job has ended and {', '.join(left)} did not notice")
    began = checker.begun.get(1, float("inf"))
    undisturbed = bool(scenario.faults) and all(f.what in OF_STORE and f.at > began for f in scenario.faults)
    if undisturbed and len(checker.worlds) > 1:
        checker.wrong("the world changed and only the store had troubles")


def _all_left(cluster: Cluster, verbs: set[str]) -> bool:
    """Whether every agent has ended as one that was told to leave, or whose store was lost, and said so."""
    meant = {ExitCode.INTERRUPTED: {"drain", "wish-drain"}, ExitCode.STORE_LOST: {"down-store"}}
    ends = [node.ended.code for node in cluster.nodes.values() if node.ended is not None]
    return cluster.over() and any(meant.get(code, set()) & verbs for code in ends)
