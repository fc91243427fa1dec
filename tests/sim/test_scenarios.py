"""Scenario texts and what happens in them, and sampled seeds.

Each file of ``scenarios/`` holds a scenario, a line of dashes and the story that it tells.  After a change that is
meant to alter stories: ``python tests/sim/test_scenarios.py`` writes them anew, to be reviewed as a diff.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from resilient_train.errors import FormatError
from resilient_train.sim.faults import Fault, Scenario, draw, parse, shrink
from resilient_train.sim.scenario import run

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
LONG = {"store_gone_for_good"}
"""Those that wait for as long as nodes do."""
DASHES = "----"
SEEDS = 60


def told(text: str) -> tuple[str, tuple[str, ...]]:
    """The text with the story that it tells, and what was wrong in it."""
    scenario = text.partition(f"\n{DASHES}\n")[0]
    result = run(parse(scenario))
    return "\n".join([scenario, DASHES, *result.story, *result.problems]) + "\n", result.problems


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.soak] if path.stem in LONG else [], id=path.stem) for path in FILES],
)
def test_a_scenario_tells_its_story(path: Path) -> None:
    """Every version of the world, why it came, and the end; nothing that must never be."""
    text = path.read_text()
    assert told(text) == (text, ())


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_sampled_seeds_keep_every_promise(first: int) -> None:
    """What `sim.invariants` and `sim.scenario` check holds; ``python -m resilient_train.sim`` shows a failing seed."""
    problems = {seed: run(draw(seed)).problems for seed in range(first, first + 20)}
    assert {seed: found for seed, found in problems.items() if found} == {}


def test_a_seed_is_one_story_whatever_the_hash_seed() -> None:
    """The simulation and the machines in it depend on nothing but the seed."""
    code = "from resilient_train.sim.faults import draw; from resilient_train.sim.scenario import run; "
    code += "print([(run(draw(seed)).story, run(draw(seed)).seconds) for seed in (9, 38, 121, 323)])"
    stories = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(stories) == 1


def test_a_scenario_is_its_text() -> None:
    """What is printed for a failing seed can be pasted and runs the same."""
    for seed in range(50):
        scenario = draw(seed)
        assert parse(str(scenario)) == scenario


@pytest.mark.parametrize("line", ["at 1 fly n1", "job colour=3", "at soon kill-agent n1", "at 1", "kill-agent n1"])
def test_a_line_that_says_nothing_known_is_refused(line: str) -> None:
    """A typing error is no empty scenario."""
    with pytest.raises(FormatError, match=line):
        parse(line)


def test_a_scenario_shrinks_to_what_matters() -> None:
    """Faults that a failure does not need are left out."""
    faults = tuple(Fault(at=float(at), what="kill-agent", whom=(f"n{at}",)) for at in range(5))
    scenario = replace(draw(0), faults=faults)

    def fails(scenario: Scenario) -> bool:
        return {("n1",), ("n3",)} <= {fault.whom for fault in scenario.faults}

    assert shrink(scenario, fails).faults == (faults[1], faults[3])


def test_the_checks_notice_a_job_that_cannot_go_on() -> None:
    """All nodes die and none comes back: the simulation says so, rather than nothing."""
    scenario = parse("job nodes=2 slots=1 max_nodes=2\nat 6 kill-host n0\nat 6 kill-agent n1")
    assert run(scenario).problems == ("the job did not end: running",)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(told(file.read_text())[0])
