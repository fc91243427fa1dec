"""The main job, shown: four ranks train a GPT, two of them are killed on the way, and the training goes on.

    python examples/demo.py            (or: make demo)

Runs ``train_gpt.py`` twice with the same seed, once with two SIGKILLs at random instants and once without, and ends
with a table of the incidents on one clock and both loss curves in ``demo/loss.png``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from resilient_train.events import STAGES, Incident, incidents
from resilient_train.testing.job import Job

HERE = Path(__file__).parent
console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=130)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--seed", type=int, default=None, help="of the kills; default: a new one every time")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    return parser.parse_args()


def start(args: argparse.Namespace, name: str) -> Job:
    """One training run; its metrics go to ``<out>/<name>/metrics.jsonl``."""
    folder = args.out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Job(
        HERE / "train_gpt.py",
        [
            f"--parallel={args.parallel}",
            f"--steps={args.steps}",
            f"--metrics={folder / 'metrics.jsonl'}",
            f"--checkpoints={folder / 'checkpoints'}",
        ],
        flags=[f"--nproc-per-node={args.ranks}"],
        log_dir=folder / "logs",
    )


def metrics(folder: Path) -> list[dict]:
    """What rank 0 recorded, in the order of time; a line that is being written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def watch(job: Job, folder: Path, steps: int, kill_at: list[tuple[int, float]], chance: random.Random) -> list[float]:
    """Show a run live; kill a random rank a random moment after each of the given steps. Times of the kills."""
    kills: list[float] = []
    planned = list(kill_at)
    due: float | None = None
    notes: list[Text] = []
    with Live(console=console, refresh_per_second=8) as live:
        while job.running():
            rows = metrics(folder)
            step = rows[-1]["step"] if rows else -1
            if due is None and planned and step >= planned[0][0] and len(job.workers()) >= 3:
                due = time.monotonic() + planned.pop(0)[1]
            if due is not None and time.monotonic() >= due:
                slot = chance.choice(sorted(job.slots()))
                kills.append(job.kill(slot))
                notes.append(Text(f"kill -9: the process in slot {slot}, during step {step + 1}", style="bold red"))
                due = None
            live.update(screen(rows, steps, notes + said(job)))
            time.sleep(0.02)
        live.update(screen(metrics(folder), steps, notes + said(job)))
    console.print()
    return kills


def said(job: Job) -> list[Text]:
    """What the agent said, newest last."""
    lines = [line for _, line in list(job.lines) if line.startswith("[rtrun]")]
    return [Text(line, style="cyan") for line in lines[-6:]]


def screen(rows: list[dict], steps: int, notes: list[Text]) -> Table:
    """The live view: progress, then what happened."""
    grid = Table.grid(padding=(0, 2))
    if rows:
        last = rows[-1]
        done = int(40 * (last["step"] + 1) / steps)
        bar = Text("━" * done, style="green") + Text("━" * (40 - done), style="dim")
        facts = f"step {last['step'] + 1}/{steps}  loss {last['loss']:.3f}"
        grid.add_row(bar + Text(f"  {facts}  {last['size']} ranks  {last['tokens_per_second']:,.0f} tokens/s"))
    else:
        grid.add_row(Text("starting: four processes import torch ...", style="dim"))
    for note in notes:
        grid.add_row(note)
    return grid


def table(found: list[Incident], kills: list[float], rows: list[dict]) -> Table:
    """Incidents on one clock: milliseconds since the fault (for planned changes, since they were agreed)."""
    view = Table(title="incidents: ms after the kill (planned changes: after they were agreed)", title_justify="left")
    view.add_column("gen.", justify="right")
    view.add_column("what", no_wrap=True)
    for stage in STAGES:
        view.add_column(stage.replace("_", " "), justify="right")
    view.add_column("resumed from", no_wrap=True)
    view.add_column("steps lost", justify="right")
    for incident in found[1:]:
        began = fault_of(incident, kills)
        cells = [
            f"{1000 * (incident.stages[stage] - began):.0f}" if stage in incident.stages else "-" for stage in STAGES
        ]
        before = [row["step"] for row in rows if row["generation"] < incident.generation]
        lost = max(before, default=-1) + 1 - (incident.step or 0)
        what = f"{incident.reason.split(' (')[0]}: {incident.size} ranks"
        resumed = f"step {incident.step}, {incident.resumed.rpartition(' ')[2]}"
        view.add_row(str(incident.generation), what, *cells, resumed, str(max(0, lost)))
    return view


def fault_of(incident: Incident, kills: list[float]) -> float:
    """When the kill that led to an incident was sent; for planned changes, when they were agreed."""
    detected = incident.stages["detected"]
    earlier = [at for at in kills if at <= detected + 0.001 and detected - at < 1.0]
    return earlier[-1] if earlier and incident.reason.startswith("lost") else detected


def plot(path: Path, faulted: list[dict], clean: list[dict], found: list[Incident]) -> None:
    """Both loss curves and their difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 1))
    one, two = ({row["step"]: row["loss"] for row in rows} for rows in (clean, faulted))
    top.plot(list(one), list(one.values()), color="#1f4e79", linewidth=2.4, label="without faults, 4 ranks")
    top.plot(list(two), list(two.values()), color="#e07b39", linewidth=1.0, label="with faults")
    for incident in found[1:]:
        if incident.step is None:
            continue
        loss = incident.reason.startswith("lost")
        for axis in (top, bottom):
            axis.axvline(incident.step, color="#b22222" if loss else "#3a7d44", linestyle="--", linewidth=1)
        label = f" {incident.reason.split(' (')[0]}: {incident.size} ranks"
        top.text(incident.step, top.get_ylim()[1], label, rotation=90, va="top", ha="right", fontsize=8)
    common = sorted(one.keys() & two.keys())
    bottom.plot(common, [abs(one[step] - two[step]) + 1e-9 for step in common], color="#666666", linewidth=1)
    bottom.set_yscale("log")
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("step")
    top.set_ylabel("loss (nats per byte)")
    top.legend(loc="upper right")
    top.set_title("A GPT on Python's standard library, two processes killed on the way")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    args = parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10_000)
    chance = random.Random(seed)
    kill_at = [(int(args.steps * share), chance.uniform(0.0, 0.5)) for share in (0.2, 0.6)]
    console.print(f"[bold]1. With faults[/bold] (seed {seed}: rerun with --seed {seed})")
    with start(args, "faulted") as job:
        kills = watch(job, args.out / "faulted", args.steps, kill_at, chance)
        code = job.finish(120)
        if code != 0:
            console.print(job.output)
            return code
        found = incidents(job.events())
        left = job.leftovers()
    console.print("[bold]2. Without faults[/bold], the same seed")
    with start(args, "clean") as job:
        watch(job, args.out / "clean", args.steps, [], chance)
        code = job.finish(120)
        if code != 0:
            console.print(job.output)
            return code
    faulted, clean = metrics(args.out / "faulted"), metrics(args.out / "clean")
    console.print(table(found, kills, faulted))
    plot(args.out / "loss.png", faulted, clean, found)
    summary(faulted, clean, kills, left, args)
    return 0


def summary(faulted: list[dict], clean: list[dict], kills: list[float], left: list[str], args) -> None:
    """The few numbers that matter."""
    one, two = ({row["step"]: row["loss"] for row in rows} for rows in (clean, faulted))
    worst = max(abs(one[step] - two[step]) for step in one)
    console.print(f"{len(kills)} processes killed; {len(two)} of {args.steps} steps finished")
    console.print(f"processes left over: {len(left)}")
    console.print(f"final loss {two[args.steps - 1]:.4f} with faults, {one[args.steps - 1]:.4f} without")
    console.print(f"largest difference of the two loss curves: {worst:.2e}")
    console.print(f"loss curves: {args.out / 'loss.png'}; events: {args.out / 'faulted' / 'logs' / 'events.jsonl'}")


if __name__ == "__main__":
    sys.exit(main())
