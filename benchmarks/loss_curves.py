"""How far a training with faults is from one without: the whole loss curve, DDP and FSDP2, float32, gloo.

    python benchmarks/loss_curves.py [--steps 120]

For each wrapper three runs of ``examples/train_gpt.py`` with one seed: without faults on 4 and on 3 ranks, which differ
by the order of floating-point sums only, and on 4 ranks with two kills.  The faulted run should be no further from the
fault-free one than the fault-free ones are from each other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from resilient_train.events import incidents
from resilient_train.testing.job import Job

SCRIPT = Path(__file__).parent.parent / "examples" / "train_gpt.py"


def train(folder: Path, parallel: str, ranks: int, steps: int, kills: int, chance: random.Random):
    """(step -> loss, steps at which a state was restored)."""
    folder.mkdir()
    metrics = folder / "metrics.jsonl"
    arguments = [f"--parallel={parallel}", f"--steps={steps}", f"--metrics={metrics}"]
    with Job(SCRIPT, arguments, flags=[f"--nproc-per-node={ranks}"], log_dir=folder) as job:
        for kill in range(kills):
            target = steps * (kill + 1) // (kills + 2)
            job.wait_for(lambda at=target: len(losses(metrics)) > at, 120, "progress")
            job.wait_for(lambda: len(job.slots()) == ranks, 60, "full strength")
            job.kill(chance.choice(job.slots()))
        if job.finish(300) != 0:
            raise RuntimeError(job.output)
        restored = [incident.step for incident in incidents(job.events())[1:]]
    return losses(metrics), restored


def losses(path: Path) -> dict[int, float]:
    """The last loss recorded for each step."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000), help="of the kills")
    args = parser.parse_args()
    print(f"command: {' '.join(['python', 'benchmarks/loss_curves.py', *sys.argv[1:]])} (seed {args.seed})")
    chance = random.Random(args.seed)
    print(f"{'':6}{'4 vs 3 ranks, no faults':>26}{'faults vs none':>18}{'right after a restore (relative)':>36}")
    with tempfile.TemporaryDirectory() as scratch:
        for parallel in ("fsdp", "ddp"):
            four, _ = train(Path(scratch) / f"{parallel}4", parallel, 4, args.steps, 0, chance)
            three, _ = train(Path(scratch) / f"{parallel}3", parallel, 3, args.steps, 0, chance)
            faulted, restored = train(Path(scratch) / f"{parallel}x", parallel, 4, args.steps, 2, chance)
            between = max(abs(four[step] - three[step]) for step in four)
            apart = max(abs(four[step] - faulted[step]) for step in four)
            after = max(abs(four[s] - faulted[s]) / four[s] for s in restored if s is not None and s in four)
            print(f"{parallel:6}{between:26.2e}{apart:18.2e}{after:36.2e}")


if __name__ == "__main__":
    main()
