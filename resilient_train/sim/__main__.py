"""``python -m resilient_train.sim``: many seeds, one seed, a scenario from a file, or the table of costs."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from resilient_train.plan.suspicion import PROBERS
from resilient_train.sim import cost
from resilient_train.sim.faults import Scenario, draw, parse, shrink
from resilient_train.sim.scenario import run


def main() -> int:
    """Run the command line; 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m resilient_train.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="how many (default 100)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first (default 0)")
    parser.add_argument("--keep-going", action="store_true", help="count the seeds that fail instead of stopping")
    parser.add_argument("--scenario", type=Path, metavar="FILE", help="run this one and tell its story")
    parser.add_argument("--cost", action="store_true", help="print the table of docs/scale.md")
    args = parser.parse_args()
    if args.cost:
        return _cost()
    if args.scenario is not None:
        return _tell(parse(args.scenario.read_text().partition("\n----")[0]))
    return _seeds(range(args.first, args.first + args.seeds), args.keep_going)


def _cost() -> int:
    """Counted for few nodes, reckoned for many."""
    counted = {nodes: cost.count(nodes) for nodes in (3, 10, 30)}
    few = f"changes told if {PROBERS} watched announcements"
    print("| event | nodes |", *(f"{column} |" for column in (*cost.COLUMNS, few)))
    print("|---|---|" + "---|" * (len(cost.COLUMNS) + 1))
    for kind in cost.KINDS:
        for nodes in (3, 30, 100, 1000, 10_000):
            known = counted.get(nodes)
            found = known[kind] if known else cost.reckon(counted[10][kind], 10, counted[30][kind], 30, nodes)
            values = [*found.values(), found.told_to_few(nodes, PROBERS)]
            print(f"| {kind} | {nodes:,} |", *(f"{_short(value)} |" for value in values))
    print("\n| nodes of 8 ranks | agreed after, s | all have heard after, s | if 300 bytes of change were sent |")
    print("|---|---|---|---|")
    for nodes in (3, 100, 1000, 10_000):
        (agreed, heard), (_, changes) = cost.agreement(nodes, 8), cost.agreement(nodes, 8, record=300)
        print(f"| {nodes:,} | {agreed:.3f} | {heard:.3f} | {changes:.3f} |")
    return 0


def _short(value: float) -> str:
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _tell(scenario: Scenario) -> int:
    result = run(scenario)
    print(*result.story, *(f"WRONG: {problem}" for problem in result.problems), sep="\n")
    return 1 if result.problems else 0


def _seeds(seeds: range, keep_going: bool) -> int:
    begin, busy, failed = time.monotonic(), time.process_time(), Counter[str]()
    simulated, slowest = 0.0, (0.0, -1)
    for seed in seeds:
        result = run(draw(seed))
        simulated += result.seconds
        slowest = max(slowest, (result.settled_after, seed))
        if result.problems and keep_going:
            failed[result.problems[0]] += 1
            print(f"seed {seed}: {result.problems[0]}", flush=True)
        elif result.problems:
            _show(seed, result.problems[0])
            return 1
    took, busy = time.monotonic() - begin, time.process_time() - busy
    print(f"{len(seeds)} seeds, {simulated:,.0f} s simulated in {took:.1f} s ({busy:.1f} s of processor time)")
    print(f"{failed.total()} failed")
    print(f"all that was alive trained at most {slowest[0]:g} s after the last fault (seed {slowest[1]})")
    return 1 if failed else 0


def _show(seed: int, problem: str) -> None:
    """The smallest scenario that still goes wrong."""
    smallest = shrink(draw(seed), lambda scenario: bool(run(scenario).problems))
    if not smallest.faults:
        smallest = replace(smallest, faults=())
    result = run(smallest)
    print(f"seed {seed}: {problem}\n\n{smallest}\n\n# what happened", *result.story, *result.problems, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
